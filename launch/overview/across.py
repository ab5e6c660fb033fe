"""`crosslace seeds`: which edges and paths of a graph hold when the transcoder is trained again with another seed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import UserError
from ..pages import evaluated_below, read_measured
from ..terminal import Closing, table
from ..workspace import Job, open_corpus, open_model, runs
from .seeds import over_seeds

if TYPE_CHECKING:
    from ...circuit.across import Held
    from ...circuit.graph import Graph

SHOWN = 10
"""Paths that are looked for."""


def run(job: Job) -> Closing:
    """Trace the prompt of a graph in every run, pair the features, count."""
    from ...circuit.across import SEEDS_FILE
    from ...circuit.graph import Graph

    top = job.top
    folders = [Path(name) for name in top.runs] or seeds_below(Path(top.run))
    if len(folders) < 2:
        raise UserError("one run alone says nothing about seeds; name several, crosslace seeds RUN RUN ...")
    folder = folders[0] / "graphs" / top.slug
    if not (folder / "graph.json").is_file():
        raise UserError(
            f"{folders[0]} has no graph {top.slug}; `crosslace trace run={folders[0]} slug={top.slug}` first"
        )
    job.config.base_on(runs.saved_settings(folders[0]))
    prompt = Graph.load(folder).metadata["prompt"]
    found, own = held_over(job, folders, prompt)
    runs.write_json(folder / SEEDS_FILE, {"runs": [str(path) for path in folders], "prompt": prompt, **found.as_dict()})
    return closing(found, own, folder / SEEDS_FILE)


def seeds_below(folder: Path) -> list[Path]:
    """The runs below a folder that differ in their seed alone."""
    groups = over_seeds([read_measured(path) for path in evaluated_below(folder)])
    if len(groups) != 1:
        raise UserError(
            f"{folder} holds {len(groups)} configurations with several seeds, and one is wanted; name the runs: "
            "crosslace seeds RUN RUN ... slug=..."
        )
    return [Path(name) for name in groups[0].names]


def held_over(job: Job, folders: list[Path], prompt: str) -> "tuple[Held, Graph]":
    """The first run's pruned graph, and in how many runs its parts are found."""
    from ...circuit.across import held, match_features
    from ...circuit.model import ReplacementModel

    top, settings = job.top, job.section("trace")
    lm = open_model(job).widened(own=True)
    models = [ReplacementModel.load(runs.transcoder_folder(folder), lm) for folder in folders]
    graphs = []
    for model, folder in zip(models, folders):
        job.progress("tracing", len(graphs), len(folders), folder.name)
        graphs.append(model.trace(prompt, settings).prune(node=top.node, edge=top.edge))
    own = graphs[0]
    features = {(node.layer, node.index) for node in own.nodes if node.kind == "feature"}
    text = [sequence.tokens for sequence in open_corpus(job, lm).sequences("held_out", top.tokens)]
    own_transcoder, *others = (model.transcoder for model in models)
    matches = match_features(lm, own_transcoder, others, features, [*text, lm.tokenize(prompt)])
    paths = own.top_paths(None, own.logits[0].id, SHOWN, direct=False)
    return held(own, list(zip(graphs[1:], matches, strict=True)), paths), own


def closing(found: "Held", own: "Graph", written: Path) -> Closing:
    """How much holds, and the strongest paths."""
    from ...circuit.graph import path_text

    total = found.trainings
    rows: list[tuple[Any, ...]] = []
    for what, counts in (("features", found.features), ("edges", found.edges)):
        by_count = [sum(count >= wanted for count in counts.values()) for wanted in (1, 2, total)]
        rows.append((what, *by_count))
    return Closing(
        f"{found.share_of_edges:.0%} of the edges are found in another training, in the mean",
        tables=[
            table("of the first run's graph", ("", "all", "in two or more", f"in all {total}"), rows),
            table(
                "strongest paths",
                ("path", f"in, of {total}"),
                [(path_text(own, path), n) for path, _, n in found.paths],
            ),
        ],
        wrote=[(str(written), "every edge and path, with the number of trainings that have it")],
    )
