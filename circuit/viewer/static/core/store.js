// The one state of the page, and what changes it. Views read `state` and call `act`; nothing else holds anything.

import { signal, computed, batch } from "../vendor/preact.js";
import { ask, send, fixed } from "./server.js";
import { format, parse } from "./address.js";
import { apply, inverse, isEmpty, nothing, remember, stepBack, stepForward, merge, untouched } from "./edits.js";
import { firstShare, prepare, shownNodes, suggested } from "./model.js";
import { parseQuery } from "./query.js";
import { parseChanges } from "./changes.js";
import { nodeName } from "./format.js";

export const route = signal(parse(location.hash));
export const runs = signal(null);
export const model = signal(null);
const served = signal(nothing()); // what is kept beside the graph, as the server said last
const pending = signal([]); // edits that are on their way to it
export const kept = computed(() => pending.value.reduce(apply, served.value));
export const history = signal({ past: [], future: [] });
export const status = signal("");
export const problem = signal("");
export const help = signal(false);
export const feature = signal(null); // the dashboard of the chosen feature, {key, answer, problem}
export const steered = signal({ answer: null, working: false }); // what steering gave
export const labels = signal([]); // what a search for labels found
export const heads = signal(null); // the heads of one edge, {target, source, answer, problem}
export const tried = signal(null); // what silencing an edge's source did, {target, source, answer, problem}
export const look = signal(null); // why a head looked somewhere, {asked, answer, problem}
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

// Each reads one field of the address, so that a click on a node does not lay out the graph anew.
const field = (name) => computed(() => route.value[name]);
const [q, node, errors, biases, askedShare, changes, mode, write] = ["q", "node", "errors", "biases", "share", "changes", "mode", "write"].map(field);

export const hasKept = computed(() => Object.keys(kept.value.pins).length > 0 || kept.value.revision > 0 || pending.value.length > 0);
export const drawn = computed(() => (hasKept.value || !model.value ? kept.value : { ...kept.value, ...suggested(model.value) }));
export const share = computed(() => (askedShare.value === "" ? (model.value ? firstShare(model.value) : 1) : Number(askedShare.value)));
export const chosen = computed(() => model.value?.byKey.get(node.value) ?? -1);
export const query = computed(() => (q.value.trim() ? parseQuery(q.value) : null));

export const steer = computed(() => ({ ...steered.value, changes: parseChanges(changes.value), mode: mode.value, tokens: Math.max(0, Math.min(64, Number(write.value) || 0)) }));

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
  return shownNodes(model.value, { share: share.value, errors: errors.value === "1", biases: biases.value === "1" }, always);
});

// -- what is loaded ---------------------------------------------------------------------------------------------

const pairOf = ({ run, slug, step, withrun, with: second, withstep }) => [{ run, slug, step }, { run: withrun || run, slug: second, step: withstep }];
let visit = 0, stays = "";
export const sameGraph = () => stays === `${route.value.run}/${route.value.slug}`;

export async function load() {
  const mine = ++visit;
  const { page, run, slug, big, step } = route.value;
  try {
    if (page === "compare") {
      const [list, ...both] = await Promise.all([ask("runs", {}), ...pairOf(route.value).map((at) => (at.slug ? ask("graph", at) : null))]);
      if (mine !== visit) return;
      const { run, withrun, step, withstep } = route.value;
      batch(() => { runs.value = list; sides.value = both.map((data, side) => data && { ...prepare(data), run: side ? withrun || run : run, step: side ? withstep : step }); problem.value = ""; });
    } else if (page === "graph") {
      await queue; // edits of the page that is left are kept first
      const data = await ask("graph", { run, slug, step, ...(big ? { features: 5000, links: 200000, node: 1, edge: 1 } : {}) });
      if (mine !== visit) return;
      batch(() => {
        if (stays !== `${run}/${slug}`) { // another graph: at another step of the same, pins and undo go on
          history.value = { past: [], future: [] };
        }
        stays = `${run}/${slug}`;
        model.value = prepare(data);
        served.value = data.kept ?? nothing();
        steered.value = { answer: null, working: false };
        heads.value = tried.value = look.value = null;
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

export const taken = (answer) => { served.value = answer; };

async function refresh() {
  const { run, slug, page } = route.value;
  if (page !== "graph") return;
  const mine = here();
  const answer = await ask("kept", { run, slug }).catch(() => null);
  if (answer && mine === here() && answer.revision > served.value.revision) served.value = answer;
}

// Shown at once, kept in the order in which edits were made; what cannot be kept is taken back and said. `start` is what
// an untouched graph begins with: the server takes it where nobody was quicker.
function keep(changes, start = null) {
  const { run, slug } = route.value, mine = here();
  const one = start ? merge(start, changes) : changes;
  pending.value = [...pending.value, one];
  queue = queue.then(async () => {
    let answer = null;
    try {
      answer = await send("kept", { run, slug, changes, start });
      others?.postMessage(mine);
    } catch (error) { say(`not kept: ${error.message}`); answer = served.value; }
    batch(() => {
      if (mine === here()) {
        if (!answer) served.value = { ...apply(served.value, one), revision: served.value.revision + 1 }; // a page without a server
        else if (answer.revision >= served.value.revision) served.value = answer;
      }
      pending.value = pending.value.filter((other) => other !== one);
    });
  });
}

// The first edit takes over the groups that were suggested, so that nothing in sight disappears.
export function edit(changes, name) {
  const start = hasKept.value || !touchesSubgraph(changes) ? null : suggested(model.value);
  const all = start ? merge(start, changes) : changes;
  if (isEmpty(all)) return;
  history.value = remember(history.value, all, inverse(kept.value, all), name);
  keep(changes, start);
  say(name);
}

const touchesSubgraph = (changes) => ["pins", "members", "groups", "places"].some((section) => changes[section]);

export function undo() {
  const step = stepBack(history.value);
  if (!step) return say("nothing to undo");
  history.value = step.history;
  keep(untouched(kept.value, step.changes, step.made));
  say(`undone: ${step.name}`);
}

export function redo() {
  const step = stepForward(history.value);
  if (!step) return say("nothing to redo");
  history.value = step.history;
  keep(untouched(kept.value, step.changes, step.made));
  say(`again: ${step.name}`);
}

export function say(text) {
  status.value = text;
}
