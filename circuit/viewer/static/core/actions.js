// What a person can do.

import * as store from "./store.js";
import { ask, send } from "./server.js";
import { pin, unpin } from "./edits.js";
import { nodeName, nodePlace } from "./format.js";
import { recordedHeads, recordedLook } from "./attention.js";
import { formatChanges, formatLook } from "./changes.js";

function choose(i) {
  const { model, kept } = store;
  if (i < 0) return store.go({ node: "", edge: "" });
  store.say(`${nodeName(model.value, kept.value, i)}, ${nodePlace(model.value, i)}`);
  const side = store.route.value.side === "steer" || store.route.value.side === "list" ? {} : { side: "node" };
  return store.go({ node: model.value.nodes[i].key, edge: "", ...side });
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
    store.taken(kept);
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

// -- with the model ------------------------------------------------------------------------------------------------

const here = () => { const { run, slug, step } = store.route.value; return { run, slug, ...(step ? { step: Number(step) } : {}) }; };

const change = (changes) => store.go({ changes: formatChanges(changes) });
const setSteered = (more) => { store.steered.value = { ...store.steered.value, ...more }; };

function multiply(keys, times) {
  const changes = { ...store.steer.value.changes };
  for (const key of keys) { if (times === 1) delete changes[key]; else changes[key] = times; }
  change(changes);
}

const dropChanges = (keys) => change(Object.fromEntries(Object.entries(store.steer.value.changes).filter(([key]) => !keys.includes(key))));

function switchOn(one, position) {
  const more = one.features.map(([layer, index, most]) => [`${layer}/${position}/${index}`, { value: Number(most.toPrecision(5)), label: one.label }]);
  change({ ...store.steer.value.changes, ...Object.fromEntries(more) });
}

function resetSteer() {
  change({});
  setSteered({ answer: null });
}

async function findLabels(text) {
  if (!text.trim()) { store.labels.value = []; return; }
  store.labels.value = await ask("labels", { run: store.route.value.run, q: text }).catch(() => []);
}

async function runSteer() {
  const { node } = store.route.value, { changes, mode, tokens } = store.steer.value;
  const plain = Object.fromEntries(Object.entries(changes).map(([key, change]) => [key, typeof change === "object" ? { value: change.value } : change]));
  const groups = {};
  for (const [key, id] of Object.entries(store.drawn.value.members)) if (store.model.value.byKey.has(key)) (groups[id] ??= []).push(key);
  for (const key of Object.keys(store.drawn.value.pins)) if (!(key in store.drawn.value.members) && store.model.value.nodes[store.model.value.byKey.get(key)]?.kind === "feature") groups[key] = [key];
  setSteered({ working: true });
  try {
    const answer = await send("steer", { ...here(), changes: plain, mode, tokens, groups, target: node });
    const levels = Object.fromEntries(Object.entries(answer.levels).filter(([, level]) => level !== null));
    setSteered({ working: false, answer: { ...answer, levels } });
    store.say("steered");
  } catch (error) {
    setSteered({ working: false });
    store.say(error.message);
  }
}

// One edge, looked at closely: the heads that it goes through come from the graph's own record, else from the model.
function openEdge(target, source) {
  const { nodes, attention, live } = store.model.value;
  const ends = { target: nodes[target].key, source: nodes[source].key };
  const same = store.route.value.edge === ends.source && store.route.value.node === ends.target;
  store.go({ node: ends.target, edge: same ? "" : ends.source, side: "node" });
  if (!same && live && nodes[source].kind !== "bias" && !recordedHeads(attention, ends.target, ends.source)) askHeads(ends.target, ends.source);
}

// Ask, and keep the answer unless something else was asked meanwhile.
async function lookUp(signal, path, asked) {
  signal.value = { ...asked, answer: null };
  const mine = signal.value;
  const found = await send(path, { ...here(), ...asked }).then((answer) => ({ answer }), (error) => ({ problem: error.message }));
  if (signal.value === mine) signal.value = { ...asked, ...found };
}

// What silencing an edge's source does to its target, beside what the edge says.
const askHeads = (target, source) => lookUp(store.heads, "heads", { target, source });
const tryEdge = (target, source) => lookUp(store.tried, "steer", { target, source, changes: { [source]: 0 }, mode: "steer" });

// Why a head looked where it did: `asked` has layer and head, and a query or an edge's two ends.
function explainHead(asked) {
  store.go({ side: "heads", look: formatLook(asked) });
  if (!recordedLook(store.model.value.attention, asked)) lookUp(store.look, "attention", asked);
}

async function askModel() {
  const { run, prompt } = store.route.value;
  store.live.value = { answer: null, working: true, problem: "" };
  const found = await send("answer", { run, prompt, tokens: 12 }).then((answer) => ({ answer: { ...answer, run }, problem: "" }), (error) => ({ answer: null, problem: error.message }));
  store.live.value = { working: false, ...found };
}

// Trace what came at a position: everything before it is the prompt, and the token itself is explained.
async function traceAt(ids, position) {
  const { run } = store.route.value;
  if (position <= 0) return store.say("nothing comes before the first token");
  try {
    store.job.value = await send("trace", { run, ids: ids.slice(0, position), token: ids[position] ?? null });
    return follow(store.job.value.id);
  } catch (error) { return store.say(error.message); }
}

// The same prompt at a checkpoint: shown where it has been traced, else traced first. Only the last step asked for counts.
let wantedStep = null;
async function toStep(step) {
  wantedStep = step;
  const { run, slug } = store.route.value, { traced } = store.model.value;
  if (step === null || traced.includes(step)) return store.go({ step: step === null ? "" : String(step), edge: "" });
  for (let n = 0; n < 120; n++) { // an earlier trace ends first
    if (store.job.value?.state === "running") await send("cancel", { id: store.job.value.id }).catch(() => null);
    const job = await send("trace-step", { run, slug, step }).catch((error) => ({ state: "refused", error: error.message }));
    if (wantedStep !== step) return undefined;
    if (job.state !== "refused") { store.job.value = job; return follow(job.id); }
    if (!job.error.includes("at work")) return store.say(job.error);
    await new Promise((done) => setTimeout(done, 250));
  }
  return undefined;
}

async function follow(id) {
  for (;;) {
    await new Promise((done) => setTimeout(done, 250));
    const job = await ask("job", { id }).catch((error) => ({ id, state: "failed", error: error.message }));
    if (store.job.value?.id !== id) return;
    store.job.value = job;
    if (job.state === "running") continue;
    if (job.state !== "done") return;
    if (job.step) { store.model.value.traced.push(job.step); if (job.step === wantedStep) store.go({ step: String(job.step), edge: "" }); }
    else store.go({ page: "graph", run: job.run, slug: job.slug, step: "", node: "", edge: "", picked: "", q: "", zoom: "", share: "", side: "node", prompt: "" }, { push: true });
    return;
  }
}

async function cancelJob() {
  await send("cancel", { id: store.job.value.id }).catch((error) => store.say(error.message));
}

export const act = {
  resetSteer, multiply, dropChanges, switchOn, findLabels, runSteer, openEdge, askHeads, tryEdge, explainHead, toStep, askModel, traceAt, cancelJob,
  closeJob: () => { store.job.value = null; },
  traceToken: (position) => traceAt(store.model.value.token_ids, position),
  go: store.go, say: store.say, edit: store.edit, choose, togglePin, watchFeature, takeQParams, order, quiet,
  pick: (ids) => store.go({ picked: ids.join(" ") }),
};
