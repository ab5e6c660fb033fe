// What is shown: how much of the influence, how many edges, errors and biases, and the search.

import { html } from "../vendor/preact.js";
import { percent } from "../core/format.js";
import { Steps } from "./steps.js";

export function Controls({ share, links, route, query, found, model, act, fixed }) {
  const box = (name, key) => html`<label><input type="checkbox" checked=${route[key] === "1"} onChange=${(event) => act.go({ [key]: event.target.checked ? "1" : "" })} />${name}</label>`;
  return html`<div class="controls">
    <label class="search"><span class="unseen">search</span><input type="search" id="search" value=${route.q} placeholder="search, or layer:2 act>3 label~texas" aria-describedby="search-says"
      onInput=${(event) => act.go({ q: event.target.value })} onKeyDown=${(event) => { if (event.key === "Enter" && found?.size) { act.choose(strongestOf(found, model)); } if (event.key === "Escape") act.go({ q: "" }); }} /></label>
    <span id="search-says" class=${query?.problem ? "small problem-text" : "small soft"}>${query ? query.problem || `${found.size} found` : ""}</span>
    <label>nodes <input type="range" min="0" max="1" step="0.01" value=${share} aria-label="nodes: share of influence" onInput=${(event) => act.go({ share: event.target.value })} /><span class="amount">${percent(share)}</span></label>
    <label>edges <input type="range" min="0" max="3000" step="50" value=${links} aria-label="edges drawn" onInput=${(event) => act.go({ links: event.target.value })} /><span class="amount">${links}</span></label>
    ${box("errors", "errors")} ${box("biases", "biases")}
    <button class="plain" onClick=${() => act.go({ zoom: "", share: "" })} title="f">Fit</button>
    ${!fixed && model.steps?.length > 0 && html`<${Steps} ...${{ model, route, act }} />`}
  </div>`;
}

const strongestOf = (found, model) => [...found].reduce((best, i) => (model.nodes[i].influence > model.nodes[best].influence ? i : best));
