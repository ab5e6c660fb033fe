"""`crosslace view`: the local page; `crosslace compare`: what two graphs share, and what they do not."""

import copy
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, open_replacement, runs

if TYPE_CHECKING:
    from ...circuit.graph import Graph
    from ...circuit.model import ReplacementModel


def run(job: Job) -> Closing | None:
    """Serve until Ctrl-C, or compare."""
    if job.verb == "compare":
        return compare(job)
    from ...circuit.viewer import serve

    folder = Path(job.top.run)
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}; run takes a run, or a folder of runs")
    if job.top.html:
        return written(folder, job.top.graph, Path(job.top.html))
    with suppress(KeyboardInterrupt):  # that is how one leaves
        serve(folder, job.section("view"), announce, lambda run: opened(job, run))
    return None


def opened(job: Job, run: Path) -> "ReplacementModel":
    """A run's model with its transcoder: the run's own settings, but for what the command line says (`model=...`)."""
    config = copy.deepcopy(job.config)
    config.base_on(runs.saved_settings(run))
    return open_replacement(replace(job, config=config), run, lazy_decoders=True)


def written(folder: Path, graph: str, path: Path) -> Closing:
    """Write one graph's page as one file."""
    from ...circuit.viewer import Runs, save_page

    found = [run for run in Runs(folder).all().values() if graph in run.graphs()]
    if len(found) != 1:
        where = f"no run at {folder} has"
        if found:
            where = f"{len(found)} runs at {folder} ({', '.join(run.name for run in found)}) have"
        raise UserError(f"{where} a graph {graph}; name the run that holds it with run=")
    save_page(found[0], graph, path)
    return Closing("written", wrote=[(str(path), "the graph's page, which opens from disk")])


def announce(address: str) -> None:
    """Say where the page is."""
    print(f"{address} shows it; Ctrl-C ends", flush=True)


def compare(job: Job) -> Closing:
    """`crosslace compare`: the nodes whose influence differs most, and those that one graph has alone."""
    from ...circuit.graph import Graph, difference

    top = job.top
    first, second = (Graph.load(folder_of(top.run, name)) for name in (top.first, top.second))
    found = difference(first, second, top.by)
    changes = [
        (named(first, a, top.by), float(change), float(change.abs()))
        for (a, _), change in zip(found.common, found.influence, strict=True)
        if first.nodes[a].kind == "feature"
    ]
    rows = [row[:2] for row in sorted(changes, key=lambda row: -row[2])[: top.top]]
    alone = [
        table(f"{name} alone", ("feature", "influence"), only(graph, ids, top.by, top.top))
        for name, graph, ids in (("first", first, found.only_first), ("second", second, found.only_second))
    ]
    features = [sum(graph.nodes[id].kind == "feature" for id in ids) for graph, ids in
                ((first, found.only_first), (second, found.only_second))]  # fmt: skip
    return Closing(
        "compared",
        tables=[table("in both", ("feature", "second's influence less the first's"), rows), *alone],
        notes=[f"{len(changes)} features in both, {features[0]} in the first alone, {features[1]} in the second alone"],
    )


def folder_of(run: str, name: str) -> Path:
    """A graph's folder: as it is named, or by its slug in the run."""
    return Path(name) if (Path(name) / "graph.json").is_file() or not run else Path(run) / "graphs" / name


def named(graph: "Graph", id: int, by: str) -> str:
    """A feature in a few words; by feature it has no position."""
    from ...circuit.graph import node_text

    text = node_text(graph, graph.nodes[id])
    return text.rpartition(" @")[0] if by == "feature" else text


def only(graph: "Graph", ids: list[int], by: str, most: int) -> list[tuple[str, float]]:
    """The most influential features among some nodes."""
    influence = graph.influence()
    features = [id for id in ids if graph.nodes[id].kind == "feature"]
    best = sorted(features, key=lambda id: -float(influence[id]))[:most]
    return [(named(graph, id, by), float(influence[id])) for id in best]
