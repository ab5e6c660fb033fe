// The page: one state (core/store.js), views that are functions of it, and the keys.

import { html, render, effect } from "./vendor/preact.js";
import * as store from "./core/store.js";
import { act } from "./core/actions.js";
import { fixed } from "./core/server.js";
import { address } from "./core/address.js";
import { RunsPage } from "./pages/runs.js";
import { GraphPage } from "./pages/graph.js";
import { ComparePage } from "./pages/compare.js";
import { FeaturePage } from "./pages/feature.js";
import { JobBar, LivePage } from "./pages/live.js";
import { Help } from "./panels/help.js";
import { Exports } from "./panels/exports.js";

function App() {
  const route = store.route.value;
  return html`<${Bar} route=${route} />
    <main id="page">${store.problem.value ? html`<p class="card problem" role="alert">${store.problem.value}</p>` : html`<${Page} route=${route} />`}</main>
    <${JobBar} job=${store.job.value} act=${act} />
    <div class="status" role="status" aria-live="polite">${store.status.value}</div>
    ${store.help.value && html`<${Help} close=${() => { store.help.value = false; }} />`}`;
}

function Page({ route }) {
  if (route.page === "graph") {
    if (!store.model.value) return html`<p class="soft">loading…</p>`;
    return html`<${GraphPage} ...${{
      route, act, fixed, model: store.model.value, drawn: store.drawn.value, own: store.hasKept.value, shown: store.shown.value, chosen: store.chosen.value,
      found: store.found.value, query: store.query.value, share: store.share.value, feature: store.feature.value, steer: store.steer.value, labels: store.labels.value, heads: store.heads.value, tried: store.tried.value, look: store.look.value, theme: theme(route),
    }} />`;
  }
  if (route.page === "feature") return html`<${FeaturePage} route=${route} feature=${store.feature.value} act=${act} />`;
  if (route.page === "compare") return html`<${ComparePage} ...${{ route, list: store.runs.value, first: store.sides.value[0], second: store.sides.value[1], theme: theme(route), act }} />`;
  if (route.page === "live") return html`<${LivePage} route=${route} live=${{ ...store.live.value, job: store.job.value }} act=${act} />`;
  if (route.page === "") return store.runs.value ? html`<${RunsPage} list=${store.runs.value} />` : html`<p class="soft">loading…</p>`;
  return html`<p class="card problem" role="alert">there is no such page</p>`;
}

const theme = (route) => route.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

function Bar({ route }) {
  const graph = route.page === "graph" && store.model.value;
  const { past, future } = store.history.value;
  return html`<header id="bar"><a id="home" href=${fixed ? null : "#/"}>Crosslace</a>
    <nav id="trail" aria-label="Where you are">${route.run && html`<a href="#/">${route.run}</a>`}${route.slug && html`<span aria-current="page">${route.slug}</span>`}</nav>
    <span class="grow"></span>
    ${graph && html`<button class="plain" onClick=${store.undo} disabled=${!past.length} aria-label="Undo">↶</button><button class="plain" onClick=${store.redo} disabled=${!future.length} aria-label="Redo">↷</button>
      ${!fixed && html`<a class="plain" href=${address("compare", { run: route.run, slug: route.slug, step: route.step })}>Compare</a>`}
      <${Exports} ...${{ model: graph, run: route.run, slug: route.slug || "graph", step: route.step, fixed, act, scene: () => ({ model: graph, shown: store.shown.value, kept: store.drawn.value, own: store.hasKept.value, chosen: store.chosen.value, order: act.order(), quiet: act.quiet() }) }} />`}
    <button class="plain" aria-label="Light or dark" onClick=${() => act.go({ theme: theme(route) === "dark" ? "light" : "dark" })}>◐</button>
    <button class="plain" aria-label="Keys and help" onClick=${() => { store.help.value = true; }}>?</button></header>`;
}

function keys(event) {
  const typing = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select, dialog");
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key.toLowerCase() === "z" && !typing) { event.preventDefault(); return event.shiftKey ? store.redo() : store.undo(); }
  if (typing || control || event.altKey) return undefined;
  if (event.key === "?") { store.help.value = true; return event.preventDefault(); }
  if (store.route.value.page !== "graph" || !store.model.value) return undefined;
  const chosen = store.chosen.value;
  const step = (by) => act.go({ share: Math.max(0, Math.min(1, store.share.value + by)).toFixed(2) });
  const doing = {
    "/": () => document.getElementById("search")?.focus(), p: () => chosen >= 0 && act.togglePin([chosen]), Escape: () => act.go({ node: "", q: "", picked: "" }),
    "[": () => step(-0.05), "]": () => step(0.05), f: () => act.go({ zoom: "", share: "" }), e: () => act.go({ errors: store.route.value.errors ? "" : "1" }),
    n: () => act.go({ side: "node" }), a: () => act.go({ side: "heads" }), l: () => act.go({ side: "list" }), s: () => act.go({ side: "steer" }),
  }[event.key];
  if (!doing) return undefined;
  event.preventDefault();
  return doing();
}

let before = "";
effect(() => {
  const { page, run, slug, big, step, withrun, with: second, withstep } = store.route.value;
  const wanted = [page, run, slug, big, step, withrun, second, withstep].join("\n");
  if (wanted === before) return;
  before = wanted;
  if (page === "graph" && store.model.peek() && !store.sameGraph()) store.model.value = null; // at another step the page stays
  store.load();
});
effect(() => {
  const { page, slug } = store.route.value;
  document.title = `${page === "graph" ? slug : page || "runs"} · Crosslace`;
});
effect(() => {
  const { theme: chosen } = store.route.value;
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
});
effect(act.watchFeature);
document.addEventListener("keydown", keys);
if (fixed && store.route.value.page !== "graph") store.go({ page: "graph", run: fixed.run, slug: fixed.slug });
const root = document.getElementById("app");
effect(() => { void store.route.value; document.body.dataset.ready = "1"; });
render(html`<${App} />`, root);
