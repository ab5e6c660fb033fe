// One node: what it is, what feeds it and what it feeds, what people said of it, what its feature responds to.

import { html, useState, useEffect } from "../vendor/preact.js";
import { strongest } from "../core/model.js";
import { labelSource, nodeName, nodePlace, number, percent } from "../core/format.js";
import { heldIn, pageKey } from "../core/attention.js";
import { address } from "../core/address.js";
import { group, pin, unpin } from "../core/edits.js";
import { Dashboard } from "./dashboard.js";
import { EdgeDetail } from "./edge.js";

export function NodePanel({ model, kept, own, i, feature, edge, heads, tried, act, fixed, run, steer }) {
  if (i < 0) return html`<${Hint} ...${{ model, kept, fixed }} />`;
  const node = model.nodes[i];
  return html`
    <${Title} key=${node.key} ...${{ model, kept, i, act, fixed }} />
    <${Facts} model=${model} i=${i} />
    <${Actions} ...${{ model, kept, own, i, act, steer, fixed }} />
    <h3>What feeds it</h3><${Edges} ...${{ model, kept, i, side: "into", act, edge, heads, tried, canAsk: model.live && !fixed }} />
    <h3>What it feeds</h3><${Edges} ...${{ model, kept, i, side: "outOf", act }} />
    <${Note} key=${`note ${node.key}`} ...${{ kept, node, act }} />
    ${node.kind === "feature" && html`<${Feature} ...${{ node, feature, run, fixed }} />`}`;
}

function Hint({ model, kept, fixed }) {
  return html`<h2>Choose a node</h2>
    <p class="soft">Circles are features, diamonds errors, boxes at the top what the model says; the prompt's ${model.tokens.length} tokens stand below.
      A click shows what feeds a node, what it feeds, and what its feature responds to. <kbd>p</kbd> or a shift-click pins it into the subgraph.</p>
    ${!fixed && html`<p class="soft">Pins, groups, names and notes are kept beside the graph as you make them.</p>`}
    ${model.seeds?.paths.length > 0 && html`<h3>Strongest paths, over seeds</h3><ul class="edges">${model.seeds.paths.map((path) => html`<li class="small">
      ${path.nodes.map((node) => { const at = model.byKey.get(pageKey(node)); return at === undefined ? pageKey(node) : nodeName(model, kept, at); }).join(" → ")}
      <span class="soft">in ${path.in} of ${model.seeds.trainings} trainings</span></li>`)}</ul>`}`;
}

function Title({ model, kept, i, act, fixed }) {
  const node = model.nodes[i], name = nodeName(model, kept, i);
  const [text, setText] = useState(null);
  const key = `${node.layer}/${node.index}`;
  if (node.kind !== "feature") return html`<h1 class="nodename">${name}</h1>`;
  if (text === null) {
    return html`<h1 class="nodename">${name} <button class="quiet" onClick=${() => setText(name.startsWith("feature ") ? "" : name)} aria-label="edit the label">✎</button></h1>`;
  }
  const finish = (event) => {
    event.preventDefault();
    if (text.trim() !== name) act.edit({ labels: { [key]: text.trim() || null } }, text.trim() ? `labelled ${text.trim()}` : "label taken away");
    setText(null);
  };
  return html`<form class="labelform" onSubmit=${finish}>
    <input aria-label="label of the feature" value=${text} maxlength="400" ref=${(input) => input && !input.dataset.seen && (input.dataset.seen = "1", input.select(), input.focus())} onInput=${(event) => setText(event.target.value)} onKeyDown=${(event) => { if (event.key === "Escape") setText(null); }} />
    <button class="plain" type="submit">Keep</button>
    <p class="soft small">${fixed ? "Kept in this page until it is closed." : "A label is the run's: it stands over what was guessed. Empty gives the earlier one back."}</p></form>`;
}

function Facts({ model, i }) {
  const node = model.nodes[i];
  const facts = [["where", node.layer >= 0 && node.kind !== "logit" ? `layer ${node.layer}, token ${nodePlace(model, i).replace(/^L\d+ · /, "")}` : `token ${nodePlace(model, i)}`]];
  if (node.kind === "feature") facts.push(["feature", `${node.index} of layer ${node.layer}`], ["activation", number(node.activation)]);
  if (node.kind === "logit") facts.push([model.weight_name, percent(node.probability)], ["logit above the mean", number(node.activation)]);
  const inSeeds = heldIn(model.seeds, "features", node.key);
  if (inSeeds) facts.push(["over seeds", `found in ${inSeeds} trainings`]);
  const all = model.size.feature_influence;
  if (node.kind !== "logit") facts.push(["influence", node.kind === "feature" && all > 0 ? `${number(node.influence)}, ${percent(node.influence / all)} of all features'` : number(node.influence)]);
  return html`<dl class="facts">${facts.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>`;
}

