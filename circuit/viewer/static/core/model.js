// A graph as it came, made ready: edges by their ends, nodes by their keys; what is shown of it, and in one sentence.

import { count, percent, token } from "./format.js";

export function prepare(data) {
  const n = data.nodes.length;
  const { source, target, weight, flow } = data.links;
  const byKey = new Map(data.nodes.map((node, i) => [node.key, i]));
  return {
    ...data, n, byKey,
    source: Int32Array.from(source), target: Int32Array.from(target),
    weight: Float32Array.from(weight), flow: Float32Array.from(flow),
    into: ends(n, target), outOf: ends(n, source),
  };
}

// The links at every node, as one list cut into parts: links of node i are list[start[i]] to list[start[i + 1] - 1].
function ends(n, at) {
  const start = new Int32Array(n + 1);
  for (const i of at) start[i + 1] += 1;
  for (let i = 0; i < n; i++) start[i + 1] += start[i];
  const next = start.slice(0, n), list = new Int32Array(at.length);
  at.forEach((i, link) => { list[next[i]++] = link; });
  return { start, list };
}

export const linksAt = (side, i) => side.list.subarray(side.start[i], side.start[i + 1]);

// The strongest links into (or out of) a node.
export function strongest(model, side, i, most = Infinity) {
  const own = [...linksAt(side, i)].sort((a, b) => Math.abs(model.weight[b]) - Math.abs(model.weight[a]));
  return own.slice(0, most);
}

// The share of influence up to which nodes are shown at first: what a first look can hold.
export function firstShare(model, most = 60) {
  const shares = model.nodes.filter((node) => node.kind === "feature").map((node) => node.share).sort((a, b) => a - b);
  if (!shares.length) return 1;
  return Math.ceil(100 * Math.min(0.8, Math.max(shares[Math.min(most, shares.length) - 1], shares[0]))) / 100;
}

export function shownNodes(model, { share, errors, biases }, always = new Set()) {
  const shown = new Uint8Array(model.n);
  model.nodes.forEach((node, i) => {
    const { kind } = node;
    if (kind === "logit" || kind === "embedding" || always.has(i)) shown[i] = 1;
    else if (node.share > share + 1e-9) shown[i] = 0;
    else if (kind === "feature") shown[i] = 1;
    else if (kind === "error" || kind === "kept") shown[i] = errors ? 1 : 0;
    else shown[i] = biases ? 1 : 0;
  });
  return shown;
}

export function figures(model, shown) {
  let features = 0, influence = 0;
  const layers = new Set();
  model.nodes.forEach((node, i) => {
    if (!shown[i] || node.kind !== "feature") return;
    features += 1;
    influence += node.influence;
    layers.add(node.layer);
  });
  const all = model.size.feature_influence;
  return { features, layers: layers.size, carried: all > 0 ? influence / all : 0 };
}

// What the picture shows, and how much of the influence that is.
export function sentence(model, shown) {
  const { features, layers, carried } = figures(model, shown);
  const says = answers(model).slice(0, 2).map((one) => `“${token(one.label)}” (${weighed(model, one)})`).join(" and ");
  const towards = says ? ` on ${says}` : "";
  if (!features) return `No feature is shown; ${count(model.size.features, "feature")} of this graph act${towards}.`;
  const these = features === 1 ? "feature carries" : `${features} strongest features carry`;
  return `The ${these} ${percent(carried)} of all ${model.size.features.toLocaleString("en")} features’ influence${towards}; they lie in ${count(layers, "layer")} of ${model.layers}.`;
}

export const answers = (model) => model.nodes.filter((node) => node.kind === "logit");

export function weighed(model, node) {
  return model.weight_name === "probability" ? percent(node.probability) : `weight ${Number(node.probability.toPrecision(2))}`;
}

// What was left out, and how far the account can be trusted: [text, whether it is a warning].
export function honestly(model, shown, drawn, between) {
  const { features } = figures(model, shown);
  const { largest_violation: violation, largest_relative_violation: relative, active_features: active, left_out_features: left } = model.accounting;
  const parts = [
    [`${features} of ${model.size.features.toLocaleString("en")} features shown${model.size.shown < model.size.features ? ` (the page has the ${model.size.shown.toLocaleString("en")} strongest)` : ""}`, false],
    [`${drawn.toLocaleString("en")} of ${between.toLocaleString("en")} edges drawn`, false],
  ];
  if (left) parts.push([`${left.toLocaleString("en")} of ${active.toLocaleString("en")} active ones left out of the graph`, false]);
  const error = 1 - (model.shown_scores ?? model.scores).replacement_score;
  parts.push([`${percent(error)} comes from errors: what the transcoder misses, and what is cut here`, error > 0.5]);
  if (violation !== undefined) {
    const worst = relative ?? violation;
    parts.push([`the sums hold to ${Number(worst.toPrecision(1))}`, worst > 1e-2]);
  }
  if (model.partial) parts.push(["the file held a part of the graph only, and scores are of that part", true]);
  return parts;
}

// Groups that the first look starts from: of the graph's own or alike ones and of features alone, those that carry most.
export function suggested(model, most = 9) {
  const changes = { pins: {}, members: {}, groups: {} };
  const weight = (members) => members.reduce((sum, i) => sum + model.nodes[i].influence, 0);
  const grouped = new Set(model.supernodes.flatMap((one) => one.members));
  const alone = model.nodes.flatMap((node, i) => (node.kind === "feature" && !grouped.has(i) ? [{ name: "", members: [i] }] : []));
  const boxes = [...model.supernodes, ...alone].sort((a, b) => weight(b.members) - weight(a.members)).slice(0, most);
  const taken = new Set();
  boxes.forEach((box, rank) => {
    const keys = box.members.filter((i) => !taken.has(i)).map((i) => { taken.add(i); return model.nodes[i].key; });
    for (const key of keys) changes.pins[key] = true;
    if (keys.length < 2) return;
    changes.groups[`s${rank}`] = box.name.slice(0, 200);
    for (const key of keys) changes.members[key] = `s${rank}`;
  });
  const order = model.nodes.map((_, i) => i).sort((a, b) => model.nodes[b].influence - model.nodes[a].influence);
  const tokens = order.filter((i) => model.nodes[i].kind === "embedding" && model.nodes[i].influence > 0).slice(0, 3);
  const says = order.filter((i) => model.nodes[i].kind === "logit").sort((a, b) => model.nodes[b].probability - model.nodes[a].probability).slice(0, 2);
  for (const i of [...tokens, ...says]) changes.pins[model.nodes[i].key] = true;
  return changes;
}
