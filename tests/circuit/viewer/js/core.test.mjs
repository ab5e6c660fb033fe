// The parts of the page that are functions alone. Run by node's test runner (see test_javascript.py).

import assert from "node:assert/strict";
import { test } from "node:test";
import { readFileSync } from "node:fs";

const STATIC = new URL("../../../../circuit/viewer/static/", import.meta.url);
const load = (name) => import(new URL(name, STATIC));
const { parse, format, DEFAULTS } = await load("core/address.js");
const edits = await load("core/edits.js");
const { parseQuery } = await load("core/query.js");
const { prepare, shownNodes, firstShare, sentence, honestly, suggested, strongest } = await load("core/model.js");
const { layout, neighbour, LEFT } = await load("core/layout.js");
const { boxesOf, flows, arrange, bounds } = await load("graph/boxes.js");
const { token, number, percent } = await load("core/format.js");
const { Recorder } = await load("graph/recorder.js");
const dagre = (await load("vendor/dagre.js")).default;

// A graph of some layers and tokens, a feature in every third cell; every feature feeds the next one and the output.
function graph(layers = 4, tokens = 5, every = 3) {
  const nodes = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let position = 1; position < tokens; position++) {
      if ((layer * tokens + position) % every) continue;
      nodes.push({ kind: "feature", layer, position, index: 10 * layer + position, activation: position, influence: 1 / (nodes.length + 1), label: "" });
    }
  }
  const features = nodes.length, all = nodes.reduce((sum, node) => sum + node.influence, 0);
  let reached = 0;
  for (const node of nodes) node.share = (reached += node.influence) / all;
  for (let position = 0; position < tokens; position++) nodes.push({ kind: "embedding", layer: -1, position, index: position, activation: 0, influence: 0.1, share: 1, label: "" });
  nodes.push({ kind: "error", layer: 1, position: 1, index: 0, activation: 0, influence: 0.2, share: 0.5, label: "" });
  nodes.push({ kind: "logit", layer: layers, position: tokens - 1, index: 7, activation: 3, influence: 1, share: 0, label: " Austin", probability: 0.9 });
  for (const node of nodes) node.key = node.kind === "feature" ? `${node.layer}/${node.position}/${node.index}` : `${node.kind}/${node.position}`;
  const links = { source: [], target: [], weight: [], flow: [] };
  for (let i = 0; i < features; i++) {
    for (const target of [i + 1 < features ? i + 1 : null, nodes.length - 1]) {
      if (target === null) continue;
      links.source.push(i); links.target.push(target); links.weight.push(i % 2 ? -1 - i : 1 + i); links.flow.push(1 / (links.flow.length + 1));
    }
  }
  return prepare({
    nodes, links, layers, tokens: Array.from({ length: tokens }, (_, n) => ` word${n}`), masked: [], supernodes: [{ name: "state: Texas", members: [0, 1] }],
    size: { features, shown: features, feature_influence: all }, scores: { replacement_score: 0.8 }, shown_scores: { replacement_score: 0.7 }, accounting: { largest_violation: 1e-6, active_features: 100, left_out_features: 3 }, weight_name: "probability",
  });
}

test("an address is read as it was written, and defaults are left out", () => {
  const route = { page: "graph", ...DEFAULTS, run: "demo/clt", slug: "a b&c", q: 'layer:2 label~"x"', node: "1/7/310", share: "0.8" };
  assert.deepEqual(parse(format(route)), route);
  assert.equal(format({ page: "", ...DEFAULTS }), "#/");
  assert.deepEqual(parse("#/graph?__proto__=1&strange=2"), { page: "graph", ...DEFAULTS });
});

test("every edit is undone by its inverse, and both by turns", () => {
  let kept = edits.nothing();
  let history = { past: [], future: [] };
  const states = [kept];
  for (const change of [edits.pin(["a", "b"]), edits.group("g", "Texas", ["a", "b", "c"]), { notes: { a: "x" } }, edits.unpin(edits.apply(edits.apply(edits.nothing(), edits.group("g", "T", ["a"])), {}), ["a"]), { places: { g: [1, 2] } }]) {
    history = edits.remember(history, change, edits.inverse(kept, change), "step");
    kept = edits.apply(kept, change);
    states.push(kept);
  }
  for (let n = states.length - 2; n >= 0; n--) {
    const step = edits.stepBack(history);
    history = step.history;
    kept = edits.apply(kept, step.changes);
    assert.deepEqual(kept, states[n]);
  }
  assert.equal(edits.stepBack(history), undefined);
  for (let n = 1; n < states.length; n++) {
    const step = edits.stepForward(history);
    history = step.history;
    kept = edits.apply(kept, step.changes);
    assert.deepEqual(kept, states[n]);
  }
});

