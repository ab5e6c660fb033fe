"""`crosslace train --plan`: what a run would take and whether it fits, before anything is allocated."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import UserError
from ...data.units import format_bytes, parse_bytes
from ..terminal import Closing, table
from ..workspace import Job

if TYPE_CHECKING:
    from ...train.parallel import ParallelSettings
    from ...train.planning import MachineSettings, Plan, Shape

SHAPES = {
    "openai-community/gpt2": (12, 768),
    "gpt2": (12, 768),
    "meta-llama/Llama-3.2-1B": (16, 2048),
    "google/gemma-2-2b": (26, 2304),
    "meta-llama/Llama-3.1-8B": (32, 4096),
    "Qwen/Qwen3-8B": (36, 4096),
}
"""Layers and width of models that need no look at the hub."""


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
    layers, width = model_shape(job)
    dtype = "float16" if store.dtype == "auto" else store.dtype
    if dtype not in DTYPES:
        raise UserError(f"store.dtype={dtype} is not known; it takes {', '.join(DTYPES)}")
    itemsize = {"float32": 4, "int8": 1}.get(dtype, 2)
    return Shape(len(chosen or range(layers)), width, store.train_rows, itemsize)


def model_shape(job: Job) -> tuple[int, int]:
    """Layers and width of a model, from its configuration alone."""
    name = job.config.values["model"]["name"]
    if name in SHAPES:
        return SHAPES[name]
    if name in ("world", "stdlib"):
        path = job.config.values["store"]["path"]
        raise UserError(f"{name} has no store{f' at store={path}' if path else ''} to plan for; cache it first")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=job.config.values["model"]["revision"]).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {name} cannot be read, so its shape is not known ({error})") from error
    return config.num_hidden_layers, config.hidden_size


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
    ]
    return table("dashboards, by `crosslace features`", ("", "estimate"), rows)


def count(number: float) -> str:
    """A count to read: 94.2B."""
    power = min(4, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{('', 'K', 'M', 'B', 'T')[power]}"
