"""`crosslace train --plan` and `crosslace cache --plan`: what it would take and whether it fits, before anything is
allocated."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.errors import UserError
from ...data.units import format_bytes, parse_bytes
from ..terminal import Closing, duration, table
from ..workspace import Job

if TYPE_CHECKING:
    from ...train.parallel import ParallelSettings
    from ...train.planning import MachineSettings, Plan, Shape


class ModelShape(NamedTuple):
    """What a plan has to know of a language model."""

    layers: int
    width: int
    parameters: float
    """Without embeddings."""


SHAPES = {
    "openai-community/gpt2": ModelShape(12, 768, 85e6),
    "gpt2": ModelShape(12, 768, 85e6),
    "HuggingFaceTB/SmolLM2-135M": ModelShape(30, 576, 106e6),
    "smollm2": ModelShape(30, 576, 106e6),
    "meta-llama/Llama-3.2-1B": ModelShape(16, 2048, 973e6),
    "google/gemma-2-2b": ModelShape(26, 2304, 2.02e9),
    "meta-llama/Llama-3.1-8B": ModelShape(32, 4096, 6.98e9),
    "Qwen/Qwen3-8B": ModelShape(36, 4096, 6.95e9),
}
"""Models that need no look at the hub."""


def run(job: Job) -> Closing:
    """Count, print, and say what would fit if this does not."""
    from ...train.planning import make_plan, what_fits

    shape = shape_of(job)
    settings = shape, job.section("transcoder"), job.section("trainer"), job.section("parallel"), job.section("machine")
    plan, machine = make_plan(*settings), settings[-1]
    tables = [memory_table(plan), traffic_table(plan, job.section("trainer").steps), features_table(*settings)]
    if plan.fits(machine):
        return Closing("the plan fits", tables=tables, notes=[summary(plan)], next=["the same command without --plan"])
    helps = what_fits(*settings)
    too_large = f"{format_bytes(plan.device_peak)} of {format_bytes(parse_bytes(machine.memory))} on the device"
    if plan.host_peak > parse_bytes(machine.host_memory):
        too_large += f", {format_bytes(plan.host_peak)} of {format_bytes(parse_bytes(machine.host_memory))} on the host"
    notes = [
        summary(plan),
        f"the plan does not fit: a rank would take {too_large}",
        f"{helps} would fit"
        if helps
        else "no number of feature ranks makes it fit: lower transcoder.features or reach",
    ]
    return Closing("the plan does not fit", tables=tables, notes=notes, code=2)


def shape_of(job: Job) -> "Shape":
    """Layers, width and rows: the store's where there is one, else the model's and what store.tokens asks for."""
    from ...data.store import DTYPES
    from ...train.planning import Shape

    chosen = job.section("transcoder").layers
    store, path = job.section("store"), job.config.values["store"]["path"]
    if path and (Path(path) / "zarr.json").is_file():
        from ...data.store import ActivationStore

        opened = ActivationStore.open(path)
        n_layers = len(chosen or opened.layers)
        return Shape(n_layers, opened.d_model, len(opened), opened.dtype.itemsize)
    model = model_shape(job)
    dtype = "float16" if store.dtype == "auto" else store.dtype
    if dtype not in DTYPES:
        raise UserError(f"store.dtype={dtype} is not known; it takes {', '.join(DTYPES)}")
    itemsize = {"float32": 4, "int8": 1}.get(dtype, 2)
    return Shape(len(chosen or range(model.layers)), model.width, store.train_rows, itemsize)


def run_cache(job: Job) -> Closing:
    """What a harvest would weigh and how long it would take, on disk and streamed, and which of the two fits."""
    import torch

    from ...data.harvest import make_layout, weigh

    settings, machine, model = job.section("store"), job.section("machine"), model_shape(job)
    layout = make_layout(settings, model.layers, model.width, torch.float32)
    weight, budget, rows = weigh(layout, settings), parse_bytes(settings.budget), settings.train_rows
    runs, moves = machine.tflops * 1e12 / (2 * model.parameters), parse_bytes(machine.store) / layout.row_bytes
    ring = budget // layout.total_bytes(min(rows, settings.shuffle_rows))
    cached = min(runs, moves)
    spilled = f"memory for {format_bytes(2 * weight.window)}"
    if weight.spill:
        spilled = f"{format_bytes(weight.spill)} beside the store, or in store.scratch: store.memory has no room"
    tables = [
        table(
            "on disk",
            ("", "estimate"),
            [
                ("store", f"{format_bytes(weight.store)} ({format_bytes(layout.row_bytes)} a token, {layout.dtype})"),
                ("two windows that wait to be shuffled", spilled),
                ("the model", f"{count(runs)} tokens/s at {machine.tflops:g} tflops"),
                ("the disk", f"{count(moves)} tokens/s at machine.store={machine.store}"),
                ("a harvest", f"{duration(rows / cached)} at {count(cached)} tokens/s"),
                ("reading it once", f"{duration(rows / moves)}"),
            ],
        ),
        table(
            f"streamed, store.budget={settings.budget}",
            ("", "estimate"),
            [
                ("ring", f"{ring} windows of {settings.shuffle_rows} rows, {2 + bool(weight.spill)} needed"),
                ("held-out rows beside it", format_bytes(layout.total_bytes(settings.held_out_rows))),
                ("training reads", f"{count(cached)} tokens/s at most, beside the model on the same device fewer"),
                ("each epoch runs the model for", duration(rows / runs)),
            ],
        ),
    ]
    room = "nobody can tell how much is free" if weight.free is None else f"{format_bytes(weight.free)} are free"
    notes = [f"{count(rows)} tokens; {room}" + (f" at {settings.path}" if settings.path else "")]
    streams, free = ring >= 2 + bool(weight.spill), weight.free
    if settings.mode == "disk" and weight.fits:
        return Closing("the plan fits", tables=tables, notes=notes, next=["the same command without --plan"])
    if settings.mode == "streaming" and streams and (free is None or budget <= free):
        return Closing("the plan fits", tables=tables, notes=notes, next=["crosslace train with the same settings"])
    notes.append(
        "store.mode=streaming would fit"
        if settings.mode == "disk" and streams and budget <= (free or 0)
        else "raise store.budget, or lower store.tokens, store.shuffle_rows or store.layers, or take store.dtype=int8"
    )
    return Closing("the plan does not fit", tables=tables, notes=notes, code=2)


def model_shape(job: Job) -> ModelShape:
    """Layers, width and parameters of a model, from its configuration alone."""
    name = job.config.values["model"]["name"]
    if name in SHAPES:
        return SHAPES[name]
    if name in ("world", "stdlib"):
        path = job.config.values["store"]["path"]
        raise UserError(f"{name} has no store{f' at store={path}' if path else ''} to plan for; cache it first")
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name, revision=job.config.values["model"]["revision"]).get_text_config()
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {name} cannot be read, so its shape is not known ({error})") from error
    embedded = model.get_input_embeddings().weight.numel()
    return ModelShape(
        config.num_hidden_layers, config.hidden_size, sum(p.numel() for p in model.parameters()) - embedded
    )


def summary(plan: "Plan") -> str:
    return (
        f"{count(plan.parameters)} parameters, {count(plan.rank_parameters)} on each rank; "
        f"a rank takes {format_bytes(plan.device_peak)} at most"
        + (f" and {format_bytes(plan.host_peak)} of the host" if plan.host else "")
    )


def memory_table(plan: "Plan"):
    rows = [(f"step: {part.name}", format_bytes(part.bytes)) for part in plan.parts if part.bytes]
    rows += [(f"peak: {name}", format_bytes(size)) for name, size in plan.phases.items()]
    rows += [(f"host: {name}", format_bytes(size)) for name, size in plan.host.items()]
    return table("memory of a rank", ("", "bytes"), rows)


def traffic_table(plan: "Plan", steps: int):
    rows = [(f"sent a step: {name}", format_bytes(size)) for name, size in plan.sent.items()]
    if plan.moved:
        rows.append(("leaves a rank in a step", format_bytes(plan.moved)))
    for name, size in plan.exchanges.items():
        taken = " (taken)" if name == plan.exchange else ""
        rows.append((f"  of it with parallel.exchange={name}{taken}", format_bytes(size)))
    rows.append(("store", format_bytes(plan.store)))
    rows += [(f"seconds a step: {name}", f"{seconds:.3g}") for name, seconds in plan.seconds.items()]
    rows.append((f"hours for {steps} steps", f"{plan.step_seconds * steps / 3600:.3g}"))
    return table("traffic and time", ("", "estimate"), rows)


def features_table(
    shape: "Shape", transcoder: Any, trainer: Any, parallel: "ParallelSettings", machine: "MachineSettings"
) -> Any:
    """What `crosslace features` takes afterwards, with its own defaults, on as many processes."""
    from ...circuit.features import dashboards_take

    sizes = transcoder.sizes(shape.n_layers)
    taken = dashboards_take(sizes, shape.d_model, processes=min(parallel.processes, shape.n_layers))
    rows = [
        ("features", count(sum(sizes))),
        ("memory of a process, for examples", format_bytes(taken.memory)),
        ("disk of a process", format_bytes(taken.disk)),
        ("minutes of arithmetic", f"{taken.operations / (machine.tflops * 1e12) / 60:.3g}"),
        ("minutes of writing records", f"{taken.writing / 60:.3g}"),
        ("minutes of comparing features, on one CPU thread", f"{taken.comparing / 60:.3g}"),
    ]
    return table("dashboards, by `crosslace features`", ("", "estimate"), rows)


def count(number: float) -> str:
    """A count to read: 94.2B."""
    power = min(4, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{('', 'K', 'M', 'B', 'T')[power]}"
