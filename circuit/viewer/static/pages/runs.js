// All runs and their graphs.

import { html } from "../vendor/preact.js";
import { address } from "../core/address.js";
import { number } from "../core/format.js";

export function RunsPage({ list }) {
  return html`<article class="listpage"><h1>${list.root}</h1>
    ${list.runs.length === 0 && html`<p class="soft">there is no run here any more</p>`}
    ${list.runs.map((run) => html`<section key=${run.name}><h2>${run.name} <span class="soft">${run.kind}</span></h2><div class="list">
      ${run.live && html`<a class="card act" href=${address("live", { run: run.name })}><span><b>Ask and trace</b> <span class="soft">type a prompt, let the model answer, trace any of its tokens</span></span></a>`}
      ${run.graphs.map((graph) => html`<a class="card" href=${address("graph", { run: run.name, slug: graph.slug })}>
        <span><b>${graph.slug}</b> <span class="soft">${graph.prompt}</span></span>
        <span class="soft">${graph.kept ? "worked on · " : ""}${graph.scores.replacement_score === undefined ? "" : `replacement score ${number(graph.scores.replacement_score)}`}</span></a>`)}
      ${run.graphs.length > 1 && html`<a class="card act" href=${address("compare", { run: run.name, slug: run.graphs[0].slug, with: run.graphs[1].slug })}><span>Compare two graphs</span></a>`}
      ${run.features && html`<a class="card act" href=${address("feature", { run: run.name })}><span>Features</span></a>`}
      ${run.graphs.length === 0 && !run.live && html`<p class="soft">no graphs yet: crosslace trace writes them</p>`}
    </div></section>`)}</article>`;
}
