// The subgraph: pinned nodes as boxes, grouped into named supernodes, laid out by themselves and dragged as one likes.

import { html, useEffect, useMemo, useRef, useState } from "../vendor/preact.js";
import { drag, select } from "../vendor/d3.js";
import dagre from "../vendor/dagre.js";
import { arrange, bounds, BOX_HEIGHT, boxesOf, boxTitle, curve, flows } from "./boxes.js";
import { percent } from "../core/format.js";
import { group, ungroup, unpin, clear } from "../core/edits.js";

export function Subgraph({ model, kept, own, picked, act, marks }) {
  const svg = useRef();
  const { boxes, missing } = useMemo(() => boxesOf(model, kept), [model, kept]);
  const edges = useMemo(() => flows(model, boxes), [model, boxes]);
  const settled = useMemo(() => (boxes.length ? arrange(dagre, boxes, edges, kept.places) : []), [boxes, edges, kept.places]);
  const [moved, setMoved] = useState(null);
  const at = moved ? settled.map((spot, b) => (boxes[b].id === moved.id ? moved : spot)) : settled;
  const view = useMemo(() => (boxes.length ? bounds(boxes, settled) : { x: 0, y: 0, width: 300, height: 120 }), [boxes, settled]);

  useEffect(() => {
    const behaviour = drag().clickDistance(4).container(() => svg.current)
      .subject(function () { const b = boxes.findIndex((box) => box.id === this.dataset.box); return { ...settled[b] }; })
      .on("drag", function (event) { setMoved({ id: this.dataset.box, x: event.x, y: event.y }); })
      .on("end", function (event) {
        setMoved(null);
        const b = boxes.findIndex((box) => box.id === this.dataset.box);
        if (b >= 0 && Math.hypot(event.x - settled[b].x, event.y - settled[b].y) > 4) {
          act.edit({ places: { [this.dataset.box]: [Math.round(event.x), Math.round(event.y)] } }, "box moved");
        }
      });
    select(svg.current).selectAll("[data-box]").call(behaviour);
  }, [boxes, settled]);

  const chosen = new Set(picked);
  const pick = (event, id) => {
    const more = event.shiftKey || event.ctrlKey || event.metaKey;
    act.pick(more ? (chosen.has(id) ? picked.filter((one) => one !== id) : [...picked, id]) : chosen.has(id) && picked.length === 1 ? [] : [id]);
    const box = boxes.find((one) => one.id === id);
    if (!more && box) act.choose(box.members.reduce((best, i) => (model.nodes[i].influence > model.nodes[best].influence ? i : best)));
  };
  return html`<section class="subgraph" aria-label="Subgraph">
    <${Tools} ...${{ model, kept, boxes, picked, act, own, missing }} />
    ${boxes.length === 0
      ? html`<p class="empty">Pin nodes (<kbd>p</kbd>, or shift-click) and they stand here; group them and give them names.</p>`
      : html`<div class="scrolled"><svg ref=${svg} class="boxes" viewBox=${`${view.x} ${view.y} ${view.width} ${view.height}`} style=${{ maxHeight: `${Math.max(150, view.height * 1.1)}px`, minWidth: `${Math.round(0.5 * view.width)}px` }} preserveAspectRatio="xMidYMid meet">
        ${edges.map((edge) => html`<path key=${`${boxes[edge.from].id}>${boxes[edge.to].id}`} class=${edge.flow < 0 ? "flow minus" : "flow"} d=${curve(at[edge.from], at[edge.to])}
          stroke-width=${(1 + 6 * Math.sqrt(edge.size)).toFixed(1)} stroke-opacity=${(0.2 + 0.6 * Math.sqrt(edge.size)).toFixed(2)}><title>${boxes[edge.from].name} → ${boxes[edge.to].name}: ${edge.flow > 0 ? "+" : "−"}${Math.abs(edge.flow).toPrecision(2)}</title></path>`)}
        ${boxes.map((box, b) => html`<${Box} key=${box.id} ...${{ box, spot: at[b], picked: chosen.has(box.id), pick, mark: marks?.[box.id] }} />`)}
      </svg></div>`}
  </section>`;
}