function Actions({ model, kept, own, i, act, steer, fixed }) {
  const node = model.nodes[i], pinned = node.key in kept.pins && own;
  const toggle = () => act.edit(pinned ? unpin(kept, [node.key]) : pin([node.key]), pinned ? "unpinned" : "pinned");
  const join = (event) => {
    const id = event.target.value;
    if (id === "") act.edit({ members: { [node.key]: null } }, "taken out of its supernode");
    else act.edit(group(id, kept.groups[id], [node.key]), `put into ${kept.groups[id]}`);
  };
  const groups = Object.entries(kept.groups);
  return html`<div class="actions">
    <button class="plain" aria-pressed=${String(pinned)} onClick=${toggle}>${pinned ? "Unpin" : "Pin"}</button>
    ${groups.length > 0 && node.kind !== "logit" && html`<label>supernode <select value=${kept.members[node.key] ?? ""} onChange=${join}>
      <option value="">none</option>${groups.map(([id, name]) => html`<option value=${id} selected=${kept.members[node.key] === id}>${name}</option>`)}</select></label>`}
    ${node.kind === "feature" && !fixed && model.live && html`<${Multiplier} name=${`Multiply it by`} value=${steer.changes[node.key] ?? 1} set=${(value) => act.multiply([node.key], value)} />
      <button class="plain" onClick=${() => act.go({ side: "steer" })}>Steer…</button>`}
  </div>`;
}

export function Multiplier({ name, label = name, value, set }) {
  return html`<label class="multiplier">${name} <input type="number" step="0.5" min="-20" max="20" value=${value} aria-label=${label}
    onChange=${(event) => { const times = Number(event.target.value); if (event.target.value !== "" && Number.isFinite(times)) set(Math.max(-20, Math.min(20, times))); }} /></label>`;
}

function Edges({ model, kept, i, side, act, edge, ...more }) {
  const [most, setMost] = useState(10);
  useEffect(() => setMost(10), [i]);
  const all = strongest(model, model[side], i);
  if (!all.length) return html`<p class="soft">nothing that the page holds</p>`;
  const top = Math.abs(model.weight[all[0]]);
  const opened = all.findIndex((link) => model.nodes[model.source[link]].key === edge);
  return html`<ul class="edges ${side}">${all.slice(0, Math.max(most, opened + 1)).map((link) => {
    const weight = model.weight[link], end = side === "into" ? model.source[link] : model.target[link];
    const open = side === "into" && model.nodes[end].key === edge;
    return html`<li key=${link} class=${side === "into" ? "edge" : null}><button onClick=${() => act.choose(end)} title=${nodeName(model, kept, end)}>
      <span class="name">${nodeName(model, kept, end)}</span><span class="where">${nodePlace(model, end)}</span>
      <span class="meter"><i class=${weight < 0 ? "minus" : ""} style=${{ width: `${Math.max(3, (100 * Math.abs(weight)) / top)}%` }}></i></span><span class="weight">${weight > 0 ? "+" : "−"}${number(Math.abs(weight))}</span></button>
      ${side === "into" && html`<button class="more" aria-expanded=${String(open)} aria-label=${`the edge from ${nodeName(model, kept, end)}`} title="heads, and predicted against measured" onClick=${() => act.openEdge(i, end)}>${open ? "▾" : "▸"}</button>`}
      ${open && html`<${EdgeDetail} ...${{ model, kept, link, act, ...more }} />`}</li>`;
  })}</ul>${all.length > most && html`<button class="quiet more" onClick=${() => setMost(most + 40)}>${all.length - most} more</button>`}`;
}

function Note({ kept, node, act }) {
  const [text, setText] = useState(kept.notes[node.key] ?? "");
  useEffect(() => setText(kept.notes[node.key] ?? ""), [kept.notes[node.key]]);
  const leave = () => { if (text.trim() !== (kept.notes[node.key] ?? "")) act.edit({ notes: { [node.key]: text.trim() || null } }, text.trim() ? "note kept" : "note taken away"); };
  return html`<h3>Note</h3><textarea class="note" rows="2" maxlength="4000" aria-label="note on this node" placeholder="what you think it does" value=${text} onInput=${(event) => setText(event.target.value)} onBlur=${leave}></textarea>`;
}

function Feature({ node, feature, run, fixed }) {
  const key = `${node.layer}/${node.index}`;
  if (feature?.key !== key) return html`<h3>Its feature</h3><p class="soft">loading…</p>`;
  if (feature.problem) return html`<h3>Its feature</h3><p class="soft">${feature.problem}</p>`;
  const { answer } = feature;
  const where = `layer ${node.layer}, feature ${node.index}`;
  return html`<h3>Its feature</h3>
    <p class="small">${fixed ? where : html`<a href=${address("feature", { run, layer: String(node.layer), feature: String(node.index) })}>${where}</a>`}
      ${answer.source && html`<span class="soft"> · named by ${labelSource(answer.source)}</span>`}</p>
    <${Dashboard} record=${answer.record} />`;
}
