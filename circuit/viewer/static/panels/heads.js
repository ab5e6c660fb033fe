// The attention heads that what reaches a node went through, where the graph was traced with them.

import { html } from "../vendor/preact.js";
import { nodeName, number } from "../core/format.js";

export function Heads({ model, kept, i, act }) {
  const edges = model.attention?.edges?.filter((edge) => edge.target === model.nodes[i].key).slice(0, 6) ?? [];
  if (!edges.length) return null;
  return html`<h3>Through which heads</h3>${edges.map((edge) => {
    const source = model.byKey.get(edge.source);
    return html`<div class="heads"><button class="quiet" onClick=${() => source !== undefined && act.choose(source)}>from ${source === undefined ? edge.source : nodeName(model, kept, source)}</button>
      ${edge.heads.slice(0, 5).map(({ layer, head, part }) => html`<span class="word">L${layer} H${head}: ${part > 0 ? "+" : "−"}${number(Math.abs(part))}</span>`)}</div>`;
  })}`;
}
