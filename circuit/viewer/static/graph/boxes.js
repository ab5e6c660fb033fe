// The subgraph's boxes: named groups and single pinned nodes, what passes between them, and where they stand.

import { nodeName, shorten } from "../core/format.js";

export const BOX_HEIGHT = 44, LEAST = 0.04;

export function boxesOf(model, kept) {
  const groups = new Map(Object.entries(kept.groups).map(([id, name]) => [id, { id, name, members: [], group: true }]));
  const singles = [];
  const missing = [];
  for (const key of Object.keys(kept.pins)) {
    const i = model.byKey.get(key);
    if (i === undefined) missing.push(key);
    else if (groups.has(kept.members[key])) groups.get(kept.members[key]).members.push(i);
    else singles.push({ id: key, name: nodeName(model, kept, i), members: [i], group: false });
  }
  const boxes = [...groups.values(), ...singles].filter((box) => box.members.length);
  for (const box of boxes) describe(model, box);
  return { boxes, missing };
}

function describe(model, box) {
  const nodes = box.members.map((i) => model.nodes[i]);
  const strongest = nodes.reduce((best, node) => (node.influence > best.influence ? node : best), nodes[0]);
  const layers = nodes.map((node) => node.layer);
  const low = Math.min(...layers), high = Math.max(...layers);
  box.kind = strongest.kind;
  box.layer = strongest.kind === "logit" ? model.layers : nodes.reduce((sum, node) => sum + node.layer, 0) / nodes.length;
  box.position = strongest.position;
  box.note = noteOf(box, nodes, strongest, low, high);
  box.width = Math.max(96, Math.min(220, Math.max(7.4 * Math.min(26, box.name.length), 6 * box.note.length) + 22));
}

function noteOf(box, nodes, strongest, low, high) {
  if (strongest.kind === "logit") return `p = ${(100 * strongest.probability).toFixed(0)}%`;
  if (strongest.kind === "embedding") return `token ${strongest.position}`;
  const layers = low === high ? `L${low}` : `L${low}–${high}`;
  return box.members.length > 1 ? `${layers} · ${box.members.length} features` : `${layers} · at ${strongest.position}`;
}

// What passes along single edges from box to box: sums of signed flow, strongest first, none too weak to be seen.
export function flows(model, boxes) {
  const boxOf = new Map(boxes.flatMap((box, b) => box.members.map((i) => [i, b])));
  const sums = new Map();
  for (let link = 0; link < model.source.length; link++) {
    const a = boxOf.get(model.source[link]), b = boxOf.get(model.target[link]);
    if (a === undefined || b === undefined || a === b) continue;
    const key = a * boxes.length + b;
    sums.set(key, (sums.get(key) ?? 0) + Math.sign(model.weight[link]) * model.flow[link]);
  }
  const all = [...sums].map(([key, flow]) => ({ from: Math.floor(key / boxes.length), to: key % boxes.length, flow }));
  all.sort((a, b) => Math.abs(b.flow) - Math.abs(a.flow));
  const most = Math.abs(all[0]?.flow ?? 1);
  const fed = new Set(), feeds = new Set();
  return all.filter((one) => {
    const needed = !fed.has(one.to) || !feeds.has(one.from); // every box keeps its strongest input and output
    fed.add(one.to);
    feeds.add(one.from);
    return needed || Math.abs(one.flow) >= LEAST * most;
  }).map((one) => ({ ...one, size: Math.abs(one.flow) / most }));
}

// Places: by hand where somebody dragged, else by dagre, which is told the flows.
export function arrange(dagre, boxes, edges, places) {
  const graph = new dagre.graphlib.Graph().setGraph({ rankdir: "BT", nodesep: 18, ranksep: 46, marginx: 12, marginy: 12 }).setDefaultEdgeLabel(() => ({}));
  const order = boxes.map((_, b) => b).sort((a, b) => boxes[a].position - boxes[b].position);
  for (const b of order) graph.setNode(String(b), { width: boxes[b].width, height: BOX_HEIGHT });
  for (const { from, to, size } of edges) {
    const upwards = boxes[from].layer <= boxes[to].layer; // groups over several layers may feed each other
    graph.setEdge(String(upwards ? from : to), String(upwards ? to : from), { weight: 1 + Math.round(4 * size) });
  }
  dagre.layout(graph);
  return boxes.map((box, b) => {
    const { x, y } = graph.node(String(b));
    const [px, py] = places[box.id] ?? [x, y];
    return { x: px, y: py };
  });
}

export function bounds(boxes, at) {
  const left = Math.min(...boxes.map((box, b) => at[b].x - box.width / 2)), right = Math.max(...boxes.map((box, b) => at[b].x + box.width / 2));
  const top = Math.min(...at.map(({ y }) => y - BOX_HEIGHT / 2)), bottom = Math.max(...at.map(({ y }) => y + BOX_HEIGHT / 2));
  return { x: left - 14, y: top - 14, width: Math.max(60, right - left + 28), height: Math.max(50, bottom - top + 28) };
}

export function curve(a, b, tall = BOX_HEIGHT / 2) {
  if (a.y - tall < b.y + tall) { // level or against the grain: below both
    const deep = Math.max(a.y, b.y) + tall + 22;
    return `M${a.x} ${a.y + tall}C${a.x} ${deep} ${b.x} ${deep} ${b.x} ${b.y + tall}`;
  }
  const y1 = a.y - tall, y2 = b.y + tall, bend = Math.max(16, (y1 - y2) * 0.5);
  return `M${a.x} ${y1}C${a.x} ${y1 - bend} ${b.x} ${y2 + bend} ${b.x} ${y2}`;
}

export const boxTitle = (box) => shorten(box.name, 28);
