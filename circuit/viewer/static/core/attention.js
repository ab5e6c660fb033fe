// What a graph's heads.json and seeds.json hold, in the page's terms. Their nodes are [kind, layer, position, index].

import { token } from "./format.js";

export function pageKey([kind, layer, position, index]) {
  if (kind === "constant") return "constant";
  if (kind === "feature") return `${layer}/${position}/${index}`;
  if (kind === "embedding") return `E/${position}`;
  if (kind === "logit") return `logit/${position}/${index}`;
  return `${kind}/${layer}/${position}`;
}

// The record of one edge, or undefined.
export function recordedHeads(attention, target, source) {
  return attention?.edges.find((one) => pageKey(one.target) === target && pageKey(one.source) === source);
}

// The record of why a head looked, or undefined: from a query, or from where an edge went through it.
export function recordedLook(attention, { layer, head, query, target, source }) {
  return attention?.attention.find((one) => one.layer === layer && one.head === head
    && (target ? pageKey(one.carried.edge.target) === target && pageKey(one.carried.edge.source) === source : one.query === query));
}

// A source of a score: in words, and as a node of the page where it is one (-1 where it is not).
export function sourceOf(model, kept, key, nodeName) {
  const i = model.byKey.get(pageKey(key)) ?? -1;
  if (key[0] === "constant") return { text: "what no source makes", i };
  const at = `${key[2]} “${token(model.tokens[key[2]] ?? "")}”`;
  if (key[0] === "embedding") return { text: `token ${at}`, i };
  if (i >= 0) return { text: `${nodeName(model, kept, i)}, L${key[1]} at ${at}`, i };
  return { text: key[0] === "feature" ? `feature ${key[3]} of L${key[1]} at ${at}` : `${key[0]} of L${key[1]} at ${at}`, i };
}

// Where a head looked from one query: every key that may be seen, with its share.
export function pattern(look, tokens) {
  return tokens.map((text, position) => ({ position, text, share: look.pattern[String(position)] ?? null, score: look.scores[String(position)] ?? null }));
}

// What explains one key: pairs, both sides, and what silencing a source does to the key's share.
export const keyOf = (look, key) => look.keys.find((one) => one.key === key);

// "4 of 5": in how many trainings a feature (one key) or an edge (source, target) was found; "" where nobody asked.
export function heldIn(seeds, what, ...keys) {
  const found = seeds?.[what].find((one) => (what === "features" ? pageKey(one) === keys[0] : keys.every((key, i) => pageKey(one[i]) === key)));
  return found ? `${found.at(-1)} of ${seeds.trainings}` : "";
}
