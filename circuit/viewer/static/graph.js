// The graph page: a summary picture, and all nodes by layer and position, with the edges of whatever is looked at.

import { address, ask, el, number, token } from "./dom.js";
import { dashboard } from "./feature.js";
import { drawGraph, nodeName } from "./canvas.js";

export function showGraph(data, at) {
  const state = { share: 0.8, links: 300, errors: false, biases: false, chosen: null, group: null, text: "" };
  const side = el("aside", { class: "card side", "aria-label": "Chosen node" });
  const canvas = el("div", { class: "card canvas" });
  const groups = el("div", { class: "groups", "aria-label": "Supernodes" });
  const linksOf = indexLinks(data);

  const redraw = () => {
    canvas.replaceChildren(drawGraph(data, linksOf, state, choose));
    for (const button of groups.children) button.setAttribute("aria-pressed", String(button.dataset.name === state.group));
  };
  const choose = (i) => {
    state.chosen = state.chosen === i ? null : i;
    redraw();
    describe();
  };
  const describe = () => side.replaceChildren(...(state.chosen === null ? hint(data) : nodePanel(data, linksOf, state.chosen, choose, at)));

  groups.append(...data.supernodes.map((group) =>
    el("button", {
      class: "plain", "data-name": group.name, "aria-pressed": "false",
      onclick: () => { state.group = state.group === group.name ? null : group.name; redraw(); },
    }, `${group.name} · ${group.members.length}`)));
  redraw();
  describe();

  const picture = el("img", {
    class: "picture", alt: `The strongest parts of the circuit for: ${data.prompt}`,
    src: `/api/picture?${new URLSearchParams(at)}`,
  });
  const nodes = el("div", {}, controls(state, redraw), groups, el("div", { class: "split" }, canvas, side));
  return [el("h1", {}, data.prompt), figures(data), tabs({ "All nodes": nodes, "In short": picture })];
}

// The edges in and out of every node, strongest first (that is the order they come in).
function indexLinks(data) {
  const links = data.nodes.map(() => ({ in: [], out: [] }));
  data.links.forEach(([source, target], i) => {
    links[target].in.push(i);
    links[source].out.push(i);
  });
  return links;
}

function weighed(data, node) {
  return data.weight_name === "probability" ? `${number(100 * node.probability)}%` : number(node.probability);
}

function figures(data) {
  const chip = (name, value, warn) => el("span", { class: warn ? "chip warn" : "chip" }, `${name} `, el("b", {}, value));
  const logits = data.nodes.filter((node) => node.kind === "logit").slice(0, 4);
  const { largest_violation: violation, active_features: active, left_out_features: left } = data.accounting;
  return el("div", { class: "chips" },
    logits.map((node) => chip(token(node.label), weighed(data, node))),
    chip("replacement score", number(data.scores.replacement_score)),
    chip("completeness", number(data.scores.completeness)),
    chip("completeness (circuit-tracer)", number(data.scores.completeness_ct)),
    violation === undefined ? null : chip("largest violation of the sums", number(violation, 2), violation > 1e-2),
    active === undefined ? null : chip("active features", `${active}, ${left ?? 0} left out`),
    chip("shown", `${data.size.shown} of ${data.size.features} features`));
}

function tabs(panels) {
  const names = Object.keys(panels);
  const box = el("div", {});
  const buttons = names.map((name) => el("button", { role: "tab", onclick: () => open(name) }, name));
  const open = (name) => {
    buttons.forEach((button, i) => button.setAttribute("aria-selected", String(names[i] === name)));
    box.replaceChildren(panels[name]);
  };
  open(names[0]);
  return el("div", {}, el("div", { class: "tabs", role: "tablist" }, buttons), box);
}

