// The link graph on a canvas (or on what records a canvas's calls as SVG). Places scale with the zoom, marks and text
// do not: at any zoom a node can be told and hit.

import { token, shorten, nodeName } from "../core/format.js";
import { linksAt } from "../core/model.js";
import { LEFT } from "../core/layout.js";

export const FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
const WIDTHS = 5;

export function palette(element) {
  const style = getComputedStyle(element);
  const names = ["paper", "card", "ink", "soft", "line", "guide", "positive", "negative", "feature", "error", "logit", "embedding", "bias", "accent", "kept"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

export const radius = (node, zoom = 1) => (3.2 + 4.2 * Math.sqrt(1 - Math.min(1, node.share))) * Math.min(1.6, Math.sqrt(zoom));
export const seen = (at, zoom, i) => [at.x[i] * zoom.k + zoom.x, at.y[i] * zoom.k + zoom.y];

// Guides, the strongest edges, and all shown nodes. `near` holds what a search found; all else fades then.
export function paintBase(ctx, scene) {
  ctx.fillStyle = scene.colors.card;
  ctx.fillRect(0, 0, scene.width, scene.height);
  guides(ctx, scene);
  ctx.globalAlpha = scene.near ? 0.25 : 1;
  edges(ctx, scene, scene.quiet, 1.8, scene.near ? 0.5 : 1);
  ctx.globalAlpha = 1;
  for (const i of scene.order) mark(ctx, scene, i, scene.near && !scene.near.has(i) ? 0.28 : 1);
}

// What is hovered: its edges over everything else, and their other ends, which it gives.
export function paintOver(ctx, scene, i, strong = false) {
  ctx.clearRect(0, 0, scene.width, scene.height);
  if (i < 0 || Number.isNaN(scene.at.x[i])) return new Set();
  const { model } = scene;
  const own = [...linksAt(model.into, i), ...linksAt(model.outOf, i)].filter((link) => drawable(scene, link));
  own.sort((a, b) => Math.abs(model.weight[b]) - Math.abs(model.weight[a]));
  edges(ctx, scene, own.slice(0, 200).reverse(), 4.5, 1.6, true);
  const ends = new Set(own.map((link) => (model.source[link] === i ? model.target[link] : model.source[link])));
  for (const end of ends) mark(ctx, scene, end, 1);
  mark(ctx, scene, i, 1);
  ring(ctx, scene, i, scene.colors.ink, strong ? 3 : 2, 3);
  return ends.add(i);
}

// What is chosen, and names: of what is near it or was found, else of all. The rest fades below without being painted anew.
export function paintChosen(ctx, scene, i) {
  const near = paintOver(ctx, scene, i, true);
  paintNames(ctx, scene, scene.near ?? (near.size ? near : null));
}

export function paintNames(ctx, scene, near) {
  names(ctx, scene, near ? scene.order.filter((i) => near.has(i)) : scene.order, near ? 40 : scene.mostNames);
  if (scene.at.rows.length) ruler(ctx, scene);
}

const drawable = ({ model, shown }, link) => shown[model.source[link]] && shown[model.target[link]];

function guides(ctx, { at, zoom, colors, width }) {
  ctx.strokeStyle = colors.guide;
  ctx.lineWidth = 1;
  for (const row of at.rows) {
    const y = row.y * zoom.k + zoom.y;
    ctx.beginPath();
    ctx.moveTo(LEFT - 6, y);
    ctx.lineTo(width - 6, y);
    ctx.stroke();
  }
}

// Layer names stay in sight at the left, whatever is zoomed to; they thin out where rows are narrow.
function ruler(ctx, { at, zoom, colors, height }) {
  ctx.fillStyle = colors.card;
  ctx.fillRect(0, 0, LEFT - 8, height);
  ctx.font = `11px ${FONT}`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  ctx.fillStyle = colors.soft;
  let last = -Infinity;
  for (const row of at.rows) {
    const y = row.y * zoom.k + zoom.y;
    if (y - last < 12 || y < 4 || y > height - 4) continue;
    ctx.fillText(row.name, 8, y);
    last = y;
  }
}

// Edges in a few bundles of equal width and sign: one stroke a bundle, however many there are.
function edges(ctx, scene, links, thick, strength, byWeight = false) {
  const { model, zoom, at, colors } = scene;
  let most = 1e-30;
  if (byWeight) for (const link of links) most = Math.max(most, Math.abs(model.weight[link]));
  const bundles = Array.from({ length: 2 * WIDTHS }, () => []);
  for (const link of links) {
    const size = byWeight ? Math.abs(model.weight[link]) / most : Math.sqrt(model.flow[link]);
    bundles[Math.min(WIDTHS - 1, Math.floor(size * WIDTHS)) + (model.weight[link] < 0 ? WIDTHS : 0)].push(link);
  }
  const whole = ctx.globalAlpha;
  bundles.forEach((bundle, number) => {
    if (!bundle.length) return;
    const size = ((number % WIDTHS) + 0.5) / WIDTHS;
    ctx.strokeStyle = number < WIDTHS ? colors.positive : colors.negative;
    ctx.setLineDash(number < WIDTHS ? [] : [5, 4]);
    ctx.lineWidth = 0.5 + thick * size;
    ctx.globalAlpha = whole * Math.min(0.95, strength * (0.1 + 0.5 * size));
    ctx.beginPath();
    for (const link of bundle) {
      const [x1, y1] = seen(at, zoom, model.source[link]), [x2, y2] = seen(at, zoom, model.target[link]);
      const bend = Math.max(10, Math.abs(y1 - y2) * 0.42);
      ctx.moveTo(x1, y1);
      ctx.bezierCurveTo(x1, y1 - bend, x2, y2 + bend, x2, y2);
    }
    ctx.stroke();
  });
  ctx.globalAlpha = whole;
  ctx.setLineDash([]);
}

function mark(ctx, scene, i, alpha) {
  const { model, at, zoom, colors, kept } = scene;
  if (Number.isNaN(at.x[i]) || !scene.shown[i]) return;
  const node = model.nodes[i], [x, y] = seen(at, zoom, i);
  if (x < -60 || x > scene.width + 60 || y < -30 || y > scene.height + 30) return;
  ctx.globalAlpha = alpha;
  ctx.strokeStyle = colors.card;
  ctx.lineWidth = 1.2;
  if (node.kind === "logit") box(ctx, scene, i, x, y);
  else if (node.kind === "embedding") {
    ctx.fillStyle = colors.embedding;
    ctx.beginPath();
    ctx.roundRect(x - 4, y - 3, 8, 6, 2);
    ctx.fill();
  } else {
    const r = radius(node, zoom.k) * (node.kind === "feature" ? 1 : 0.85);
    ctx.fillStyle = scene.alone?.has(i) ? colors.negative : colors[node.kind] ?? colors.bias; // what only this one of two graphs has
    ctx.beginPath();
    if (node.kind === "feature") ctx.arc(x, y, r, 0, 7);
    else if (node.kind === "error" || node.kind === "kept") shape(ctx, [[x, y - r], [x + r, y], [x, y + r], [x - r, y]]);
    else shape(ctx, [[x - r, y + r], [x, y - r], [x + r, y + r]]);
    ctx.fill();
    ctx.stroke();
  }
  if (scene.own && node.key in kept.pins) ring(ctx, scene, i, colors.accent, 2, 2.5);
  ctx.globalAlpha = 1;
}

function shape(ctx, corners) {
  corners.forEach(([x, y], place) => (place ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.closePath();
}

function box(ctx, { model, colors }, i, x, y) {
  const node = model.nodes[i];
  ctx.font = `600 12px ${FONT}`;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  const text = shorten(token(node.label), 12);
  const wide = Math.max(30, ctx.measureText(text).width + 14);
  ctx.fillStyle = colors.card;
  ctx.beginPath();
  ctx.roundRect(x - wide / 2, y - 10, wide, 20, 6);
  ctx.fill();
  ctx.strokeStyle = colors.logit;
  ctx.lineWidth = 1 + 2 * Math.min(1, node.probability);
  ctx.stroke();
  ctx.fillStyle = colors.ink;
  ctx.fillText(text, x, y + 0.5);
}

function ring(ctx, { model, at, zoom }, i, color, width, gap) {
  const node = model.nodes[i], [x, y] = seen({ x: at.x, y: at.y }, zoom, i);
  ctx.strokeStyle = color;
  ctx.lineWidth = width;
  ctx.beginPath();
  if (node.kind === "logit") ctx.roundRect(x - 42, y - 13, 84, 26, 8);
  else ctx.arc(x, y, radius(node, zoom.k) + gap, 0, 7);
  ctx.stroke();
}

// Names of the most influential nodes, each where it covers no other name and no other strong node.
function names(ctx, scene, order, most) {
  const { model, at, zoom, colors, kept } = scene;
  ctx.font = `11.5px ${FONT}`;
  ctx.textBaseline = "middle";
  ctx.textAlign = "left";
  const taken = [];
  const strong = order.filter((i) => model.nodes[i].kind !== "embedding").slice(-Math.max(0, most)).reverse();
  for (const i of strong.slice(0, 30)) { const [x, y] = seen(at, zoom, i); taken.push([x - 5, y - 5, x + 5, y + 5]); }
  for (const i of model.nodes.keys()) {
    if (model.nodes[i].kind !== "logit" || !scene.shown[i]) continue;
    const [x, y] = seen(at, zoom, i);
    taken.push([x - 38, y - 11, x + 38, y + 11]);
  }
  let written = 0;
  for (const i of strong) {
    const node = model.nodes[i];
    if (node.kind === "logit" || written === most) continue;
    const text = shorten(nodeName(model, kept, i), 26), wide = ctx.measureText(text).width;
    const [x, y] = seen(at, zoom, i), r = radius(node, zoom.k) + 3;
    const spots = [[x + r, y], [x - r - wide, y], [x - wide / 2, y - r - 6], [x - wide / 2, y + r + 7]];
    const spot = spots.find(([left, middle]) => left > LEFT - 4 && left + wide < scene.width - 2 && middle > 6 && middle < scene.height - 6
      && !taken.some(([a, b, c, d]) => left < c && left + wide > a && middle - 7 < d && middle + 7 > b && !(Math.abs((a + c) / 2 - x) < 1 && Math.abs((b + d) / 2 - y) < 1)));
    if (!spot) continue;
    written += 1;
    taken.push([spot[0], spot[1] - 7, spot[0] + wide, spot[1] + 7]);
    ctx.globalAlpha = 0.8;
    ctx.fillStyle = colors.card;
    ctx.fillRect(spot[0] - 1.5, spot[1] - 7, wide + 3, 14);
    ctx.globalAlpha = 1;
    ctx.fillStyle = node.label || kept.labels[`${node.layer}/${node.index}`] ? colors.ink : colors.soft;
    ctx.fillText(text, spot[0], spot[1]);
  }
}

// The node at a point, within 12 px: a target of 24.
export function nodeAt({ model, at, shown, zoom }, px, py) {
  let best = -1, least = 12 * 12;
  for (let i = 0; i < model.n; i++) {
    if (!shown[i]) continue;
    const dx = at.x[i] * zoom.k + zoom.x - px, dy = at.y[i] * zoom.k + zoom.y - py;
    const wide = model.nodes[i].kind === "logit" && Math.abs(dx) < 36 && Math.abs(dy) < 11;
    const distance = wide ? 0 : dx * dx + dy * dy;
    if (distance < least) { least = distance; best = i; }
  }
  return best;
}

// The edge of the chosen node nearest to a point, within 5 px.
export function linkAt(scene, chosen, px, py) {
  const { model, at, zoom } = scene;
  let best = -1, least = 5;
  for (const link of [...linksAt(model.into, chosen), ...linksAt(model.outOf, chosen)]) {
    if (!drawable(scene, link)) continue;
    const [x1, y1] = seen(at, zoom, model.source[link]), [x2, y2] = seen(at, zoom, model.target[link]);
    const bend = Math.max(10, Math.abs(y1 - y2) * 0.42);
    for (let step = 1; step < 24; step++) {
      const t = step / 24, u = 1 - t;
      const x = u * u * (u + 3 * t) * x1 + t * t * (t + 3 * u) * x2;
      const y = u * u * u * y1 + 3 * u * u * t * (y1 - bend) + 3 * u * t * t * (y2 + bend) + t * t * t * y2;
      const distance = Math.hypot(x - px, y - py);
      if (distance < least) { least = distance; best = link; }
    }
  }
  return best;
}
