"""`crosslace trace`: the attribution graph of a prompt's next token."""

from pathlib import Path
from typing import TYPE_CHECKING

from .job import Job
from .runs import slug_of, writable, write_text
from .sources import open_replacement
from .terminal import Closing, table
from .truth import plain

if TYPE_CHECKING:
    from ..circuit.graph import Graph


def run(job: Job) -> Closing:
    """Trace, label, save, draw."""
    from ..circuit.labels import Labels
    from ..circuit.paths import strongest_paths_text, summary_text
    from ..circuit.viewer.picture import render_graph_svg

    top, run_folder = job.top, Path(job.top.run)
    slug = top.slug or slug_of(top.prompt)
    folder = run_folder / "graphs" / slug
    writable(folder)
    model = open_replacement(job, run_folder, top.force)
    job.progress("tracing", 0, 1)
    graph = model.trace(top.prompt, job.section("trace"))
    job.progress("tracing", 1, 1)
    labels = Labels.load(run_folder)
    name_features(graph, labels)
    graph.metadata["prompt"] = top.prompt
    graph.save(folder)
    write_text(folder / "graph.svg", render_graph_svg(graph, labels))
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


def name_features(graph: "Graph", labels) -> None:
    """Give the graph's features their names, and group features of one name and position into a supernode."""
    graph.label_features({key: label.text for key, label in labels.items()})
    groups: dict[str, list[int]] = {}
    for node in graph.nodes:
        if node.kind == "feature":
            label = labels.label(node.layer, node.index)
            if label is not None and label.source != "tokens":
                groups.setdefault(plain(label.text), []).append(node.id)
    for name, ids in groups.items():
        graph.group(name, ids)


def logits_table(graph: "Graph"):
    """The next tokens that the graph explains."""
    rows = [(logit.label, logit.probability) for logit in graph.logits[:5]]
    return table("next token", ("token", "probability"), rows)
