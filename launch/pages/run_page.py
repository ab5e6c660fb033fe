"""The page about one run: everything that `eval.json` holds, and the course of its training.

eval.json, metrics.jsonl -> charts (`charts.py`), tables and notices (`html.py`) -> one page; charts as PNGs
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .charts import LABELS, Chart, Series
from .html import grid, notice, page, table

Charts = dict[str, Chart]

EFFECTS = {
    "to_logits": "feature to logit",
    "to_logits_attention_frozen": "feature to logit, attention frozen",
    "to_features": "feature to feature",
}


def run_page(
    name: str, result: Mapping[str, Any], log: Sequence[Mapping[str, Any]], course: Mapping[str, Any] | None = None
) -> tuple[str, Charts]:
    """One run: everything that `eval.json` holds, the course of its training, and what its checkpoints were worth."""
    charts = _training_charts(log) | _layer_charts(result)
    body = [*(notice(text) for text in result["verdicts"])]
    if not result["verdicts"]:
        body.append(notice("No warning: it beats every control, and its features are in good health.", good=True))
    body += ["<h2>In short</h2>", _headline(result)]
    if "controls" in result:
        body += ["<h2>Against controls</h2>", controls_table(result["controls"])]
    drawn = lambda *names: grid([charts[n].svg() for n in names if n in charts])
    body += ["<h2>Layer by layer</h2>", drawn("nmse_by_layer", "l0_by_layer", "spliced", "depth"), _layers(result)]
    if "graph" in result:
        charts |= _graph_charts(result)
        body += ["<h2>Graphs</h2>", _graphs(result["graph"]), drawn("frontier", "error_share")]
    if "faithfulness" in result:
        body += ["<h2>Faithfulness</h2>", _faithfulness(result["faithfulness"]), drawn("growth")]
    body += ["<h2>Health of the features</h2>", drawn("density", "decoder_norm"), _health(result["health"])]
    if log:
        body += ["<h2>Training</h2>", drawn("loss", "training_nmse", "training_l0")]
    if course is not None:
        charts |= _course_charts(course["rows"])
        body += ["<h2>Over the checkpoints</h2>", drawn(*_COURSE), _course(course)]
    body += ["<h2>Made with</h2>", table(("what", "value"), [[k, str(v)] for k, v in result["made_with"].items()])]
    lead = f"Measured on {result['tokens']:,} held-out tokens; masked positions are left out."
    return page(f"Crosslace: {name}", lead, "".join(body)), charts


_COURSE = ("course_nmse", "course_l0", "course_dead", "course_scores", "course_graph")


def _course_charts(rows: Sequence[Mapping[str, Any]]) -> Charts:
    line = lambda key, name="": Series(
        name or key.replace("_", " "), [(float(row["step"]), row[key]) for row in rows if row.get(key) is not None]
    )
    charts = {
        "course_nmse": Chart("Reconstruction error", "step", "NMSE", [line("nmse")], log_y=True),
        "course_l0": Chart("Active features", "step", "L0 per layer", [line("l0")]),
        "course_dead": Chart("Dead features", "step", "share", [line("dead")]),
        "course_scores": Chart("Scores of graphs", "step", "score", [line("replacement_score"), line("completeness")]),
        "course_graph": Chart(
            "One graph",
            "step",
            "share of the last one's",
            [line("features_held", "features"), line("edges_held", "edges")],
        ),
    }
    return {name: chart for name, chart in charts.items() if any(series.points for series in chart.series)}


def _course(course: Mapping[str, Any]) -> str:
    heads = ("step", "nmse", "l0", "dead", "kl", "replacement_score", "completeness", "features_held", "edges_held")
    rows = [[row.get(name) for name in heads] for row in course["rows"]]
    said = (
        f"<p>The graph is that of “{escape(course['prompt'])}”; its features and edges are looked for at each step.</p>"
    )
    return said + table(heads, rows)


def _interval(part: Mapping[str, Any], name: str) -> str | None:
    low, high = part.get(f"{name}_interval") or (None, None)
    return None if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _headline(result: Mapping[str, Any]) -> str:
    overall, behaviour, graph = result["overall"], result["behaviour"], result.get("graph", {})
    rows = [
        [LABELS.get(name, name), overall.get(name), None]
        for name in ("nmse", "nmse_median", "worst_share", "fvu", "cosine", "l0", "l0_total", "dead", "dense")
    ]
    rows += [
        [LABELS.get(name, name), behaviour[name], _interval(behaviour, name)]
        for name in ("ce_recovered", "kl", "top1", "top1_hard")
    ]
    rows += [[f"cross-entropy, {name}", behaviour[f"ce_{name}"], None] for name in ("clean", "replaced", "ablated")]
    rows += [
        [LABELS.get(name, name), graph[name], _interval(graph, name)]
        for name in ("replacement_score", "completeness", "completeness_ct", "path_length")
        if name in graph
    ]
    if steps := result.get("steps"):
        rows.append(["steps that the features' writes to later layers skip", steps["share"], _interval(steps, "share")])
        rows.append(["the same for a random push", steps["control"], None])
    return table(("figure", "value", "95% interval"), rows)


def controls_table(controls: Mapping[str, Mapping[str, float]]) -> str:
    """The transcoder beside what it has to beat."""
    figures = ("nmse", "ce_recovered", "kl", "top1", "top1_hard")
    return table(("", *figures), [[name, *(row.get(figure) for figure in figures)] for name, row in controls.items()])


def _layers(result: Mapping[str, Any]) -> str:
    names = ("nmse", "nmse_median", "worst_share", "fvu", "cosine", "l0", "dead", "dense")
    spliced = {part["layer"]: part for part in result["behaviour"].get("layers", [])}
    rows = []
    for layer, health in zip(result["layers"], result["health"]["layers"]):
        alone = spliced.get(health["layer"], {})
        rows.append(
            [
                health["layer"],
                *(layer.get(name) for name in names),
                *(alone.get(name) for name in ("ce_recovered", "kl", "top1")),
            ]
        )
    return table(("layer", *names, "CE recovered alone", "KL alone", "top-1 alone"), rows)


def _graphs(graph: Mapping[str, Any]) -> str:
    columns = [name for name in graph["prompts"][0] if name != "prompt"]
    mean = [["mean", *(graph[name] for name in columns)]]
    interval = [["95% interval", *(_interval(graph, name) for name in columns)]]
    prompts = [[row["prompt"], *(row[name] for name in columns)] for row in graph["prompts"]]
    return (
        f"<p>Prompt set {escape(graph['prompt_set'])}; nodes and edges are those of the pruned graphs.</p>"
        + table(("", *columns), mean + interval)
        + f"<details><summary>Each prompt</summary>{table(('prompt', *columns), prompts, sortable=True)}</details>"
    )


def _faithfulness(found: Mapping[str, Any]) -> str:
    rows = []
    for kind, what in EFFECTS.items():
        if kind not in found:  # an evaluation of an earlier version
            continue
        for source, name in (("graph", "predicted by the graph"), ("random", "predicted for a matched random feature")):
            part = found[kind][source]
            figures = (part[figure] for figure in ("slope", "pearson", "spearman"))
            rows.append([what, name, part["pairs"], *figures, _interval(part, "slope")])
    heads = ("effect", "prediction", "pairs", "slope", "Pearson", "Spearman", "slope, 95% interval")
    return "<p>Effects of silencing features, measured by constrained interventions.</p>" + table(heads, rows)


def _health(found: Mapping[str, Any]) -> str:
    rows = [
        [layer["layer"], layer["l0"], layer["dead"], layer["dense"], layer["duplicates"], *layer["threshold"]]
        for layer in found["layers"]
    ]
    heads = ("layer", "L0", "dead", "dense", "duplicates", "threshold 5%", "median", "95%")
    return table(heads, rows)


def _layer_charts(result: Mapping[str, Any]) -> Charts:
    health = result["health"]["layers"]
    places = [layer["layer"] for layer in health]
    ticks = {float(layer): str(layer) for layer in places}
    bars = lambda title, y, values: Chart(
        title, "layer", y, [Series(y, list(zip(map(float, places), values)))], bars=True, ticks=ticks
    )
    charts = {
        "nmse_by_layer": bars("Reconstruction error", "NMSE", [layer["nmse"] for layer in result["layers"]]),
        "l0_by_layer": bars("Active features", "L0", [layer["l0"] for layer in result["layers"]]),
        "density": _density(health),
        "decoder_norm": Chart(
            "Decoder norm by layer written to",
            "layer written to",
            "mean norm",
            [
                Series(
                    f"from {layer['layer']}",
                    [(float(places[i + n]), norm) for n, norm in enumerate(layer["decoder_norm"])],
                )
                for i, layer in enumerate(health)
            ],
            ticks=ticks,
        ),
    }
    behaviour = result["behaviour"]
    if "layers" in behaviour:
        alone = [(float(part["layer"]), part["kl"]) for part in behaviour["layers"]]
        deep = [(float(part["last"]), part["kl"]) for part in behaviour["depth"]]
        charts["spliced"] = Chart(
            "One layer replaced", "layer", LABELS["kl"], [Series("KL", alone)], bars=True, ticks=ticks
        )
        charts["depth"] = Chart("Layers 0 to l replaced", "l", LABELS["kl"], [Series("KL", deep)], ticks=ticks)
    return charts


def _density(health: Sequence[Mapping[str, Any]]) -> Chart:
    bins = len(health[0]["density_histogram"])  # silent features, then one bin a power of ten up to 1
    names = ["never", *(f"≤{10.0**power:g}" for power in range(2 - bins, 1))]
    series = [
        Series(
            f"layer {layer['layer']}", [(float(n), float(count)) for n, count in enumerate(layer["density_histogram"])]
        )
        for layer in health
    ]
    ticks = {float(n): name for n, name in enumerate(names)}
    return Chart("How often features fire", "share of tokens", "features", series, bars=True, ticks=ticks)


def _graph_charts(result: Mapping[str, Any]) -> Charts:
    graph = result["graph"]
    points = lambda name: [(row["features"], row[name]) for row in graph["frontier"]]
    share = [(float(layer), value) for layer, value in enumerate(graph["error_share"])]
    charts = {
        "frontier": Chart(
            "Graph size against score",
            "features kept",
            "score",
            [Series(name.replace("_", " "), points(name)) for name in ("replacement_score", "completeness")],
            y_range=(0.0, 1.0),
        ),
        "error_share": Chart(
            "Influence of errors",
            "layer",
            "share",
            [Series("errors", share)],
            bars=True,
            ticks={x: f"{x:g}" for x, _ in share},
        ),
    }
    growth = result.get("faithfulness", {}).get("growth")
    if growth:
        line = lambda name: Series(name, [(float(row["layers"]), row[name]) for row in growth])
        charts["growth"] = Chart(
            "A perturbation on its way up",
            "layers above",
            "relative to the push or model",
            [line("growth"), line("error"), line("cosine")],
            ticks={float(row["layers"]): str(row["layers"]) for row in growth},
        )
    return charts


def _training_charts(log: Sequence[Mapping[str, Any]]) -> Charts:
    def course(title: str, y: str, names: Mapping[str, str], log_y: bool = False) -> Chart:
        series = [
            Series(
                label, [(float(row["step"]), float(row[key])) for row in log if row.get(key) is not None], dots=False
            )
            for key, label in names.items()
        ]
        return Chart(title, "step", y, [one for one in series if one.points], log_y=log_y)

    losses = sorted({key for row in log for key in row if key.startswith("loss/") and key.count("/") == 1})
    found = {
        "loss": course("Loss terms", "loss", {key: key.removeprefix("loss/") for key in losses}, log_y=True),
        "training_nmse": course(
            "Reconstruction error", "NMSE", {"nmse": "training", "held_out/nmse": "held out"}, True
        ),
        "training_l0": course("Active features", "L0 per layer", {"l0": "training", "held_out/l0": "held out"}),
    }
    return {name: chart for name, chart in found.items() if chart.series}
