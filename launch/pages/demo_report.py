"""The demos' pages: what was trained, how well, the circuit, and the swap, in one file that needs no network."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..terminal import duration
from ..workspace import runs
from .charts import Chart, Series
from .html import grid, page, table
from .run_page import controls_table

RUNS = ("clt", "plt")
EXAMPLES = 8
SHOWN = ("prompt", "before", "other", "wanted", "after", "probability_before", "probability_after")


def write_demo_report(folder: Path, summary: dict[str, Any]) -> Path:
    """`report.html` from what the stages left in the folder."""
    results = {kind: runs.read_json(folder / kind / "eval.json") for kind in RUNS}
    trace = runs.read_json(folder / "stages" / "trace.json")
    swaps = runs.read_json(folder / "swap.json")
    graph, swap = summary["graph"], summary["swap"]
    parts = [
        *_the_world(summary),
        "<h2>Training</h2>",
        grid([_losses(folder).svg(), _per_layer(results, "nmse").svg(), _per_layer(results, "l0").svg()]),
        table(("run", *summary["transcoders"]["clt"]), [(k, *v.values()) for k, v in summary["transcoders"].items()]),
        "<h2>The circuit</h2>",
        _sentence(
            f"Asked “{graph['prompt']}”, the model says “{graph['top_token']}”. The strongest path through a feature "
            f"named after a state reads {' → '.join(graph['path']) or 'nothing'}; the graph explains "
            f"{graph['replacement_score']:.0%} of the influence on the answer by features (replacement score)."
        ),
        f"<figure>{_picture(folder / 'clt')}</figure>",
        _sentence(
            f"Over {trace['checked']['cities']} held-out cities, the path names the right state for "
            f"{trace['checked']['right']}. Below, the same prompt through the per-layer transcoder."
        ),
        f"<figure>{_picture(folder / 'plt')}</figure>",
        "<h2>The swap</h2>",
        _sentence(
            f"In {swap['pairs']} pairs of held-out cities, the features of the first city's state were replaced by "
            f"those of the second's at the last position. The answer became the other state's in "
            f"{swap['success_rate']:.0%}; replacing as many random features gave it in "
            f"{swap['control_success_rate']:.0%}."
        ),
        grid([_before_after(swaps).svg(), _rates(swap).svg()]),
        table(
            ("prompt", "answer", "state taken from", "wanted", "first token said", "p before", "p after"),
            [
                (
                    s["prompt"],
                    s["before"],
                    s["other"],
                    s["wanted"],
                    s["after"],
                    s["probability_before"],
                    s["probability_after"],
                )
                for s in swaps[:EXAMPLES]
            ],
        ),
        "<h2>Time</h2>",
        _times(summary),
    ]
    lead = "A small language model, two transcoders trained on it, and a circuit that can be checked."
    runs.write_text(folder / "report.html", page("Crosslace: the demonstration", lead, "".join(parts)))
    return folder / "report.html"


def write_model_demo_report(folder: Path, summary: dict[str, Any], result: dict[str, Any]) -> Path:
    """The page of a demo on a real model: a PLT beside its controls, and tested circuits."""
    causal, left = result["causal"], result["causal"]["left_of_the_answer"]
    columns = ("kind", "prompt", "answer", "features", "clean", "path", "matched")
    parts = [
        "<h2>Training</h2>",
        grid([_losses(folder, ("plt",)).svg(), _per_layer({"plt": result}, "nmse").svg()]),
        controls_table(result["controls"]),
        "<h2>Are the circuits real?</h2>",
        _sentence(
            "For each prompt whose answer the model is sure of, the features on the strongest paths to the answer were "
            "silenced, and as many others of the same layers, positions and strengths. Of the answer's probability "
            f"{left['path']['mean']:.0%} was left in the first case and {left['matched']['mean']:.0%} in the second."
        ),
        table(
            ("kind", "prompt", "answer", "features silenced", "p untouched", "paths silenced", "matched silenced"),
            [[row[name] for name in columns] for row in causal["silenced"]],
        ),
        *_swaps_of_partners(causal),
        "<h2>Circuits</h2>",
    ]
    for graph in summary["graphs"]:
        parts += [
            f"<h3>{escape(graph['prompt'])}</h3>",
            _sentence(
                f"The answer is “{graph['answer'].strip()}” (p {graph['clean']:.2f}); features explain "
                f"{graph['replacement_score']:.0%} of the influence on it. With the features of its strongest paths "
                f"silenced p is {graph['path_silenced']:.3f}, with matched ones {graph['matched']:.3f}. "
                f"Strongest path: {graph['path']}"
            ),
            f"<figure>{_picture(folder / 'plt', graph['slug'])}</figure>",
        ]
    parts += ["<h2>Time</h2>", _times(summary)]
    lead = "A language model from outside, a dictionary of its MLPs made here, and circuits that were tested on it."
    runs.write_text(folder / "report.html", page("Crosslace: a real model", lead, "".join(parts)))
    return folder / "report.html"


def _swaps_of_partners(causal: dict[str, Any]) -> list[str]:
    if not causal["swapped"]:
        return []
    columns = ("prompt", "partner", "other", "other_swapped", "other_matched")
    return [
        _sentence("Where a prompt has a partner, the path features of both were set to what they are in the partner:"),
        table(
            ("prompt", "partner", "p of the partner's answer", "paths set", "matched set"),
            [[row[name] for name in columns] for row in causal["swapped"]],
        ),
    ]


def _times(summary: dict[str, Any]) -> str:
    return table(("stage", "time"), [(name, duration(value)) for name, value in summary["seconds"].items()])


def _sentence(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _the_world(summary: dict[str, Any]) -> list[str]:
    rows = [(name, entry["held_out_accuracy"]) for name, entry in summary["world"]["families"].items()]
    return ["<h2>The world</h2>", table(("family", "accuracy on held-out questions"), rows)]


def _losses(folder: Path, kinds: Sequence[str] = RUNS) -> Chart:
    series = []
    for kind in kinds:
        lines = (folder / kind / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        points = [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]
        series.append(Series(kind, points, dots=False))
    return Chart("Loss", "step", "loss", series, log_y=True)


def _per_layer(results: dict[str, Any], name: str) -> Chart:
    series = [Series(k, [(i, layer[name]) for i, layer in enumerate(r["layers"])]) for k, r in results.items()]
    layers = len(next(iter(results.values()))["layers"])
    title = {"nmse": "Error by layer (NMSE)", "l0": "Active features by layer (L0)"}[name]
    return Chart(title, "layer", name, series, bars=True, ticks={float(i): str(i) for i in range(layers)})


def _picture(run: Path, slug: str = "dallas") -> str:
    """The graph that `trace` drew, made by our own code from escaped text."""
    text = (run / "graphs" / slug / "graph.svg").read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _before_after(swaps: list[dict[str, Any]]) -> Chart:
    points = [(s["probability_before"], s["probability_after"]) for s in swaps]
    labels = [f"{s['prompt']} {s['wanted']}" for s in swaps]
    series = [Series("pairs", points, labels=labels, joined=False)]
    return Chart("Probability of the other state's answer", "before the swap", "after", series, y_range=(0.0, 1.0))


def _rates(swap: dict[str, Any]) -> Chart:
    values = [(0.0, swap["success_rate"]), (1.0, swap["control_success_rate"])]
    ticks = {0.0: "state features", 1.0: "random features"}
    return Chart("Answers that followed", "what was swapped", "share", [Series("", values)], bars=True, ticks=ticks)
