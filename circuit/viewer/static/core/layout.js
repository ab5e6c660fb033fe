// Where nodes stand in the link graph: layers upwards, tokens to the right, all within a given width and height.
// Layers without a shown node take no room; columns are as wide as what stands in them, and squeezed until all fit.

import { token } from "./format.js";

export const LEFT = 46, TOP = 10, LETTER = 6.6;

export function layout(model, shown, width, height) {
  const cells = new Map();
  const used = new Set();
  model.nodes.forEach((node, i) => {
    if (!shown[i] || node.kind === "embedding") return;
    const row = node.kind === "logit" ? model.layers : Math.max(0, node.layer);
    const key = row * 100_000 + node.position;
    if (!cells.has(key)) cells.set(key, { row, position: node.position, members: [] });
    cells.get(key).members.push(i);
    used.add(row);
  });
  for (const cell of cells.values()) cell.members.sort((a, b) => model.nodes[b].influence - model.nodes[a].influence);
  const columns = columnsOf(model, cells, width - LEFT - 12);
  const rows = rowsOf(model, cells, used, columns, height);
  const x = new Float32Array(model.n).fill(NaN), y = new Float32Array(model.n).fill(NaN);
  for (const cell of cells.values()) place(model, cell, columns[cell.position], rows.at.get(cell.row), x, y);
  model.nodes.forEach((node, i) => {
    if (node.kind !== "embedding") return;
    x[i] = columns[node.position].middle;
    y[i] = rows.floor;
  });
  return { x, y, columns, rows: rows.list, floor: rows.floor, width, height };
}

const perNode = (cell, model) => (cell.row === model.layers ? 74 : 15);

function columnsOf(model, cells, room) {
  const wish = model.tokens.map((text) => Math.min(76, LETTER * token(text).length + 14));
  const least = model.tokens.map(() => 12);
  for (const cell of cells.values()) {
    const across = Math.min(cell.members.length, cell.row === model.layers ? 2 : 8);
    wish[cell.position] = Math.max(wish[cell.position], across * perNode(cell, model) + 10);
    least[cell.position] = Math.max(least[cell.position], cell.row === model.layers ? 78 : Math.min(3, across) * 9 + 6);
  }
  let x = LEFT;
  return squeezed(wish, least, room, 3).map((wide) => {
    const column = { middle: x + wide / 2, width: wide, end: LEFT + room + 8 };
    x += wide;
    return column;
  });
}

function rowsOf(model, cells, used, columns, height) {
  const order = [...used].sort((a, b) => b - a);
  const lines = new Map(order.map((row) => [row, 1]));
  for (const cell of cells.values()) {
    lines.set(cell.row, Math.max(lines.get(cell.row), Math.ceil(cell.members.length / perLine(model, cell, columns[cell.position].width))));
  }
  const wish = order.map((row) => (row === model.layers ? 26 * lines.get(row) : 34 + 17 * (lines.get(row) - 1)));
  const least = order.map((row) => (row === model.layers ? 24 * lines.get(row) : 9 + 6 * (lines.get(row) - 1)));
  const tall = squeezed(wish, least, height - TOP - 20, 2.2);
  const at = new Map(), list = [];
  let y = TOP;
  order.forEach((row, rank) => {
    const above = order[rank - 1];
    at.set(row, { y: y + tall[rank] / 2, height: tall[rank] });
    list.push({ layer: row, name: row === model.layers ? "output" : `L${row}`, y: y + tall[rank] / 2, height: tall[rank], skipped: above === undefined ? 0 : above - row - 1 });
    y += tall[rank];
  });
  return { at, list, floor: Math.max(y + 8, height - 9) };
}

// Sizes between the least and the wished for that add up to the room, or less where there is more than enough.
function squeezed(wish, least, room, most) {
  const sum = (list) => list.reduce((total, one) => total + one, 0);
  const wished = sum(wish), needed = sum(least);
  if (wished <= room) return wish.map((one) => one * Math.min(most, room / wished));
  if (needed >= room) return least.map((one) => (one * room) / needed);
  const part = (room - needed) / (wished - needed);
  return wish.map((one, i) => least[i] + part * (one - least[i]));
}

function perLine(model, cell, width) {
  return Math.max(1, Math.min(cell.row === model.layers ? 2 : 9, Math.floor((width - 2) / (perNode(cell, model) * 0.8))));
}

function place(model, cell, column, row, x, y) {
  const each = perLine(model, cell, column.width);
  const count = Math.ceil(cell.members.length / each);
  const step = Math.min(perNode(cell, model) * 1.15, (column.width - 4) / Math.min(each, cell.members.length));
  const rise = Math.min(cell.row === model.layers ? 26 : 17, (row.height - 4) / count);
  cell.members.forEach((i, rank) => {
    const line = Math.floor(rank / each);
    const inLine = Math.min(each, cell.members.length - line * each);
    x[i] = column.middle + ((rank % each) - (inLine - 1) / 2) * step;
    if (cell.row === model.layers) x[i] = Math.min(x[i], column.end - 40); // an answer's box stays within the picture
    y[i] = row.y + (line - (count - 1) / 2) * rise;
  });
}

// The next node in a direction from one, for the arrow keys; along a row first, then the nearest row.
export function neighbour(at, shown, from, dx, dy) {
  let best = -1, least = Infinity;
  for (let i = 0; i < at.x.length; i++) {
    if (i === from || !shown[i] || Number.isNaN(at.x[i])) continue;
    const across = at.x[i] - at.x[from], up = at.y[i] - at.y[from];
    const ahead = dx * across + dy * up, aside = Math.abs(dy * across) + Math.abs(dx * up);
    if (ahead <= 0.5) continue;
    const cost = ahead + (dx ? 6 : 0.35) * aside;
    if (cost < least) { least = cost; best = i; }
  }
  return best;
}