function controls(state, redraw) {
  const slider = (name, key, low, high, step, shown) => {
    const output = el("output", {}, shown(state[key]));
    return el("label", {}, name, el("input", {
      type: "range", min: low, max: high, step, value: state[key], "aria-label": name,
      oninput: (event) => { state[key] = Number(event.target.value); output.textContent = shown(state[key]); redraw(); },
    }), output);
  };
  const box = (name, key) => el("label", {}, el("input", {
    type: "checkbox", onchange: (event) => { state[key] = event.target.checked; redraw(); },
  }), name);
  return el("div", { class: "controls" },
    slider("nodes: share of influence", "share", 0, 1, 0.01, (value) => `${Math.round(100 * value)}%`),
    slider("edges drawn", "links", 0, 2000, 50, String),
    box("errors", "errors"), box("biases", "biases"),
    el("input", { type: "search", placeholder: "find a label", "aria-label": "find a label",
      oninput: (event) => { state.text = event.target.value.trim().toLowerCase(); redraw(); } }));
}

function hint(data) {
  return [
    el("h2", {}, "Choose a node"),
    el("p", { class: "soft" }, `Circles are features, diamonds errors, and the prompt's ${data.tokens.length} tokens stand below. ` +
      "A click shows what feeds a node, what it feeds, and what its feature responds to."),
  ];
}

function nodePanel(data, linksOf, i, choose, at) {
  const node = data.nodes[i];
  const where = [node.layer >= 0 && node.kind !== "logit" ? `layer ${node.layer}` : null, `token ${node.position} “${token(data.tokens[node.position])}”`];
  const facts = [["kind", node.kind], ["at", where.filter(Boolean).join(", ")], ["influence", `${number(node.influence)} (rank share ${number(node.share)})`]];
  if (node.kind === "feature") facts.push(["feature", String(node.index)], ["activation", number(node.activation)]);
  if (node.kind === "logit") facts.push([data.weight_name, weighed(data, node)], ["demeaned logit", number(node.activation)]);
  const parts = [
    el("h1", {}, nodeName(data, node)),
    el("dl", { class: "facts" }, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]).flat()),
    el("h3", {}, "inputs"), edgeList(data, linksOf[i].in, 0, choose),
    el("h3", {}, "outputs"), edgeList(data, linksOf[i].out, 1, choose),
  ];
  if (node.kind === "feature") parts.push(featurePart(node, at));
  return parts;
}

function edgeList(data, links, end, choose) {
  if (!links.length) return el("p", { class: "soft" }, "none");
  const ranked = [...links].sort((a, b) => Math.abs(data.links[b][2]) - Math.abs(data.links[a][2])).slice(0, 12);
  const most = Math.abs(data.links[ranked[0]][2]);
  return el("ul", { class: "edges" }, ranked.map((link) => {
    const weight = data.links[link][2];
    const other = data.links[link][end];
    const node = data.nodes[other];
    const meter = el("span", { class: weight < 0 ? "meter minus" : "meter" });
    meter.style.width = `${Math.max(3, (100 * Math.abs(weight)) / most)}%`;
    return el("li", {}, el("button", { onclick: () => choose(other), title: nodeName(data, node) },
      meter, el("span", { class: "name" }, nodeName(data, node), " ", el("span", { class: "where" }, place(node))),
      el("span", { class: "weight" }, number(weight))));
  }));
}

function place(node) {
  return node.layer >= 0 && node.kind !== "logit" ? `L${node.layer} · ${node.position}` : `${node.position}`;
}

function featurePart(node, at) {
  const box = el("section", {}, el("h3", {}, "feature"), el("p", { class: "soft" }, "loading…"));
  const where = { run: at.run, layer: node.layer, feature: node.index };
  ask("feature", where).then(
    (answer) => box.replaceChildren(
      el("h3", {}, "feature"),
      el("p", {}, el("a", { href: address("feature", where) }, `layer ${node.layer}, feature ${node.index}`)),
      ...dashboard(answer.record)),
    (error) => box.replaceChildren(el("h3", {}, "feature"), el("p", { class: "soft" }, error.message)));
  return box;
}
