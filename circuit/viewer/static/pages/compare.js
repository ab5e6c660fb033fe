// Two graphs side by side: what they share, what only one has, and whose influence moved.

import { html, useMemo, useState } from "../vendor/preact.js";
import { LinkGraph } from "../graph/linkgraph.js";
import { compare } from "../core/compare.js";
import { firstShare, shownNodes } from "../core/model.js";
import { count, nodeName, nodePlace, number, percent } from "../core/format.js";
import { nothing } from "../core/edits.js";

const NONE = nothing();

export function ComparePage({ route, list, first, second, theme, act }) {
  const graphs = (list?.runs ?? []).flatMap((run) => run.graphs.map((graph) => [`${run.name}\n${graph.slug}`, `${run.name} · ${graph.slug}`]));
  const choice = (name, value, change) => html`<label>${name} <select value=${value} onChange=${(event) => change(...event.target.value.split("\n"))}>
    ${graphs.some(([key]) => key === value) ? null : html`<option value=${value}>choose a graph</option>`}${graphs.map(([key, text]) => html`<option value=${key} selected=${key === value}>${text}</option>`)}</select></label>`;
  const step = (name, model, value, change) => model?.traced?.length > 0 && html`<label>at <select aria-label=${`${name}: checkpoint`} onChange=${(event) => change(event.target.value)}>
    ${["", ...model.traced.map(String)].map((one) => html`<option value=${one} selected=${one === value}>${one ? `step ${one}` : "the end"}</option>`)}</select></label>`;
  return html`<article class="graphpage"><h1>Two graphs</h1>
    <div class="controls">${choice("first", `${route.run}\n${route.slug}`, (run, slug) => act.go({ run, slug, step: "" }))} ${step("first", first, route.step, (at) => act.go({ step: at }))}
      ${choice("second", `${route.withrun || route.run}\n${route.with}`, (run, slug) => act.go({ withrun: run, with: slug, withstep: "" }))} ${step("second", second, route.withstep, (at) => act.go({ withstep: at }))}
      <label>show <select value=${route.q || "all"} onChange=${(event) => act.go({ q: event.target.value === "all" ? "" : event.target.value })}>${["all", "shared", "only one"].map((one) => html`<option value=${one} selected=${one === (route.q || "all")}>${one}</option>`)}</select></label></div>
    ${first && second ? html`<${Both} ...${{ a: first, b: second, only: route.q, theme, act }} />` : html`<p class="soft">${route.with ? "loading…" : "choose a second graph"}</p>`}</article>`;
}

function Both({ a, b, only, theme, act }) {
  const [chosen, setChosen] = useState([-1, -1]); // a node of either, and its counterpart
  const { pairs, shared, lost, gained, byLabel } = useMemo(() => compare(a, b), [a, b]);
  const sides = [a, b].map((model, side) => {
    const shown = useMemo(() => shownNodes(model, { share: firstShare(model), errors: false, biases: false }), [model]);
    const found = useMemo(() => (only === "shared" ? shared[side] : only === "only one" ? new Set(side ? gained : lost) : null), [only, shared, model]);
    const alone = useMemo(() => new Set(side ? gained : lost), [lost, gained]);
    const choose = (i) => {
      const pair = pairs.find((one) => one[side] === i);
      setChosen(i < 0 ? [-1, -1] : pair ?? (side ? [-1, i] : [i, -1]));
    };
    return { model, shown, found, alone, choose };
  });
  const moved = pairs.filter(([i]) => a.nodes[i].kind === "feature").map(([i, j]) => ({ i, j, by: b.nodes[j].influence - a.nodes[i].influence })).sort((x, y) => Math.abs(y.by) - Math.abs(x.by)).slice(0, 12);
  const own = (model, ids) => html`<ul class="edges">${ids.slice(0, 12).map((i) => html`<li key=${i} class="headrow wideName"><span class="name">${nodeName(model, NONE, i)}</span><span class="where">${nodePlace(model, i)}</span><span class="weight">${number(model.nodes[i].influence, 2)}</span></li>`)}</ul>`;
  const weight = (model, ids) => percent(ids.reduce((sum, i) => sum + model.nodes[i].influence, 0) / (model.size.feature_influence || 1));
  const features = [...shared[0]].filter((i) => a.nodes[i].kind === "feature").length;
  return html`<p class="sentence">They share <b>${count(features, "feature")}</b>${byLabel ? " (two transcoders: compared by label and token)" : ""}; <b>${lost.length}</b> are lost, in the first alone (${weight(a, lost)} of its influence), and <b>${gained.length}</b> gained, in the second alone (${weight(b, gained)}).</p>
    <p class="soft small">Shared features are blue, those of one graph alone orange. A click on a node shows its counterpart in the other.</p>
    <div class="sides">${sides.map(({ model, shown, found, alone, choose }, side) => html`<section key=${side} aria-label=${side ? "second graph" : "first graph"}><h2>${[model.run, model.step && `step ${model.step}`].filter(Boolean).join(", ")}: ${model.prompt}</h2>
      <${LinkGraph} ...${{ model, shown, kept: NONE, own: false, chosen: chosen[side], found, alone, links: 300, zoomText: "", theme, act: { go: () => {}, choose, togglePin: () => {} }, label: side ? "Second graph" : "First graph" }} /></section>`)}</div>
    <div class="sides three"><section><h3>lost: only in the first</h3>${own(a, lost)}</section><section><h3>gained: only in the second</h3>${own(b, gained)}</section>
      <section><h3>shared: influence from first to second</h3><ul class="edges">${moved.map(({ i, j }) => html`<li key=${`${i}/${j}`} class="headrow wideName"><span class="name">${nodeName(a, NONE, i)}</span><span class="where">${nodePlace(a, i)}</span><span class="weight">${number(a.nodes[i].influence, 2)} → ${number(b.nodes[j].influence, 2)}</span></li>`)}</ul></section></div>`;
}
