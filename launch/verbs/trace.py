"""`crosslace trace`: the attribution graph of a prompt's next token."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import UserError
from ..terminal import Closing, table
from ..workspace import Job, open_replacement, runs
from . import evaluate

if TYPE_CHECKING:
    from ...circuit.graph import Graph, Node
    from ...circuit.model import ReplacementModel


def run(job: Job) -> Closing:
    """One prompt, or each of a set; a graph of the set that is there already is not made again."""
    top, run_folder = job.top, Path(job.top.run)
    if not top.prompts:
        folder = graph_folder(run_folder, top.slug, asked_of(job, top.prompt), top.overwrite)
        runs.writable(folder)
        model = open_replacement(job, run_folder, top.force, lazy_decoders=True)
        return traced(job, model, top.prompt, folder)
    from ...circuit.judge import EvalSettings

    runs.writable(run_folder)
    model = open_replacement(job, run_folder, top.force, lazy_decoders=True)
    prompts = evaluate.prompts_of(model, EvalSettings(prompts=top.count, prompt_set=top.prompts))[0]
    assert prompts is not None
    wrote = []
    for number, prompt in enumerate(prompts.prompts):
        asked = asked_of(job, prompt)
        folder = graph_folder(run_folder, None, asked, top.overwrite)
        if top.overwrite or asked_before(folder) != asked:
            traced(job, model, prompt, folder)
        wrote.append((str(folder), prompt))
        job.progress("graphs", number + 1, len(prompts.prompts))
    return Closing(f"{len(wrote)} prompts are traced", wrote=wrote, next=[f"crosslace view run={run_folder}"])


def asked_of(job: Job, prompt: str) -> dict[str, Any]:
    """The question that a graph answers."""
    return {"prompt": prompt, "trace": asdict(job.section("trace"))}


def traced(job: Job, model: "ReplacementModel", prompt: str, folder: Path) -> Closing:
    """Trace, label, save, draw."""
    from ...circuit.attribution import HEADS_FILE, explain_attention, save_heads
    from ...circuit.features import Labels, name_by_tokens, name_features
    from ...circuit.graph import Graph, circuit_rows, flow_text, main_circuit, summary_text
    from ...circuit.viewer import render_graph_svg

    top, run_folder, settings = job.top, Path(job.top.run), job.section("trace")
    graph = model.trace(prompt, settings, progress=job.progress)
    labels = Labels.load(run_folder)
    name_features(graph, labels)
    tried = groups_tried(model, graph) if top.groups else None
    if (folder / "graph.json").is_file():
        keep_supernodes(Graph.load(folder), graph)
    graph.metadata |= {"prompt": prompt, "asked": asked_of(job, prompt)}
    graph.carrying(settings.share_to_keep()).save(folder)
    name_by_tokens(graph, model)
    runs.write_text(folder / "graph.svg", render_graph_svg(graph, labels))
    circuit = main_circuit(graph)
    rows = circuit_rows(graph, circuit) if circuit else []
    single = main_circuit(graph, bands=False)
    features = circuit_rows(graph, single) if single and circuit and single.names != circuit.names else []
    notes = [flow_text(graph, circuit), *path_notes(model, graph), summary_text(graph)]
    wrote = "graph.safetensors, graph.json"
    (folder / HEADS_FILE).unlink(missing_ok=True)  # of an earlier trace that this one replaces
    if top.heads:
        explained = explain_attention(model, graph)
        save_heads(folder, explained)
        notes.insert(-1, heads_note(graph, explained))
        wrote += ", heads.json"
    if tried is not None:
        notes.insert(-1, tried[1])
    columns = ("what carries the answer", "layer", "at", "share", "reads most from", "acts most on")
    return Closing(
        "traced",
        tables=[
            logits_table(graph),
            table("circuit", columns, rows),
            *([table("strongest features", columns, features)] if features else []),
            *([tried[0]] if tried else []),
        ],
        notes=notes,
        wrote=[(str(folder), f"{wrote} and graph.svg, a picture")],
        next=[
            f"crosslace view run={run_folder}",
            f"crosslace export run={folder} to=neuronpedia out={folder / 'neuronpedia'}",
        ],
    )


def path_notes(model: "ReplacementModel", graph: "Graph") -> list[str]:
    """The strongest single path to the likeliest target by way of features, and the heads that its edges went by."""
    from ...circuit.attribution import path_heads
    from ...circuit.graph import path_text

    paths = graph.top_paths(None, graph.logits[0].id, direct=False)
    heads = path_heads(model, graph, [edge for path in paths for edge in zip(path.nodes[1:], path.nodes)])
    return [f"strongest path: {path_text(graph, path, heads)}" for path in paths]


def groups_tried(model: "ReplacementModel", graph: "Graph") -> tuple[Any, str]:
    """Proposed groups become the graph's supernodes; what the model does without each, and with all of them alone."""
    from ...circuit.graph import propose_supernodes
    from ...circuit.judge import judge_groups

    graph.supernodes = propose_supernodes(graph)
    graph.metadata["proposed"] = list(graph.supernodes)
    if not graph.supernodes:
        raise UserError("no features of this graph go back to the same tokens, so there are no groups to propose")
    found = judge_groups(model, graph)
    rows = [(one.name, one.features, f"{one.influence:.0%}", f"{one.left:.0%}", f"{one.matched:.0%}")
            for one in found.effects]  # fmt: skip
    note = (
        f"{len(graph.supernodes)} groups hold {found.carried:.0%} of the features' influence (completeness"
        f" {found.scores['completeness']:.2f} of {found.whole['completeness']:.2f}); of the answer's probability"
        f" {found.left:.0%} is left without them ({found.left_matched:.0%} without as many others) and"
        f" {found.kept:.0%} with them alone ({found.kept_matched:.0%} with as many others alone)"
    )
    return table("groups", ("group", "features", "influence", "answer left without", "without others"), rows), note


