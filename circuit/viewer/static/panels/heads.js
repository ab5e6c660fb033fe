// The attention heads that an edge into a node goes through, found by the model when asked.

import { html } from "../vendor/preact.js";
import { nodeName, number } from "../core/format.js";
import { strongest } from "../core/model.js";

export function Heads({ model, kept, i, heads, act }) {
  if (!model.live || !["feature", "logit"].includes(model.nodes[i].kind)) return null;
  const sources = strongest(model, model.into, i).map((link) => model.source[link]).filter((source) => !["bias"].includes(model.nodes[source].kind)).slice(0, 5);
  if (!sources.length) return null;
  const own = heads?.target === model.nodes[i].key ? heads : null;
  return html`<h3>Through which heads</h3>
    <div class="words">${sources.map((source) => html`<button class="plain" key=${source} aria-pressed=${String(own?.source === model.nodes[source].key)} onClick=${() => act.findHeads(i, source)}>from ${nodeName(model, kept, source)}</button>`)}</div>
    ${own && (own.problem ? html`<p class="soft">${own.problem}</p>` : own.answer === null ? html`<p class="soft">asking the model…</p>`
      : own.answer.heads.length === 0 ? html`<p class="soft">no attention lies between the two</p>`
      : html`<ul class="edges">${own.answer.heads.slice(0, 8).map(({ layer, head, part }) => html`<li key=${`${layer}/${head}`} class="headrow"><span>layer ${layer}, head ${head}</span>
        <span class="meter"><i class=${part < 0 ? "minus" : ""} style=${{ width: `${Math.max(3, (100 * Math.abs(part)) / Math.abs(own.answer.heads[0].part))}%` }}></i></span><span class="weight">${part > 0 ? "+" : "−"}${number(Math.abs(part))}</span></li>`)}</ul>
        <p class="soft small">of ${number(own.answer.value)}; the layers’ splits are alternatives, not parts of one sum</p>`)}`;
}