function Box({ box, spot, picked, pick, mark }) {
  const x = -box.width / 2, y = -BOX_HEIGHT / 2;
  const cards = Array.from({ length: Math.min(3, box.members.length) }, (_, back) => back).reverse();
  const key = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(event, box.id); } };
  return html`<g class=${`box ${box.kind}${picked ? " picked" : ""}`} data-box=${box.id} transform=${`translate(${spot.x.toFixed(1)} ${spot.y.toFixed(1)})`}
    role="button" tabindex="0" aria-pressed=${String(picked)} aria-label=${`${box.name}, ${box.note}${mark === undefined ? "" : `, ${percent(mark)} of before`}`} onClick=${(event) => pick(event, box.id)} onKeyDown=${key}>
    ${cards.map((back) => html`<rect x=${x + 4 * back} y=${y - 4 * back} width=${box.width} height=${BOX_HEIGHT} rx="10" />`)}
    <text class="name" y="-3">${boxTitle(box)}</text>
    <text class="note" y="13">${mark === undefined ? box.note : `${percent(mark)} of before`}</text>
    ${mark !== undefined && html`<rect class="level" x=${x + 8} y=${y + BOX_HEIGHT - 6} width=${(box.width - 16) * Math.max(0, Math.min(1, mark))} height="3" rx="1.5" />`}
  </g>`;
}

function Tools({ model, kept, boxes, picked, act, own, missing }) {
  const [naming, setNaming] = useState(null);
  const some = boxes.filter((box) => picked.includes(box.id));
  const keys = some.flatMap((box) => box.members.map((i) => model.nodes[i].key));
  const one = some.length === 1 && some[0].group ? some[0] : null;
  const start = () => setNaming({ name: one ? one.name : some[0]?.name ?? "", id: one ? one.id : null });
  const finish = () => {
    const name = naming.name.trim();
    if (name && naming.id) act.edit({ groups: { [naming.id]: name } }, `renamed to ${name}`);
    else if (name && keys.length) {
      const id = `g${Date.now().toString(36)}`;
      act.edit(group(id, name, keys), `grouped as ${name}`);
      act.pick([id]);
    }
    setNaming(null);
  };
  return html`<div class="tools">
    <h2>Subgraph</h2>
    ${!own && boxes.length > 0 && html`<span class="soft">suggested; your first edit makes it yours</span>`}
    ${missing.length > 0 && html`<span class="soft">${missing.length} pinned ${missing.length === 1 ? "node is" : "nodes are"} not in what the page holds</span>`}
    <span class="grow"></span>
    ${naming
      ? html`<form onSubmit=${(event) => { event.preventDefault(); finish(); }}>
          <input aria-label="name of the supernode" value=${naming.name} maxlength="200" ref=${(input) => input && !input.dataset.seen && (input.dataset.seen = "1", input.select())} onInput=${(event) => setNaming({ ...naming, name: event.target.value })} onKeyDown=${(event) => { if (event.key === "Escape") setNaming(null); }} />
          <button class="plain" type="submit">Keep</button></form>`
      : html`
        ${some.length > 0 && html`<span class="soft">${some.length} chosen</span>`}
        ${keys.length > 0 && !one && html`<button class="plain" onClick=${start}>Group…</button>`}
        ${one && html`<button class="plain" onClick=${start}>Rename…</button><button class="plain" onClick=${() => act.edit(ungroup(kept, one.id), `ungrouped ${one.name}`)}>Ungroup</button>`}
        ${keys.length > 0 && html`<button class="plain" onClick=${() => { act.edit(unpin(kept, keys), "unpinned"); act.pick([]); }}>Unpin</button>`}
        ${some.length === 0 && boxes.length > 0 && html`<button class="plain" onClick=${() => act.edit({ places: Object.fromEntries(Object.keys(kept.places).map((key) => [key, null])) }, "laid out anew")} disabled=${Object.keys(kept.places).length === 0}>Lay out</button>
          <button class="plain" onClick=${() => act.edit(clear(kept), "cleared the subgraph")}>Clear</button>`}`}
  </div>`;
}
