// The list that mirrors the canvas: every shown node, most influential first; one tab stop, arrows inside.

import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { nodeName, nodePlace, number } from "../core/format.js";

export function NodeList({ model, kept, shown, found, chosen, act }) {
  const [most, setMost] = useState(150);
  const box = useRef();
  const order = [];
  for (let i = 0; i < model.n; i++) if (shown[i] && (!found || found.has(i))) order.push(i);
  order.sort((a, b) => model.nodes[b].influence - model.nodes[a].influence);
  const rows = order.slice(0, most);
  const current = rows.includes(chosen) ? chosen : rows[0];

  useEffect(() => {
    if (box.current?.contains(document.activeElement)) box.current.querySelector('[tabindex="0"]')?.focus();
  }, [chosen]);

  const press = (event) => {
    const at = rows.indexOf(current);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (next === undefined || rows[next] === undefined) return;
    event.preventDefault();
    act.choose(rows[next]);
  };
  return html`<p class="soft small">${order.length.toLocaleString("en")} ${found ? "found" : "shown"}, most influential first</p>
    <ul class="nodes" ref=${box} role="listbox" aria-label="Shown nodes" onKeyDown=${press}>
      ${rows.map((i) => {
        const node = model.nodes[i];
        return html`<li key=${node.key} role="option" data-node=${node.key} aria-selected=${String(i === chosen)} tabindex=${i === current ? 0 : -1} class=${i === chosen ? "on" : null} onClick=${() => act.choose(i)}>
          <i class=${`dot ${node.kind}`}></i><span class="name">${nodeName(model, kept, i)}${node.key in kept.pins ? " •" : ""}</span><span class="where">${nodePlace(model, i)}</span><span class="weight">${number(node.influence, 2)}</span></li>`;
      })}</ul>
    ${order.length > most && html`<button class="quiet more" onClick=${() => setMost(most + 500)}>${order.length - most} more</button>`}`;
}
