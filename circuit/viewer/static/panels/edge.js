// One edge, looked at closely: what it adds, the heads that it goes through, and what silencing its source does.

import { html } from "../vendor/preact.js";
import { nodeName, number } from "../core/format.js";
import { heldIn, recordedHeads } from "../core/attention.js";

export function EdgeDetail({ model, kept, link, heads, tried, act, canAsk }) {
  const source = model.nodes[model.source[link]], target = model.nodes[model.target[link]];
  const mine = (one) => one?.target === target.key && one?.source === source.key;
  const recorded = recordedHeads(model.attention, target.key, source.key);
  const asked = mine(heads) ? heads : null, found = recorded ?? asked?.answer;
  const inSeeds = heldIn(model.seeds, "edges", source.key, target.key);
  const result = mine(tried) ? tried : null, moved = result?.answer?.targets.find((one) => one.key === target.key);
  return html`<div class="edgedetail">${inSeeds && html`<p class="soft small">found in ${inSeeds} trainings</p>`}
    ${source.kind === "bias" ? html`<p class="soft small">Biases travel through every head and come from none.</p>`
      : found ? html`<${HeadList} ...${{ found, target, source, act, canAsk }} />`
      : asked?.problem ? html`<p class="problem-text small">${asked.problem}</p>` : asked ? html`<p class="soft small">asking the model for its heads…</p>`
      : canAsk ? html`<button class="plain" onClick=${() => act.askHeads(target.key, source.key)}>Through which heads?</button>` : html`<p class="soft small">the graph’s record (heads.json) does not hold this edge’s heads</p>`}
    ${canAsk && source.kind === "feature" && html`<p class="row"><span class="soft small">Silence ${nodeName(model, kept, model.source[link])} and measure</span><button class="plain" disabled=${result && !result.answer && !result.problem} onClick=${() => act.tryEdge(target.key, source.key)}>Measure</button></p>`}
    ${result?.problem && html`<p class="problem-text small">${result.problem}</p>`}
    ${moved && html`<table class="probs"><thead><tr><th>the edge says</th><th>all else frozen</th><th>the model</th></tr></thead><tbody><tr><td>${number(moved.predicted)}</td><td>${number(moved.direct)}</td><td>${number(moved.measured)}</td></tr></tbody></table>
      <p class="soft small">${target.kind === "logit" ? "change of the logit above the mean" : "change of its pre-activation"}</p>`}</div>`;
}

function HeadList({ found, target, source, act, canAsk }) {
  if (!found.heads.length) return html`<p class="soft small">no attention lies between the two</p>`;
  const most = Math.abs(found.heads[0][2]);
  return html`<ul class="edges">${found.heads.slice(0, 6).map(([layer, head, part]) => html`<li key=${`${layer}/${head}`} class="headrow"><span>layer ${layer}, head ${head}</span>
      <span class="meter"><i class=${part < 0 ? "minus" : ""} style=${{ width: `${Math.max(3, (100 * Math.abs(part)) / most)}%` }}></i></span><span class="weight">${part > 0 ? "+" : "−"}${number(Math.abs(part))}</span>
      ${canAsk && html`<button class="quiet" aria-label=${`why layer ${layer}, head ${head} looked there`} onClick=${() => act.explainHead({ layer, head, target: target.key, source: source.key })}>why?</button>`}</li>`)}</ul>
    <p class="soft small">of ${number(found.value)}; the layers’ splits are alternatives, not parts of one sum</p>`;
}
