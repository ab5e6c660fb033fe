// Which page is shown: the address after # names it, so that every view can be bookmarked.

import { address, ask, el, number } from "./dom.js";
import { showGraph } from "./graph.js";
import { featureDashboard } from "./feature.js";

const page = document.getElementById("page");
const trail = document.getElementById("trail");
let visit = 0;

async function listPage() {
  const { root, runs } = await ask("runs", {});
  return {
    title: root,
    trail: [el("span", {}, root)],
    body: runs.map((run) =>
      el("section", {}, el("h2", {}, run.name, " ", el("span", { class: "soft" }, run.kind)), graphList(run)),
    ),
  };
}

function graphList(run) {
  const rows = run.graphs.map((graph) =>
    el(
      "a",
      { class: "card", href: address("graph", { run: run.name, slug: graph.slug }) },
      el("span", {}, el("b", {}, graph.slug), " ", el("span", { class: "soft" }, graph.prompt)),
      el("span", { class: "soft" }, scoreText(graph.scores)),
    ),
  );
  if (run.features) {
    rows.push(el("a", { class: "card", href: address("feature", { run: run.name, layer: 0, feature: 0 }) }, "Features"));
  }
  if (!rows.length) rows.push(el("p", { class: "soft" }, "no graphs yet: crosslace trace writes them"));
  return el("div", { class: "list" }, rows);
}

function scoreText(scores) {
  const score = scores.replacement_score;
  return score === undefined ? "" : `replacement score ${number(score)}`;
}

async function graphPage(parameters) {
  const run = parameters.get("run") ?? "";
  const slug = parameters.get("slug") ?? "";
  const data = await ask("graph", { run, slug });
  return {
    title: slug,
    trail: [el("a", { href: "#/" }, run), el("span", {}, slug)],
    body: showGraph(data, { run, slug }),
  };
}

async function featurePage(parameters) {
  const run = parameters.get("run") ?? "";
  const layer = Number(parameters.get("layer") ?? 0);
  const feature = Number(parameters.get("feature") ?? 0);
  const answer = await ask("feature", { run, layer, feature });
  const move = (name, value, most) =>
    el("label", {}, name, " ", el("input", {
      type: "number", min: 0, max: most, value, "aria-label": name,
      onchange: (event) => {
        const next = { run, layer, feature, [name]: event.target.value };
        location.hash = address("feature", next);
      },
    }));
  return {
    title: `layer ${layer}, feature ${feature}`,
    trail: [el("a", { href: "#/" }, run), el("span", {}, `layer ${layer}, feature ${feature}`)],
    body: [
      el("div", { class: "controls" },
        move("layer", layer, answer.features.length - 1),
        move("feature", feature, answer.features[layer] - 1)),
      el("article", { class: "card" }, featureDashboard(answer, { layer, feature })),
    ],
  };
}

async function show() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const pages = { "": listPage, graph: graphPage, feature: featurePage };
  const mine = ++visit;
  let made;
  try {
    if (!(path in pages)) throw new Error("there is no such page");
    made = await pages[path](new URLSearchParams(query));
  } catch (error) {
    made = { title: "Crosslace", trail: [], body: [el("p", { class: "card problem", role: "alert" }, error.message)] };
  }
  if (mine !== visit) return; // a later click was quicker
  document.title = `${made.title} · Crosslace`;
  trail.replaceChildren(...made.trail);
  page.replaceChildren(...made.body);
  document.body.dataset.ready = String(mine);
}

window.addEventListener("hashchange", show);
show();
