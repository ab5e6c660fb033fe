"""`crosslace export` and `crosslace import`: transcoders and graphs in other programs' formats."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...conf import SOURCES
from ...data.errors import UserError
from ..terminal import Closing
from ..workspace import Job, model_settings, open_model, runs, world_of


def run(job: Job) -> Closing:
    """Either way."""
    return write_out(job) if job.verb == "export" else read_in(job)


def write_out(job: Job) -> Closing:
    """A run's transcoder, or graphs, as a new folder; never over an existing one."""
    top, source, out = job.top, Path(job.top.run), Path(job.top.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another folder to write to")
    runs.writable(out)
    if top.to == "neuronpedia":
        return _write_graphs(job.section("neuronpedia"), source, out)
    if top.to == "saelens":
        from ...circuit.formats import export_saelens
        from ...train.transcoder import Transcoder

        export_saelens(Transcoder.load(runs.transcoder_folder(source)), out)
    else:
        as_circuit_tracer(job, source, out)
    return Closing(
        "exported",
        wrote=[(str(out), f"the transcoder as a {top.to} folder")],
        next=[f"crosslace import path={out} from={top.to} run=runs/imported"],
    )


def as_circuit_tracer(job: Job, source: Path, out: Path) -> None:
    """A run's transcoder as a circuit-tracer folder."""
    from ...circuit.formats import export_circuit_tracer
    from ...train.transcoder import Transcoder

    transcoder = Transcoder.load(runs.transcoder_folder(source))
    post_norm, parallel = _shape(job, source, transcoder.meta)
    export_circuit_tracer(transcoder, out, post_norm=post_norm, parallel=parallel)


def _shape(job: Job, run: Path, meta: dict[str, Any]) -> tuple[bool, bool]:
    """What the format must know of the model: is its MLP's output normed, does its MLP stand beside the attention?"""
    from transformers import AutoConfig

    from ...data.models import find_family

    if (run / "config.yaml").is_file() or any(name.startswith("model") for name in job.config.given):
        settings = model_settings(job)
        name, revision = settings.name, settings.revision
    else:
        model = dict(meta.get("model") or {})
        name, revision = model.get("name"), model.get("revision")
    if not name:
        raise UserError("the transcoder does not say which model it is for, and the format must: give one with model=")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"the description of {name} is needed to export, and cannot be read") from error
    family = find_family(config.model_type)
    return family.post_mlp_norm is not None, bool(family.parallel(config))


def _write_graphs(how: Any, source: Path, out: Path) -> Closing:
    from ...circuit.attribution import load_heads
    from ...circuit.features import Labels
    from ...circuit.formats import write_neuronpedia
    from ...circuit.graph import Graph

    folders = (
        [source] if (source / "graph.json").is_file() else sorted(p.parent for p in source.glob("graphs/*/graph.json"))
    )
    if not folders:
        raise UserError(f"{source} holds no graph yet; `crosslace trace run={source} prompt=...` makes one")
    out.mkdir(parents=True, exist_ok=True)
    told = asdict(how)
    labels = Labels.load(folders[0].parent.parent) if told.pop("labels") else None
    for folder in folders:
        graph = Graph.load(folder)
        if labels is None:
            graph.nodes.labels = {id: name for id, name in graph.nodes.labels.items() if id >= graph.n_features}
        path = out / f"{folder.name}.json"
        write_neuronpedia(graph, path, slug=folder.name, labels=labels, heads=load_heads(folder), **told)
    return Closing(
        "exported",
        wrote=[(str(out / f"{folder.name}.json"), "a graph that Neuronpedia reads") for folder in folders],
        next=[f"crosslace import path={out / f'{folders[0].name}.json'} from=neuronpedia run=runs/imported"],
    )


def _fit(folder: Path, model: Any) -> str:
    """How well the transcoder stands in for the model's MLPs on a few hundred tokens: it says whether it is read where
    it was trained."""
    if model is None:
        return "not measured: name the model with model= to see whether the transcoder fits it"
    from ...circuit.formats import SAMPLE, measured_nmse
    from ...circuit.model import ReplacementModel

    replacement = ReplacementModel.load(folder, model, lazy_decoders=True)
    world = world_of(model)  # a world's model knows no other language than its own
    texts = [q.prompt for q in world.questions("two_hop", "held_out")[:40]] if world else SAMPLE
    nmse = dict(zip(replacement.transcoder.layers, measured_nmse(replacement, texts)))
    worst = max(nmse, key=nmse.__getitem__)
    said = f"NMSE on a few hundred tokens: {sum(nmse.values()) / len(nmse):.3g} in the mean over layers, "
    said += f"{nmse[worst]:.3g} in layer {worst}"
    if nmse[worst] <= 1:
        return said
    bad = ", ".join(str(layer) for layer, value in nmse.items() if value > 1)
    return (
        f"WARNING: {said}. Above 1 (layers {bad}) a transcoder does worse than nothing at all: it was trained on"
        " another model or at another place than it is read at here; do not trust what it says"
    )


def read_in(job: Job) -> Closing:
    """A foreign transcoder (or graph) as a new run."""
    top, path, folder = job.top, Path(job.top.path), Path(job.top.run)
    if top.path and not path.exists():
        raise UserError(f"there is nothing at {path}; path takes the folder or file to read")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already; name another run to import into")
    runs.writable(folder)
    if top.format == "neuronpedia":
        from ...circuit.formats import read_neuronpedia

        graph = read_neuronpedia(path)
        graph.save(folder / "graphs" / path.stem)
        return Closing(
            "imported", wrote=[(str(folder / "graphs" / path.stem), "the graph")], next=[f"crosslace view run={folder}"]
        )
    from ...circuit.formats import import_transcoder, open_foreign

    foreign = open_foreign(top.path or top.format, top.format if top.path else "auto", top.l0)
    given = any(name.startswith("model") for name in job.config.given)  # else its own description says which model
    model = open_model(job) if given else None
    import_transcoder(foreign, folder / "transcoder", model, job.progress)
    if given:
        runs.write_yaml(folder / "config.yaml", {name: job.config.values[name] for name in SOURCES})
    return Closing(
        "imported",
        notes=[_fit(folder, model)],
        wrote=[(str(folder / "transcoder"), "the transcoder")],
        next=[f"crosslace eval run={folder}", f'crosslace trace run={folder} prompt="..."'],
    )
