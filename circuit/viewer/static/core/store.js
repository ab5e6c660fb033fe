// The one state of the page, and what changes it. Views read `state` and call `act`; nothing else holds anything.

import { signal, computed, batch } from "../vendor/preact.js";
import { ask, send, fixed } from "./server.js";
import { format, parse } from "./address.js";
import { apply, inverse, isEmpty, nothing, remember, stepBack, stepForward, merge } from "./edits.js";
import { firstShare, prepare, shownNodes, suggested } from "./model.js";
import { parseQuery } from "./query.js";
import { nodeName } from "./format.js";

export const route = signal(parse(location.hash));
export const runs = signal(null);
export const model = signal(null);
export const kept = signal(nothing());
export const history = signal({ past: [], future: [] });
export const status = signal("");
export const problem = signal("");
export const help = signal(false);
export const feature = signal(null); // the dashboard of the chosen feature, {key, answer, problem}
export const steer = signal({ changes: {}, mode: "", tokens: 12, answer: null, working: false });
export const labels = signal([]); // what a search for labels found
export const heads = signal(null); // the heads of one edge, {target, source, answer, problem}
export const live = signal({ answer: null, working: false, problem: "" });
export const job = signal(null); // the trace at work
export const sides = signal([null, null]); // the two graphs that are compared

// -- the address ----------------------------------------------------------------------------------------------

export function go(change, { push = false } = {}) {
  const next = { ...route.value, ...change };
  const hash = format(next);
  if (hash === format(route.value)) return;
  try { window.history[push ? "pushState" : "replaceState"](null, "", hash); } catch { /* a frame without an address of its own */ }
  route.value = next;
}

window.addEventListener("hashchange", () => { route.value = parse(location.hash); });
window.addEventListener("popstate", () => { route.value = parse(location.hash); });

// -- what is derived --------------------------------------------------------------------------------------------

export const hasKept = computed(() => Object.keys(kept.value.pins).length > 0 || kept.value.revision > 0);
export const drawn = computed(() => (hasKept.value || !model.value ? kept.value : { ...kept.value, ...suggested(model.value) }));
export const share = computed(() => (route.value.share === "" ? (model.value ? firstShare(model.value) : 1) : Number(route.value.share)));
export const chosen = computed(() => model.value?.byKey.get(route.value.node) ?? -1);
export const query = computed(() => (route.value.q.trim() ? parseQuery(route.value.q) : null));

export const found = computed(() => {
  if (!query.value || !model.value) return null;
  const { tokens, nodes } = model.value;
  return new Set(nodes.flatMap((node, i) => (query.value.test(node, nodeName(model.value, kept.value, i), tokens, kept.value.notes[node.key] ?? "") ? [i] : [])));
});

// A click on what is shown already changes nothing here, so that nothing is laid out anew.
export const shown = computed(() => {
  const own = shownUnchosen.value;
  if (!own || chosen.value < 0 || own[chosen.value]) return own;
  const more = own.slice();
  more[chosen.value] = 1;
  return more;
});

const shownUnchosen = computed(() => {
  if (!model.value) return null;
  const always = new Set(Object.keys(drawn.value.pins).map((key) => model.value.byKey.get(key)).filter((i) => i !== undefined));
  if (found.value && !query.value.problem && found.value.size <= 400) for (const i of found.value) always.add(i);
  return shownNodes(model.value, { share: share.value, errors: route.value.errors === "1", biases: route.value.biases === "1" }, always);
});

// -- what is loaded ---------------------------------------------------------------------------------------------

const pairOf = ({ run, slug, withrun, with: second }) => [{ run, slug }, { run: withrun || run, slug: second }];
let visit = 0;

export async function load() {
  const mine = ++visit;
  const { page, run, slug, big } = route.value;
  try {
    if (page === "compare") {
      const [list, ...both] = await Promise.all([ask("runs", {}), ...pairOf(route.value).map((at) => (at.slug ? ask("graph", at) : null))]);
      if (mine !== visit) return;
      const { run, withrun } = route.value;
      batch(() => { runs.value = list; sides.value = both.map((data, side) => data && { ...prepare(data), run: side ? withrun || run : run }); problem.value = ""; });
    } else if (page === "graph") {
      const data = await ask("graph", { run, slug, ...(big ? { features: 5000, links: 200000, node: 1, edge: 1 } : {}) });
      if (mine !== visit) return;
      batch(() => {
        model.value = prepare(data);
        kept.value = data.kept ?? nothing();
        history.value = { past: [], future: [] };
        steer.value = { ...steer.value, changes: {}, answer: null };
        problem.value = "";
      });
    } else {
      const list = fixed ? { root: "", runs: [] } : await ask("runs", {});
      if (mine !== visit) return;
      batch(() => { runs.value = list; problem.value = ""; });
    }
  } catch (error) {
    if (mine === visit) problem.value = error.message;
  }
}

// -- edits --------------------------------------------------------------------------------------------------------

const others = typeof BroadcastChannel === "undefined" || fixed ? null : new BroadcastChannel("crosslace");
const here = () => `${route.value.run}/${route.value.slug}`;
let queue = Promise.resolve();

others?.addEventListener("message", (event) => { if (event.data === here()) refresh(); });
window.addEventListener("focus", () => { if (model.value && !fixed) refresh(); });

async function refresh() {
  const { run, slug, page } = route.value;
  if (page !== "graph") return;
  const mine = here();
  const answer = await ask("kept", { run, slug }).catch(() => null);
  if (answer && mine === here() && answer.revision > kept.value.revision) kept.value = answer;
}

// Shown at once, kept in the order in which edits were made; what cannot be kept is taken back and said.
function keep(changes) {
  const { run, slug } = route.value;
  const back = inverse(kept.value, changes);
  kept.value = apply({ ...kept.value, revision: kept.value.revision + 1 }, changes);
  queue = queue.then(async () => {
    try {
      const answer = await send("kept", { run, slug, changes });
      if (answer && run === route.value.run && slug === route.value.slug && answer.revision >= kept.value.revision) kept.value = answer;
      others?.postMessage(`${run}/${slug}`);
    } catch (error) {
      kept.value = apply(kept.value, back);
      say(`not kept: ${error.message}`);
    }
  });
}

// The first edit takes over the groups that were suggested, so that nothing in sight disappears.
export function edit(changes, name) {
  const first = hasKept.value || !touchesSubgraph(changes) ? changes : merge(suggested(model.value), changes);
  if (isEmpty(first)) return;
  history.value = remember(history.value, first, inverse(kept.value, first), name);
  keep(first);
  say(name);
}

const touchesSubgraph = (changes) => ["pins", "members", "groups", "places"].some((section) => changes[section]);

export function undo() {
  const step = stepBack(history.value);
  if (!step) return say("nothing to undo");
  history.value = step.history;
  keep(step.changes);
  say(`undone: ${step.name}`);
}

export function redo() {
  const step = stepForward(history.value);
  if (!step) return say("nothing to redo");
  history.value = step.history;
  keep(step.changes);
  say(`again: ${step.name}`);
}

export function say(text) {
  status.value = text;
}