test("a step back leaves alone what another page has changed since", () => {
  const made = { groups: { g: "Texas" }, notes: { a: "x" } }, back = { groups: { g: null }, notes: { a: null } };
  const kept = edits.apply(edits.apply(edits.nothing(), made), { groups: { g: "the state" } }); // renamed elsewhere
  assert.deepEqual(edits.untouched(kept, back, made), { groups: {}, notes: { a: null } });
  assert.deepEqual(edits.untouched(edits.apply(edits.nothing(), back), made, back), made); // taken again
});

test("what is steered, and which head is asked about, is read as it was written", async () => {
  const { parseChanges, formatChanges, parseLook, formatLook } = await load("core/changes.js");
  const changes = { "1/7/310": -2, "1/7/3": 0.5, "0/9/12": { value: 5.25, label: "state: California = x~y" }, "2/9/1": { value: 1e-7, label: "" } };
  assert.deepEqual(parseChanges(formatChanges(changes)), changes);
  assert.deepEqual(parseChanges("1/7*2;x;1/7/310*NaN;1/7/310*1e;logit/1/2*3"), {});
  for (const look of [{ layer: 0, head: 3, query: 10 }, { layer: 0, head: 3, target: "logit/10/7", source: "1/7/310" }]) assert.deepEqual(parseLook(formatLook(look)), look);
  assert.equal(parseLook(""), null);
});

test("a record of heads is found by the page's keys", async () => {
  const { pageKey, recordedHeads, sourceOf } = await load("core/attention.js");
  const { nodeName } = await load("core/format.js");
  assert.deepEqual([["feature", 2, 4, 310], ["embedding", -1, 4, 77], ["logit", 4, 4, 7], ["error", 1, 2, 0], ["constant"]].map(pageKey), ["2/4/310", "E/4", "logit/4/7", "error/1/2", "constant"]);
  const record = { edges: [{ target: ["logit", 4, 4, 7], source: ["feature", 2, 4, 310], value: 2, heads: [[0, 1, 2]] }] };
  assert.equal(recordedHeads(record, "logit/4/7", "2/4/310").value, 2);
  assert.equal(recordedHeads(record, "logit/4/7", "2/4/311"), undefined);
  assert.equal(recordedHeads(null, "logit/4/7", "2/4/310"), undefined);
  const model = graph(), { layer, position, index } = model.nodes[0];
  assert.deepEqual(sourceOf(model, edits.nothing(), ["feature", layer, position, index], nodeName).i, 0);
  assert.match(sourceOf(model, edits.nothing(), ["feature", 1, 1, 999], nodeName).text, /feature 999 of L1/);
  assert.equal(sourceOf(model, edits.nothing(), ["constant"], nodeName).i, -1);
});

test("features and edges say in how many seeds they are", async () => {
  const { heldIn } = await load("core/attention.js");
  const from = ["embedding", -1, 1, 40], to = ["feature", 2, 4, 310];
  const seeds = { trainings: 5, features: [[...to, 4]], edges: [[from, to, 3]] };
  assert.deepEqual([heldIn(seeds, "features", "2/4/310"), heldIn(seeds, "edges", "E/1", "2/4/310")], ["4 of 5", "3 of 5"]);
  assert.deepEqual([heldIn(seeds, "edges", "2/4/310", "E/1"), heldIn(null, "edges", "E/1", "2/4/310")], ["", ""]);
});

test("unpinning the last member takes the group away, and not before", () => {
  const kept = edits.apply(edits.nothing(), edits.group("g", "Texas", ["a", "b"]));
  const one = edits.apply(kept, edits.unpin(kept, ["a"]));
  assert.deepEqual([one.pins, one.members, one.groups], [{ b: true }, { b: "g" }, { g: "Texas" }]);
  const none = edits.apply(one, edits.unpin(one, ["b"]));
  assert.deepEqual([none.pins, none.members, none.groups], [{}, {}, {}]);
});