def heads_note(graph: "Graph", explained: dict[str, Any]) -> str:
    """Why the heads that carry most looked where they did."""
    from ...circuit.attribution import attention_text

    return "\n".join(attention_text(graph, looked) for looked in explained["attention"])


def graph_folder(run: Path, slug: str | None, asked: dict[str, Any], overwrite: bool) -> Path:
    """Where the graph goes: under the name that was given, unless another question's graph has it; else under a name
    from the prompt's last words, numbered where it is another's."""
    if slug is not None:
        folder = run / "graphs" / slug
        if not overwrite and asked_before(folder) not in (None, asked):
            raise UserError(
                f"{folder} holds the graph of another question; give another slug, or replace it with overwrite=true"
            )
        return folder
    name = runs.slug_of(asked["prompt"])
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(f for f in (run / "graphs" / slug for slug in numbered) if asked_before(f) in (None, asked))


def asked_before(folder: Path) -> dict[str, Any] | None:
    """The question whose graph a folder holds, if it holds one: prompt and settings."""
    try:
        header = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return header["metadata"].get("asked", {"prompt": header["metadata"].get("prompt")})


def keep_supernodes(old: "Graph", new: "Graph") -> None:
    """Carry groups that a person made over from an earlier trace of the same name, node by node."""

    def key(node: "Node") -> tuple[str, int, int, int]:
        return (node.kind, node.layer, node.position, node.index)

    place = {key(node): node.id for node in new.nodes}
    for name, members in old.supernodes.items():
        kept = [place[key(old.nodes[id])] for id in members if key(old.nodes[id]) in place]
        if kept and name not in new.supernodes and name not in old.metadata.get("proposed", []):
            new.group(name, kept)


def logits_table(graph: "Graph"):
    """The next tokens, or the targets, that the graph explains."""
    from ...circuit.graph import later_place

    rows = [(x.label + later_place(graph, graph.nodes[x.id]), x.probability) for x in graph.logits]
    what = ("next token", "token") if graph.weight_name == "probability" else ("target", "target")
    return table(what[0], (what[1], graph.weight_name), rows)
