// A graph's page: the link graph above, the subgraph below, one side panel of tabs.

import { html } from "../vendor/preact.js";
import { LinkGraph } from "../graph/linkgraph.js";
import { Subgraph } from "../graph/subgraph.js";
import { Controls } from "../panels/controls.js";
import { Strip } from "../panels/strip.js";
import { NodePanel } from "../panels/node.js";
import { NodeList } from "../panels/list.js";
import { Steer } from "../panels/steer.js";
import { Tabs } from "../panels/tabs.js";

export function GraphPage(view) {
  const { model, drawn, route, shown, chosen, found, act, fixed } = view;
  const links = Math.max(0, Number(route.links) || 0);
  const between = linksBetween(model, shown);
  const live = model.live && !fixed;
  const sides = [["node", "Node"], ["list", "Nodes"], ...(live ? [["steer", "Steer"]] : [])];
  const side = sides.some(([id]) => id === route.side) ? route.side : "node";
  const onToken = live ? act.traceToken : null;
  return html`<article class="graphpage">
    <header><h1>${model.prompt}</h1>
      <${Strip} ...${{ model, shown, drawn: Math.min(links, between), between, route, act, fixed }} /></header>
    <${Controls} share=${view.share} ...${{ links, route, query: view.query, found, model, act }} />
    <div class="split">
      <div class="pictures">
        <${LinkGraph} ...${{ model, shown, kept: drawn, own: view.own, chosen, found: view.query ? found : null, links, zoomText: route.zoom, theme: view.theme, act, onToken }} />
        <${Subgraph} ...${{ model, kept: drawn, own: view.own, picked: route.picked ? route.picked.split(" ") : [], act, marks: view.steer.answer?.levels }} />
      </div>
      <aside class="side" aria-label="Details">
        <${Tabs} name="details" tabs=${sides} open=${side} choose=${(id) => act.go({ side: id })}>
          ${side === "node" && html`<${NodePanel} ...${{ model, kept: drawn, own: view.own, i: chosen, feature: view.feature, heads: view.heads, act, fixed, run: route.run, steer: view.steer }} />`}
          ${side === "list" && html`<${NodeList} ...${{ model, kept: drawn, shown, found: view.query ? found : null, chosen, act }} />`}
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
