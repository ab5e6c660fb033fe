// What can be taken away: the link graph or the subgraph as SVG or PNG, the graph as Neuronpedia's JSON, qParams.

import { html, useState } from "../vendor/preact.js";
import { layout } from "../core/layout.js";
import { token } from "../core/format.js";
import { paintBase, paintNames, paintOver, palette, FONT } from "../graph/paint.js";
import { Recorder } from "../graph/recorder.js";

const STYLES = ["fill", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "font-size", "font-weight", "text-anchor", "fill-opacity", "opacity"];

export function Exports({ model, run, slug, step, scene, act, fixed }) {
  const save = async (kind) => {
    if (kind === "subgraph.svg") return download(subgraphSvg(), `${slug}-subgraph.svg`, "image/svg+xml");
    if (kind === "subgraph.png") return download(await toPng(subgraphSvg()), `${slug}-subgraph.png`);
    const svg = graphSvg(model, scene());
    if (kind === "graph.svg") return download(svg, `${slug}.svg`, "image/svg+xml");
    return download(await toPng(svg), `${slug}.png`);
  };
  const item = (kind, text) => html`<button class="item" onClick=${(event) => { event.target.closest("details").open = false; save(kind).catch((error) => act.say(error.message)); }}>${text}</button>`;
  const [pasting, setPasting] = useState(null);
  return html`<details class="menu"><summary>Export</summary><div class="items">
    ${item("graph.svg", "Link graph as SVG")}${item("graph.png", "Link graph as PNG")}
    ${item("subgraph.svg", "Subgraph as SVG")}${item("subgraph.png", "Subgraph as PNG")}
    ${!fixed && html`<a class="item" href=${`/api/neuronpedia?${new URLSearchParams({ run, slug, step })}`} download>Neuronpedia JSON, with pins and groups</a>
      ${pasting === null
        ? html`<button class="item" onClick=${() => setPasting("")}>Take over qParams…</button>`
        : html`<form onSubmit=${(event) => { event.preventDefault(); act.takeQParams(pasting); setPasting(null); }}>
            <textarea rows="3" aria-label="qParams or an address of Neuronpedia" placeholder="qParams as JSON, or a Neuronpedia address" value=${pasting} onInput=${(event) => setPasting(event.target.value)}></textarea><button class="plain" type="submit">Take over</button></form>`}`}
  </div></details>`;
}

// The whole link graph, painted once more at a size of its own, its tokens below.
export function graphSvg(model, scene) {
  const width = 1400, height = 760, strip = 90;
  const measurer = document.createElement("canvas").getContext("2d");
  const recorder = new Recorder(width, height + strip, (text, font) => { measurer.font = font; return measurer.measureText(text); });
  const at = layout(model, scene.shown, width, height);
  const whole = { ...scene, at, zoom: { k: 1, x: 0, y: 0 }, width, height, mostNames: 60, near: null, colors: palette(document.documentElement) };
  recorder.fillStyle = whole.colors.card;
  recorder.fillRect(0, 0, width, height + strip);
  paintBase(recorder, whole);
  if (scene.chosen >= 0) paintOver(recorder, whole, scene.chosen, true);
  paintNames(recorder, whole, null);
  recorder.font = `12px ${FONT}`;
  recorder.fillStyle = whole.colors.ink;
  recorder.textAlign = "right";
  model.tokens.forEach((text, position) => recorder.rotatedText(token(text), at.columns[position].middle + 3, height + 12, -40));
  return recorder.svg(`Attribution graph: ${model.prompt}`);
}

// The subgraph as it stands, its style written into it.
export function subgraphSvg() {
  const drawn = document.querySelector("svg.boxes");
  if (!drawn) throw new Error("nothing is pinned yet");
  const copy = drawn.cloneNode(true);
  const from = [drawn, ...drawn.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
  from.forEach((element, n) => {
    const style = getComputedStyle(element);
    for (const name of STYLES) to[n].setAttribute(name, style.getPropertyValue(name));
    for (const name of ["class", "style", "tabindex", "role", "data-box", "aria-pressed"]) to[n].removeAttribute(name);
  });
  const [x, y, width, height] = drawn.getAttribute("viewBox").split(" ").map(Number);
  const paper = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ x, y, width, height, fill: palette(document.documentElement).card })) paper.setAttribute(name, value);
  copy.prepend(paper);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.setAttribute("font-family", "sans-serif");
  return new XMLSerializer().serializeToString(copy);
}

async function toPng(svg) {
  const image = new Image();
  const url = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  try {
    image.src = url;
    await image.decode();
  } finally { URL.revokeObjectURL(url); }
  const canvas = Object.assign(document.createElement("canvas"), { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done, fail) => canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("no PNG could be made"))), "image/png"));
}

function download(content, name, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
