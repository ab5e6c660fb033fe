// A feature by itself.

import { html } from "../vendor/preact.js";
import { labelSource } from "../core/format.js";
import { Dashboard } from "../panels/dashboard.js";

export function FeaturePage({ route, feature, act }) {
  const layer = Number(route.layer) || 0, index = Number(route.feature) || 0;
  const answer = feature?.key === `${layer}/${index}` ? feature.answer : null;
  const field = (name, value, most) => html`<label>${name} <input type="number" min="0" max=${most} value=${value} aria-label=${name} onChange=${(event) => { if (/^\d+$/.test(event.target.value)) act.go({ [name]: event.target.value }); }} /></label>`;
  return html`<article class="featurepage">
    <h1>${answer?.label || `feature ${index}`}</h1>
    <p class="soft">layer ${layer}, feature ${index}${answer?.source ? ` · named by ${labelSource(answer.source)}` : ""}</p>
    <div class="controls">${field("layer", layer, answer ? answer.features.length - 1 : undefined)}${field("feature", index, answer ? answer.features[layer] - 1 : undefined)}</div>
    <div class="card">${answer ? html`<${Dashboard} record=${answer.record} act=${act} />` : html`<p role=${feature?.problem ? "alert" : null}>${feature?.key === `${layer}/${index}` && feature.problem ? feature.problem : "loading…"}</p>`}</div></article>`;
}
