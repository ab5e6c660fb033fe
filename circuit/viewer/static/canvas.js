// Nodes by layer (upwards) and position (to the right); edges between those that are shown.

import { svg, token } from "./dom.js";

const ROW = 54, STEP = 17, RULER = 66, PAD = 22, CHIP = 26, WIDE = 9;

export function nodeName(data, node) {
  if (node.kind === "embedding") return `“${token(data.tokens[node.position])}”`;
  if (node.kind === "logit") return `says “${token(node.label)}”`;
  if (node.kind === "error") return "error";
  return node.label || (node.kind === "feature" ? `feature ${node.index}` : node.kind);
}

export function drawGraph(data, linksOf, state, choose) {
  const shown = visible(data, linksOf, state);
  const place = positions(data, shown);
  const lit = neighbours(data, linksOf, state, shown);
  const { width, height, rows } = place;
  const picture = svg("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "attribution graph" });
  rows.forEach(([name, y]) => picture.append(
    svg("line", { class: "guide", x1: RULER - 8, x2: width - 8, y1: y, y2: y }),
    svg("text", { class: "rule", x: 10, y: y + 4 }, name)));
  picture.append(svg("g", {}, links(data, linksOf, state, place, lit)));
  data.nodes.forEach((node, i) => {
    if (place.at[i]) picture.append(mark(data, node, i, place.at[i], state, lit, choose));
  });
  return picture;
}

function visible(data, linksOf, state) {
  const group = data.supernodes.find((one) => one.name === state.group);
  const always = new Set([...(group?.members ?? []), ...(state.chosen === null ? [] : [state.chosen])]);
  return data.nodes.map((node, i) => {
    if (always.has(i)) return true;
    if (node.kind === "logit" || node.kind === "embedding") return true;
    if (node.kind === "error") return state.errors && node.share <= state.share;
    if (node.kind === "bias" || node.kind === "position") return state.biases && node.share <= state.share;
    return node.share <= state.share;
  });
}

// A cell holds its nodes side by side, up to WIDE in a line; a row is as tall as its fullest cell.
function positions(data, shown) {
  const cells = new Map();
  data.nodes.forEach((node, i) => {
    if (!shown[i] || node.kind === "embedding") return;
    const row = node.kind === "logit" ? data.layers : Math.max(0, node.layer);
    const key = `${row}/${node.position}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  });
  const lines = new Array(data.layers + 1).fill(1);
  const wide = data.tokens.map((text) => Math.max(28, 7.4 * token(text).length + 14));
  for (const [key, members] of cells) {
    const [row, position] = key.split("/").map(Number);
    members.sort((a, b) => data.nodes[b].influence - data.nodes[a].influence);
    const step = row === data.layers ? 92 : STEP;
    const perLine = row === data.layers ? 2 : WIDE;
    lines[row] = Math.max(lines[row], Math.ceil(members.length / perLine));
    wide[position] = Math.max(wide[position], Math.min(members.length, perLine) * step);
  }
  let x = RULER + PAD;
  const columns = wide.map((width) => { const middle = x + width / 2; x += width + 10; return { middle, width }; });
  const rowHeight = lines.map((count) => Math.max(ROW, 26 + count * 24));
  const height = rowHeight.reduce((sum, one) => sum + one, 0) + CHIP + 2 * PAD;
  const rows = [];
  let y = height - CHIP - PAD;
  const rowAt = rowHeight.map((tall, row) => {
    y -= tall;
    rows.push([row === data.layers ? "output" : `layer ${row}`, y + tall / 2]);
    return y + tall / 2;
  });
  const at = new Array(data.nodes.length);
  for (const [key, members] of cells) {
    const [row, position] = key.split("/").map(Number);
    const step = row === data.layers ? 92 : STEP;
    const perLine = row === data.layers ? 2 : WIDE;
    const count = Math.ceil(members.length / perLine);
    members.forEach((i, rank) => {
      const line = Math.floor(rank / perLine);
      const inLine = Math.min(perLine, members.length - line * perLine);
      at[i] = { x: columns[position].middle + ((rank % perLine) - (inLine - 1) / 2) * step, y: rowAt[row] + (line - (count - 1) / 2) * 24 };
    });
  }
  data.nodes.forEach((node, i) => {
    if (node.kind === "embedding") at[i] = { x: columns[node.position].middle, y: height - PAD - CHIP / 2 };
  });
  return { at, rows, width: x + PAD, height };
}

// What is looked at: the chosen node and its neighbours, a group, or what a search finds.
function neighbours(data, linksOf, state, shown) {
  const near = new Set();
  if (state.chosen !== null) {
    for (const link of linksOf[state.chosen].in) near.add(data.links[link][0]);
    for (const link of linksOf[state.chosen].out) near.add(data.links[link][1]);
  }
  const found = new Set();
  const group = data.supernodes.find((one) => one.name === state.group);
  for (const i of group?.members ?? []) found.add(i);
  if (state.text) {
    data.nodes.forEach((node, i) => {
      if (shown[i] && nodeName(data, node).toLowerCase().includes(state.text)) found.add(i);
    });
  }
  return { near, found, any: state.chosen !== null || found.size > 0 || state.text !== "" };
}

function links(data, linksOf, state, place, lit) {
  const chosen = state.chosen;
  const mine = chosen === null ? [] : [...linksOf[chosen].in, ...linksOf[chosen].out];
  const both = (link) => place.at[data.links[link][0]] && place.at[data.links[link][1]];
  const quiet = [];
  for (let link = 0; link < data.links.length && quiet.length < state.links; link++) if (both(link)) quiet.push(link);
  const loud = mine.filter(both).slice(0, 200);
  const most = Math.max(...loud.map((link) => Math.abs(data.links[link][2])), 1e-30);
  return [
    ...quiet.map((link) => curve(data, link, place, "", 0.6 + 2.4 * Math.sqrt(data.links[link][3]), lit.any ? 0.1 : 0.16 + 0.5 * Math.sqrt(data.links[link][3]))),
    ...loud.map((link) => {
      const size = Math.abs(data.links[link][2]) / most;
      return curve(data, link, place, data.links[link][1] === chosen ? "in" : "out", 0.8 + 4 * size, 0.25 + 0.7 * size);
    }),
  ];
}

function curve(data, link, place, kind, width, opacity) {
  const [source, target, weight] = data.links[link];
  const a = place.at[source], b = place.at[target];
  const bend = Math.max(16, (a.y - b.y) * 0.45);
  return svg("path", {
    class: `link ${kind} ${weight < 0 && kind ? "minus" : ""}`,
    d: `M${a.x} ${a.y - 6}C${a.x} ${a.y - bend} ${b.x} ${b.y + bend} ${b.x} ${b.y + 6}`,
    "stroke-width": width.toFixed(2), "stroke-opacity": opacity.toFixed(2),
  });
}

function chip(text) {
  const bare = token(text);
  const width = Math.max(24, 7.4 * bare.length + 10);
  return [
    svg("rect", { class: "shape", x: -width / 2, y: -CHIP / 2, width, height: CHIP, rx: 7 }),
    svg("text", { y: 4 }, bare),
  ];
}

function mark(data, node, i, { x, y }, state, lit, choose) {
  const classes = ["node", node.kind];
  if (i === state.chosen) classes.push("chosen");
  else if (lit.near.has(i) || lit.found.has(i)) classes.push("near");
  else if (lit.any) classes.push("faded");
  return svg("g", {
    class: classes.join(" "), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, tabindex: 0, role: "button",
    "data-node": i, "aria-label": `${nodeName(data, node)}, ${node.kind}`,
    onclick: () => choose(i),
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(i); } },
  }, svg("title", {}, title(data, node)), ...shape(data, node));
}

function title(data, node) {
  return `${nodeName(data, node)}\n${node.kind}${node.layer >= 0 ? `, layer ${node.layer}` : ""}, “${token(data.tokens[node.position])}”`;
}

function shape(data, node) {
  if (node.kind === "logit") {
    const text = token(node.label).slice(0, 11);
    return [svg("rect", { class: "shape", x: -42, y: -12, width: 84, height: 24, rx: 7, "fill-opacity": 0.3 }), svg("text", { y: 4 }, text)];
  }
  if (node.kind === "embedding") return chip(data.tokens[node.position]);
  if (node.kind === "feature") return [svg("circle", { class: "shape", r: (4 + 3.5 * Math.sqrt(1 - Math.min(1, node.share))).toFixed(1) })];
  return [svg("path", { class: "shape", d: "M0 -5.5L5.5 0L0 5.5L-5.5 0Z" })];
}