test("edits that were made from the same state add up", () => {
  const start = edits.apply(edits.nothing(), edits.group("g", "Texas", ["a"]));
  const first = edits.group("g", "Texas", ["b"]), second = edits.group("g", "Texas", ["c"]);
  const both = edits.apply(edits.apply(start, first), second);
  assert.deepEqual(Object.keys(both.members).sort(), ["a", "b", "c"]);
});

test("the search takes words and filters", () => {
  const node = { kind: "feature", layer: 2, position: 4, index: 310, activation: 3.5, influence: 0.2, share: 0.1 };
  const tokens = ["a", "b", "c", "d", " Dallas"];
  const finds = (text) => parseQuery(text).test(node, "state: Texas", tokens, "my note");
  for (const text of ["texas", "layer:2", "layer:1-3", "act>3 label~TEXAS", "310", "token:dallas", "token~all", "kind:feature", "layer>=2 layer<=2", '"state: texas"', "influence>0.1", "note", "label:\"state: Texas\"", "feature:310"]) assert.ok(finds(text), text);
  for (const text of ["layer:3", "act>4", "label~ohio", "31", "layer:3-5", "act>3 label~ohio", "token:dall", "kind:error"]) assert.ok(!finds(text), text);
  assert.match(parseQuery("colour:red").problem, /there is no filter colour/);
  assert.match(parseQuery("layer:x").problem, /layer is a number/);
  assert.match(parseQuery("label>3").problem, /label is text/);
});

test("the slider shows by share, and what is chosen always", () => {
  const model = graph();
  const count = (share, more = {}, always = new Set()) => shownNodes(model, { share, errors: false, biases: false, ...more }, always).reduce((a, b) => a + b);
  assert.ok(count(1) > count(0.6) && count(0.6) > count(0));
  assert.equal(count(1, { errors: true }), count(1) + 1);
  assert.equal(count(0, {}, new Set([0])), count(0) + 1);
});

test("the first look holds no more than asked, and something", () => {
  const many = graph(30, 60, 2);
  const shown = shownNodes(many, { share: firstShare(many, 60), errors: false, biases: false });
  const features = many.nodes.filter((node, i) => shown[i] && node.kind === "feature").length;
  assert.ok(features >= 30 && features <= 75, String(features));
});

test("the sentence counts what is shown and what it carries", () => {
  const model = graph();
  const shown = shownNodes(model, { share: model.nodes[1].share, errors: false, biases: false });
  const carried = (1 + 1 / 2) / model.size.feature_influence;
  assert.equal(sentence(model, shown), `The 2 strongest features carry ${percent(carried)} of all ${model.size.features} features’ influence on “Austin” (90%); they lie in ${model.nodes[0].layer === model.nodes[1].layer ? "1 layer" : "2 layers"} of 4.`);
  const strip = honestly(model, shown, 1, 2).map(([text]) => text).join("; ");
  assert.match(strip, /2 of 5 features shown; 1 of 2 edges drawn; 3 of 100 active ones left out/);
  assert.match(strip, /30% comes from errors/);
});

test("thirty layers and sixty tokens fit, whatever the room", () => {
  const model = graph(30, 60, 2);
  const shown = new Uint8Array(model.n).fill(1);
  for (const [width, height] of [[960, 420], [680, 320], [370, 520]]) {
    const at = layout(model, shown, width, height);
    for (let i = 0; i < model.n; i++) {
      assert.ok(at.x[i] >= LEFT - 1 && at.x[i] <= width, `x ${at.x[i]} of ${width}`);
      assert.ok(at.y[i] >= 0 && at.y[i] <= height, `y ${at.y[i]} of ${height}`);
    }
  }
});

test("layers that show nothing take no room; higher layers stand higher", () => {
  const model = graph(30, 5);
  const shown = new Uint8Array(model.n);
  model.nodes.forEach((node, i) => { if (node.kind !== "feature" || node.layer === 3 || node.layer === 20) shown[i] = node.kind === "error" ? 0 : 1; });
  const at = layout(model, shown, 900, 400);
  assert.deepEqual(at.rows.map((row) => row.name), ["output", "L20", "L3"]);
  assert.ok(at.rows[0].y < at.rows[1].y && at.rows[1].y < at.rows[2].y && at.rows[2].y < at.floor);
});

test("arrows go to a node that lies in their direction", () => {
  const model = graph();
  const shown = new Uint8Array(model.n).fill(1), at = layout(model, shown, 900, 400);
  for (let from = 0; from < model.n; from++) {
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      const next = neighbour(at, shown, from, dx, dy);
      if (next >= 0) assert.ok(dx * (at.x[next] - at.x[from]) + dy * (at.y[next] - at.y[from]) > 0);
    }
  }
});

