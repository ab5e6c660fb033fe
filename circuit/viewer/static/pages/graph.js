// A graph's page: the link graph above, the subgraph below, one side panel of tabs.

import { html, useMemo } from "../vendor/preact.js";
import { parseLook } from "../core/changes.js";
import { LinkGraph } from "../graph/linkgraph.js";
import { Subgraph } from "../graph/subgraph.js";
import { Controls } from "../panels/controls.js";
import { Heads } from "../panels/heads.js";
import { Strip } from "../panels/strip.js";
import { NodePanel } from "../panels/node.js";
import { NodeList } from "../panels/list.js";
import { Steer } from "../panels/steer.js";
import { Tabs } from "../panels/tabs.js";

export function GraphPage(view) {
  const { model, drawn, own, route, shown, chosen, act, fixed, theme } = view;
  const links = Math.max(0, Number(route.links) || 0);
  const live = model.live && !fixed;
  const sides = [["node", "Node"], ["list", "Nodes"], ...(live || model.attention ? [["heads", "Attention"]] : []), ...(live ? [["steer", "Steer"]] : [])];
  const side = sides.some(([id]) => id === route.side) ? route.side : "node";
  const onToken = live ? act.traceToken : null;
  const found = view.query ? view.found : null;
  const between = useMemo(() => linksBetween(model, shown), [model, shown]);
  const marks = view.steer.answer?.levels;
  // What a click does not change is not made anew.
  const strip = useMemo(() => html`<${Strip} ...${{ model, shown, drawn: Math.min(links, between), between, route, act, fixed }} />`, [model, shown, links, between, route.big, route.step]);
  const subgraph = useMemo(() => html`<${Subgraph} ...${{ model, kept: drawn, own, picked: route.picked ? route.picked.split(" ") : [], act, marks }} />`, [model, drawn, own, route.picked, marks]);
  return html`<article class="graphpage">
    <header><h1>${model.prompt}</h1>${strip}</header>
    <${Controls} share=${view.share} ...${{ links, route, query: view.query, found: view.found, model, act, fixed }} />
    <div class="split">
      <div class="pictures">
        <${LinkGraph} ...${{ model, shown, kept: drawn, own, chosen, found, links, zoomText: route.zoom, theme, act, onToken }} />
        ${subgraph}
      </div>
      <aside class="side" aria-label="Details">
        <${Tabs} name="details" tabs=${sides} open=${side} choose=${(id) => act.go({ side: id })}>
          ${side === "node" && html`<${NodePanel} ...${{ model, kept: drawn, own, i: chosen, feature: view.feature, edge: route.edge, heads: view.heads, tried: view.tried, act, fixed, run: route.run, steer: view.steer }} />`}
          ${side === "list" && html`<${NodeList} ...${{ model, kept: drawn, shown, found, chosen, act }} />`}
          ${side === "heads" && html`<${Heads} ...${{ model, kept: drawn, asked: parseLook(route.look), answered: view.look, act, canAsk: live }} />`}
          ${side === "steer" && html`<${Steer} ...${{ model, kept: drawn, chosen, steer: view.steer, labels: view.labels, act }} />`}
        <//>
      </aside>
    </div></article>`;
}

function linksBetween(model, shown) {
  let count = 0;
  for (let link = 0; link < model.source.length; link++) if (shown[model.source[link]] && shown[model.target[link]]) count += 1;
  return count;
}
