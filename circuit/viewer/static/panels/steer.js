// Steering: multiply features or whole supernodes, or switch others on, and read what the model says then.

import { html, useEffect, useState } from "../vendor/preact.js";
import { bareLabel, nodeName, nodePlace, number, percent, token } from "../core/format.js";
import { Multiplier } from "./node.js";

const MODES = {
  steer: "the model itself answers", free: "the transcoder answers, everywhere", constrained: "frozen up to the last changed layer, then live", direct: "everything else frozen: the graph’s own terms",
};

export function Steer({ model, kept, chosen, steer, labels, act }) {
  const groups = Object.entries(kept.groups).map(([id, name]) => [id, name, Object.keys(kept.members).filter((key) => kept.members[key] === id && isFeature(model, key))]).filter(([, , keys]) => keys.length);
  const grouped = new Set(groups.flatMap(([, , keys]) => keys));
  const single = Object.keys(steer.changes).filter((key) => !grouped.has(key) && typeof steer.changes[key] === "number");
  const chosenKey = chosen >= 0 && model.nodes[chosen].kind === "feature" ? model.nodes[chosen].key : null;
  if (chosenKey && !grouped.has(chosenKey) && !single.includes(chosenKey)) single.push(chosenKey);
  const added = Object.entries(steer.changes).filter(([, change]) => typeof change === "object");
  const changed = Object.keys(steer.changes).length;
  return html`<h2>Multiply</h2>
    ${groups.map(([id, name, keys]) => html`<div class="row" key=${id}><span class="name">${name} <span class="soft">${keys.length}</span></span>
      <${Multiplier} name="×" label=${`multiply ${name} by`} value=${multiplierOf(steer, keys)} set=${(value) => act.multiply(keys, value)} /></div>`)}
    ${single.map((key) => html`<div class="row" key=${key}><span class="name">${nodeName(model, kept, model.byKey.get(key))} <span class="soft">${nodePlace(model, model.byKey.get(key))}</span></span>
      <${Multiplier} name="×" label=${`multiply feature ${key} by`} value=${steer.changes[key] ?? 1} set=${(value) => act.multiply([key], value)} /></div>`)}
    ${groups.length + single.length === 0 && html`<p class="soft">Group pinned features into a supernode, or choose a feature.</p>`}
    <${Others} ...${{ model, chosen, steer, added, labels, act }} />
    <div class="actions">
      <label>who answers <select value=${steer.mode} onChange=${(event) => act.go({ mode: event.target.value })}>${(model.modes ?? ["steer"]).map((mode) => html`<option value=${mode} selected=${mode === steer.mode}>${mode}</option>`)}</select></label>
      <label>and writes <input type="number" min="0" max="64" value=${steer.tokens} aria-label="tokens to write" onInput=${(event) => act.go({ write: event.target.value })} /> tokens</label></div>
    <p class="soft small">${MODES[steer.mode] ?? ""}</p>
    <div class="actions"><button class="plain main" disabled=${!changed || steer.working} onClick=${act.runSteer}>${steer.working ? "Running…" : "Steer"}</button>
      <button class="plain" disabled=${!changed && !steer.answer} onClick=${act.resetSteer}>Reset</button></div>
    ${steer.answer && html`<${Answer} ...${{ model, kept, answer: steer.answer }} />`}`;
}

const isFeature = (model, key) => model.nodes[model.byKey.get(key)]?.kind === "feature";

function multiplierOf(steer, keys) {
  const values = [...new Set(keys.map((key) => steer.changes[key] ?? 1))];
  return values.length === 1 && typeof values[0] === "number" ? values[0] : "";
}

// Features that are silent here can be switched on, found by their labels: another state in place of this one.
function Others({ model, chosen, steer, added, labels, act }) {
  const [text, setText] = useState("");
  const position = chosen >= 0 && model.nodes[chosen].kind === "feature" ? model.nodes[chosen].position : model.tokens.length - 1;
  useEffect(() => { const wait = setTimeout(() => act.findLabels(text), 200); return () => clearTimeout(wait); }, [text]);
  const names = new Map();
  for (const [key, change] of added) names.set(change.label, [...(names.get(change.label) ?? []), key]);
  return html`<h3>Switch on</h3>
    ${[...names].map(([name, keys]) => html`<div class="row" key=${name}><span class="name">${name} <span class="soft">${keys.length}, at ${keys[0].split("/")[1]}</span></span><button class="quiet" onClick=${() => act.dropChanges(keys)}>remove</button></div>`)}
    <input class="wide" value=${text} placeholder="a label, such as California" aria-label="label of features to switch on" onInput=${(event) => setText(event.target.value)} />
    ${text.trim() && labels.map((one) => html`<div class="row" key=${one.label}><button class="quiet" onClick=${() => { act.switchOn(one, position); setText(""); }}>${bareLabel(one.label)}</button>
      <span class="soft small">${one.features.length === 1 ? "1 feature" : `${one.features.length} features`}, at token ${position}, as strong as they get</span></div>`)}`;
}

function Answer({ model, kept, answer }) {
  const most = Math.max(...answer.next.map((one) => Math.max(one.before, one.after)));
  const levels = Object.entries(answer.levels).filter(([id, level]) => level !== null && kept.groups[id]);
  const named = (key) => (model.byKey.has(key) ? nodeName(model, kept, model.byKey.get(key)) : kept.groups[key] ?? key);
  return html`<section aria-label="What the model says then">
    <h3>Next token</h3>
    <table class="probs"><thead><tr><th>token</th><th>before</th><th>then</th></tr></thead><tbody>
      ${answer.next.map((one) => html`<tr key=${one.token}><th scope="row">${token(one.token)}</th>
        <td><span class="bar"><i style=${{ width: `${(100 * one.before) / most}%` }}></i></span>${percent(one.before)}</td><td><span class="bar then"><i style=${{ width: `${(100 * one.after) / most}%` }}></i></span>${percent(one.after)}</td></tr>`)}</tbody></table>
    ${answer.text && html`<h3>It writes</h3><dl class="facts"><dt>before</dt><dd class="text">${answer.text.before}</dd><dt>then</dt><dd class="text steered">${answer.text.after}</dd></dl>`}
    ${levels.length > 0 && html`<h3>Supernodes</h3><dl class="facts">${levels.map(([id, level]) => html`<dt>${kept.groups[id]}</dt><dd>${percent(level)} of before</dd>`)}</dl>`}
    <h3>Predicted and measured</h3>
    <table class="probs"><thead><tr><th>target</th><th>edges say</th><th>all else frozen</th><th>${answer.mode}</th></tr></thead><tbody>
      ${answer.targets.map((one) => html`<tr key=${one.key}><th scope="row">${named(one.key)}</th><td>${number(one.predicted)}</td><td>${number(one.direct)}</td><td>${number(one.measured)}</td></tr>`)}</tbody></table>
    ${answer.targets.some((one) => one.unseen) && html`<p class="soft small">Features that are silent here have no edges: what switching them on does is not in “edges say”.</p>`}</section>`;
}