test("boxes hold the pinned nodes, and what passes between them is the sum of its links", () => {
  const model = graph();
  const kept = edits.apply(edits.nothing(), edits.merge(edits.group("g", "Texas", [model.nodes[0].key, model.nodes[1].key]), edits.pin([model.nodes.at(-1).key, "9/9/9"])));
  const { boxes, missing } = boxesOf(model, kept);
  assert.deepEqual(boxes.map((box) => box.members), [[0, 1], [model.n - 1]]);
  assert.deepEqual(missing, ["9/9/9"]);
  const [flow] = flows(model, boxes);
  const expected = [0, 1].flatMap((i) => strongest(model, model.outOf, i)).filter((link) => model.target[link] === model.n - 1)
    .reduce((sum, link) => sum + Math.sign(model.weight[link]) * model.flow[link], 0);
  assert.ok(Math.abs(flow.flow - expected) < 1e-6);
  const at = arrange(dagre, boxes, [flow], { g: [500, 7] });
  assert.deepEqual(at[0], { x: 500, y: 7 });
  const view = bounds(boxes, at);
  assert.ok(view.x < 500 && view.x + view.width > 500);
});

test("what is suggested are groups first come by what they carry, tokens and answers", () => {
  const model = graph();
  const changes = suggested(model, 3);
  assert.equal(changes.groups.s0, "state: Texas");
  assert.equal(Object.keys(changes.members).length, 2);
  assert.ok(changes.pins[model.nodes.at(-1).key]);
});

test("tokens and numbers read well", () => {
  assert.deepEqual([" the", "\n", " ", "", "a\tb"].map(token), ["the", "⏎", "␣", "∅", "a⇥b"]);
  assert.deepEqual([0, 1234.5678, 0.00012, NaN, null].map((value) => number(value)), ["0", "1230", "1.2e-4", "–", "–"]);
});

test("what is painted as SVG is text, never markup", () => {
  const recorder = new Recorder(10, 10, () => ({ width: 5 }));
  recorder.fillText('<script>&"\u0001', 1, 2);
  assert.ok(recorder.svg('a"<b>').includes("&lt;script&gt;&amp;&quot;\ufffd"));
  assert.ok(!recorder.svg('a"<b>').includes("<b>"));
});

test("no view reaches for the address, storage or the server by itself", () => {
  for (const name of ["graph/linkgraph.js", "graph/subgraph.js", "panels/node.js", "panels/list.js", "panels/strip.js", "panels/controls.js", "panels/steer.js", "panels/heads.js", "panels/edge.js", "panels/steps.js", "pages/graph.js", "pages/compare.js", "pages/runs.js"]) {
    const text = readFileSync(new URL(name, STATIC), "utf8");
    assert.ok(!/\bfetch\(|localStorage|location\.|core\/store\.js/.test(text), name);
  }
});

test("tokens are aligned by what prompts have in common, and a token that differs stands for its counterpart", async () => {
  const { align, compare } = await load("core/compare.js");
  assert.deepEqual(align(["a", "b", "c"], ["a", "b", "c"]), [0, 1, 2]);
  assert.deepEqual(align(["the", "capital", "of", "Dallas", "is"], ["well", "the", "capital", "of", "Oakland", "is"]), [1, 2, 3, 4, 5]);
  assert.deepEqual(align(["a", "x", "y", "b"], ["a", "z", "b"]), [0, -1, -1, 2]);
  const a = { ...graph(), run: "r" }, b = { ...graph(), run: "r", step: "40" };
  const same = compare(a, b);
  assert.equal(same.pairs.length, a.n);
  assert.deepEqual([same.lost, same.gained, same.byLabel], [[], [], false]);
  b.nodes = b.nodes.map((node, i) => (i === 0 ? { ...node, index: 999 } : node));
  const differing = compare(a, b);
  assert.deepEqual([differing.lost, differing.gained], [[0], [0]]);
  const labelled = [a, b].map((model, n) => ({ ...model, run: String(n), nodes: model.nodes.map((node, i) => (i < 2 ? { ...node, label: `state: Texas (F1 0.${n + 1})`, position: 1 } : node)) }));
  const across = compare(...labelled);
  assert.ok(across.byLabel && across.pairs.some(([i, j]) => i === 0 && j === 0));
});
