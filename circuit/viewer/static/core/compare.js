// Two graphs side by side: which nodes they share. Tokens are aligned first, so that prompts of different length share what
// they have in common; features of one transcoder are the same by layer and index, those of two by their labels.

import { bareLabel } from "./format.js";

// For every token of the first, its place in the second, or -1: the longest run of tokens in common order.
export function align(first, second) {
  const n = first.length, m = second.length;
  const longest = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) longest[i][j] = first[i] === second[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  }
  const place = new Array(n).fill(-1);
  for (let i = 0, j = 0; i < n && j < m;) {
    if (first[i] === second[j]) place[i++] = j++;
    else if (longest[i + 1][j] >= longest[i][j + 1]) i += 1;
    else j += 1;
  }
  // a single token that differs between two that agree stands for its counterpart: Dallas for Oakland
  for (let i = 0; i < n; i++) {
    if (place[i] >= 0) continue;
    let end = i;
    while (end < n && place[end] < 0) end += 1;
    const from = i ? place[i - 1] + 1 : 0, to = end < n ? place[end] : m;
    if (to - from === end - i) for (let k = i; k < end; k++) place[k] = from + k - i;
    i = end;
  }
  return place;
}

// Features of one run keep their numbers, at every checkpoint.
export function compare(a, b, byLabel = a.run !== b.run) {
  const place = align(a.tokens, b.tokens);
  const name = (node, position) => {
    if (node.kind === "feature" && byLabel) return node.label ? `feature|${position}|${bareLabel(node.label)}` : null;
    if (node.kind === "logit") return `logit|${node.label}`;
    return `${node.kind}|${node.layer}|${position}|${node.kind === "feature" ? node.index : ""}`;
  };
  const known = new Map();
  b.nodes.forEach((node, j) => { const key = name(node, node.position); if (key) known.set(key, [...(known.get(key) ?? []), j]); });
  const pairs = [], shared = [new Set(), new Set()];
  a.nodes.forEach((node, i) => {
    const key = place[node.position] >= 0 || node.kind === "logit" ? name(node, place[node.position]) : null;
    for (const j of (key && known.get(key)) || []) { pairs.push([i, j]); shared[0].add(i); shared[1].add(j); }
  });
  const own = (model, side) => model.nodes.flatMap((node, i) => (!shared[side].has(i) && node.kind === "feature" ? [i] : []))
    .sort((x, y) => model.nodes[y].influence - model.nodes[x].influence);
  return { pairs, shared, lost: own(a, 0), gained: own(b, 1), byLabel };
}
