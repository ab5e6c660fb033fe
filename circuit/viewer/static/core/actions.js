// What a person can do.

import * as store from "./store.js";
import { ask, send } from "./server.js";
import { pin, unpin } from "./edits.js";
import { nodeName, nodePlace } from "./format.js";

function choose(i) {
  const { model, kept } = store;
  if (i < 0) return store.go({ node: "" });
  store.say(`${nodeName(model.value, kept.value, i)}, ${nodePlace(model.value, i)}`);
  const side = store.route.value.side === "steer" || store.route.value.side === "list" ? {} : { side: "node" };
  return store.go({ node: model.value.nodes[i].key, ...side });
}

function togglePin(ids) {
  const keys = ids.map((i) => store.model.value.nodes[i].key);
  const pinned = store.hasKept.value && keys.every((key) => key in store.kept.value.pins);
  store.edit(pinned ? unpin(store.kept.value, keys) : pin(keys), pinned ? "unpinned" : "pinned");
}

// The chosen feature's dashboard is fetched when it is looked at; of several quick choices, the last one counts.
let asked = 0;
function watchFeature() {
  const { page, run, layer, feature } = store.route.value;
  const node = page === "graph" ? store.model.value?.nodes[store.chosen.value] : page === "feature" ? { kind: "feature", layer, index: feature } : null;
  if (node?.kind !== "feature") return;
  const key = `${Number(node.layer)}/${Number(node.index)}`;
  if (store.feature.peek()?.key === key && store.feature.peek()?.run === run) return;
  const mine = ++asked;
  setTimeout(async () => {
    if (mine !== asked) return;
    const answer = await ask("feature", { run, layer: node.layer, feature: node.index }).then((found) => ({ answer: found }), (error) => ({ problem: error.message }));
    if (mine === asked) store.feature.value = { key, run, ...answer };
  }, 60);
}

async function takeQParams(text) {
  try {
    const { run, slug } = store.route.value;
    const kept = await send("neuronpedia", { run, slug, qParams: readQParams(text) });
    store.kept.value = kept;
    store.say("pins and groups taken over");
  } catch (error) { store.say(error.message); }
}

// As JSON (with or without the object around it), or from an address of Neuronpedia.
export function readQParams(text) {
  if (/^https?:/.test(text.trim())) {
    const query = new URL(text.trim()).searchParams;
    return { pinnedIds: query.get("pinnedIds") ?? "", supernodes: JSON.parse(query.get("supernodes") ?? "[]") };
  }
  const found = JSON.parse(text);
  return found.qParams ?? found;
}

const order = () => {
  const { nodes } = store.model.value, shown = store.shown.value;
  return nodes.flatMap((_, i) => (shown[i] ? [i] : [])).sort((a, b) => nodes[a].influence - nodes[b].influence);
};
const quiet = () => {
  const { source, target } = store.model.value, shown = store.shown.value, some = [];
  for (let link = 0; link < source.length && some.length < Number(store.route.value.links); link++) if (shown[source[link]] && shown[target[link]]) some.push(link);
  return some;
};

export const act = {
  go: store.go, say: store.say, edit: store.edit, choose, togglePin, watchFeature, takeQParams, order, quiet,
  pick: (ids) => store.go({ picked: ids.join(" ") }),
};
