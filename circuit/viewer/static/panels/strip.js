// What the picture shows in one sentence, and what it does not show.

import { html } from "../vendor/preact.js";
import { honestly, sentence } from "../core/model.js";
import { number } from "../core/format.js";

export function Strip({ model, shown, drawn, between, route, act, fixed }) {
  const { scores } = model;
  const masked = model.masked.length ? `${model.masked.length === 1 ? "one token is" : `${model.masked.length} tokens are`} left to the model (grey)` : "";
  const names = [["replacement_score", "replacement score"], ["completeness", "completeness"]];
  const more = model.size.shown < model.size.features && !fixed && !route.big;
  return html`<p class="sentence">${sentence(model, shown)}</p>
    <ul class="strip" aria-label="What is hidden, and how far it can be trusted">
      ${honestly(model, shown, drawn, between).map(([text, warn]) => html`<li class=${warn ? "warn" : null}>${text}</li>`)}
      ${masked && html`<li>${masked}</li>`}
      ${names.filter(([name]) => name in scores).map(([name, text]) => html`<li>${text} <b>${number(scores[name])}</b>${`${name}_ct` in scores ? ` (circuit-tracer’s ${number(scores[`${name}_ct`])})` : ""}</li>`)}
      ${more && html`<li><button class="quiet" onClick=${() => act.go({ big: "1" })}>load up to 5,000 features</button></li>`}
    </ul>`;
}
