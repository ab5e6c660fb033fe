"""`crosslace trace`: the attribution graph of a prompt's next token."""

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..terminal import Closing, table
from ..workspace import Job, open_replacement, runs

if TYPE_CHECKING:
    from ...circuit.graph import Graph


def run(job: Job) -> Closing:
    """Trace, label, save, draw."""
    from ...circuit.features import Labels, name_features
    from ...circuit.graph import strongest_paths_text, summary_text
    from ...circuit.viewer import render_graph_svg

    top, run_folder = job.top, Path(job.top.run)
    folder = run_folder / "graphs" / (top.slug or free_slug(run_folder, top.prompt))
    runs.writable(folder)
    model = open_replacement(job, run_folder, top.force, lazy_decoders=True)
    graph = model.trace(top.prompt, job.section("trace"), progress=job.progress)
    labels = Labels.load(run_folder)
    name_features(graph, labels)
    graph.metadata["prompt"] = top.prompt
    graph.save(folder)
    runs.write_text(folder / "graph.svg", render_graph_svg(graph, labels))
    return Closing(
        "traced",
        tables=[logits_table(graph)],
        notes=[strongest_paths_text(graph), summary_text(graph)],
        wrote=[(str(folder), "graph.safetensors, graph.json and graph.svg, a picture")],
        next=[
            f"crosslace view run={run_folder}",
            f"crosslace export run={folder} to=neuronpedia out={folder / 'neuronpedia'}",
        ],
    )


def free_slug(run: Path, prompt: str) -> str:
    """The graph's name from the prompt's last words; numbered where another prompt's graph has it already."""
    slug = runs.slug_of(prompt)
    numbered = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(2)))
    return next(name for name in numbered if traced_prompt(run / "graphs" / name) in (None, prompt))


def traced_prompt(folder: Path) -> str | None:
    """The prompt whose graph a folder holds, if it holds one."""
    try:
        return json.loads((folder / "graph.json").read_text(encoding="utf-8"))["metadata"].get("prompt")
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def logits_table(graph: "Graph"):
    """The next tokens, or the targets, that the graph explains."""
    from ...circuit.graph import later_place

    rows = [(x.label + later_place(graph, graph.nodes[x.id]), x.probability) for x in graph.logits]
    what = ("next token", "token") if graph.weight_name == "probability" else ("target", "target")
    return table(what[0], (what[1], graph.weight_name), rows)
