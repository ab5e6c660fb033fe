"""What a training run takes, worked out before anything is allocated: memory of each rank, bytes moved, time.

Every tensor that training holds is counted by its shape. The phases of a run hold different ones, and a rank needs room
for the largest:

    start        weights, moments, the rows and pre-activations that set the first biases
    step         weights, gradients, moments, activations, batches, communication buffers
    restart      weights, gradients, moments, batches, the restarted features' activations on the whole batch
    evaluation   weights, gradients, moments, dense activations of a piece of held-out rows
    checkpoint   weights, gradients, moments; in host memory twice the weights and moments, as they are and as a file
    export       weights, moments, the weights once more, scaled to raw activations

Gradients of encoders and decoders are there only where they are formed (sparse/row_gradients.py says when not).

On a CPU all of it is one memory; with a GPU the start, the checkpoint's copies and the batches that wait are in the
host's.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ...data.errors import check_choice, check_range
from ...data.units import parse_bytes
from ..parallel import BUCKET_BYTES, EXCHANGES, ParallelSettings
from ..run import RESTARTED_AT_ONCE
from ..settings import TOPK, TrainerSettings, TranscoderSettings
from ..sparse import MARGIN, UNEVEN, use_sparse
from ..start import PREACTIVATIONS_AT_ONCE, rows_for
from .traffic import FLOAT, Flow, Work, all_flows, exchanged, moved

NORMED = ("tanh", "l1")
LIBRARIES = {"cpu": 130e6, "cuda": 1.2e9}
"""What PyTorch and its libraries take by themselves; measured on a CPU, CUDA's context and workspaces otherwise."""
ENTRY_BYTES = 76
"""The sparse step keeps so much of each active entry: rows and features in two orders, values, their gradients."""
WAITING = 2
"""Batches in hand besides those that are read ahead."""
EVALUATED_AT_ONCE = 2048
MOST_RANKS = 4096


@dataclass(frozen=True)
class MachineSettings:
    """The machine that `--plan` of train and cache reckons with, a rank: an H100 by default."""

    device: str = "cuda"
    """cuda, or cpu."""

    memory: str = "80GB"
    """Memory of a device."""

    host_memory: str = "256GB"
    """Main memory that one process may take."""

    tflops: float = 200.0
    """Arithmetic that a training reaches, in 10^12 operations a second: about 200 in bf16 on an H100, 25 in float32."""

    memory_bandwidth: str = "2TB"
    """Bytes a second between the device and its memory."""

    link: str = "200GB"
    """Bytes a second between two processes: 200GB and more by NVLink, 1GB to 10GB by Ethernet."""

    store: str = "2GB"
    """Bytes a second that one process reads from the store, or a harvest writes to it."""

    def __post_init__(self) -> None:
        check_choice("machine.device", self.device, ("cpu", "cuda"))
        check_range("machine.tflops", self.tflops, low=1e-6)
        for name in ("memory", "host_memory", "memory_bandwidth", "link", "store"):
            check_range(f"machine.{name}", parse_bytes(getattr(self, name), f"machine.{name}"), low=1)


class Shape(NamedTuple):
    """What is trained on."""

    n_layers: int
    """Covered layers."""
    d_model: int
    rows: int
    """Rows of the store."""
    itemsize: float = 2
    """Bytes of a stored number."""


class Part(NamedTuple):
    """One entry of a rank's memory in a step."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Plan:
    """A run on paper; all figures of memory and traffic are one rank's."""

    parameters: int
    """Of the whole transcoder."""
    rank_parameters: int
    parts: list[Part]
    """The step's memory on the device."""
    phases: dict[str, float]
    """Device memory by phase."""
    host: dict[str, float]
    """Host memory by phase; on a CPU it is in `phases`."""
    sent: dict[str, float]
    """Bytes that a rank hands to each collective in a step."""
    moved: float
    """Bytes that leave a rank in a step, all collectives together (train/planning/traffic.py)."""
    exchange: str
    """What feature ranks exchange: reconstructions or actives."""
    exchanges: dict[str, float]
    """Bytes that leave a rank for each of the two; empty where features are not shared."""
    store: float
    seconds: dict[str, float]
    """A step's arithmetic, memory traffic, communication, and reading (which goes on beside them)."""

    @property
    def device_peak(self) -> float:
        return max(self.phases.values())

    @property
    def host_peak(self) -> float:
        return max(self.host.values(), default=0.0)

    @property
    def step_seconds(self) -> float:
        busy = sum(value for name, value in self.seconds.items() if name != "reading")
        return max(busy, self.seconds["reading"])

    def fits(self, machine: MachineSettings) -> bool:
        return self.device_peak <= parse_bytes(machine.memory) and self.host_peak <= parse_bytes(machine.host_memory)


def make_plan(
    shape: Shape,
    transcoder: TranscoderSettings,
    trainer: TrainerSettings,
    parallel: ParallelSettings,
    machine: MachineSettings,
) -> Plan:
    """Count everything."""
    parallel = decided(shape, transcoder, trainer, parallel, machine)
    L, D = shape.n_layers, shape.d_model
    sizes, reach = transcoder.sizes(L), transcoder.reach_of(L)
    reaches = [min(reach, L - l) for l in range(L)]
    m, on_cpu = parallel.features, machine.device == "cpu"
    work = work_of(shape, transcoder, trainer, parallel, machine.device)
    slices = m if parallel.exchange == "actives" else 1
    thresholds = 1 if transcoder.activation == "jumprelu" else 0
    cut = [F * (D + 1 + thresholds + r * D) for F, r in zip(sizes, reaches, strict=True)]
    shared = L * (D + (D * D if transcoder.skip else 0))
    whole, own = sum(cut) + shared, sum(cut) // m + shared // slices
    W, F = own * FLOAT, max(sizes) // m
    gradients = W - _unformed(trainer, parallel, work, reaches) * FLOAT

    rows, sparse = work.rows, work.sparse
    piece = -(-rows // trainer.accumulate)
    written = piece * L * D * FLOAT / slices
    listed = 1.0 if on_cpu else _spare(transcoder, parallel)
    activations = _activations(transcoder, trainer, work, piece, m, slices, listed) + 5 * written
    normalised = 2 * rows * L * D * FLOAT
    waiting = (trainer.prefetch + WAITING) * 2 * rows * L * D * shape.itemsize
    auxiliary = _auxiliary(work, piece, m, slices, written)
    buffers = _buffers(parallel, cut, written, work, slices)
    final, _ = _active(transcoder, trainer, L)
    rate = trainer.init_firing_rate or min(0.5, final / max(sizes))
    sample = _first_rows(shape, [size // m for size in sizes], rate)

    libraries = LIBRARIES[machine.device]
    kept = libraries + (sample.kept + waiting if on_cpu else 0)
    parts = [
        Part("weights", W), Part("gradients", gradients), Part("moments", 2 * W), Part("activations", activations),
        Part("auxiliary loss", auxiliary), Part("batches", normalised + (waiting if on_cpu else 0)),
        Part("communication", buffers), Part("libraries and kept rows", kept - (waiting if on_cpu else 0)),
    ]  # fmt: skip
    at_once = min(EVALUATED_AT_ONCE, max(trainer.eval_tokens, trainer.calibrate_tokens))
    evaluated = 2.3 * at_once * sum(sizes) // m * FLOAT
    evaluated += 3 * at_once * max(sizes) * FLOAT if slices > 1 else 0  # a layer of all ranks at a time
    scratch = piece * F * FLOAT if sparse else 0.0
    restart = _restart(trainer, F, D) if trainer.resample_every else 0.0
    phases = {
        "step": sum(part.bytes for part in parts),
        "evaluation": 3 * W + gradients + kept + scratch + evaluated,
        "restart": 3 * W + gradients + kept + scratch + normalised + (waiting if on_cpu else 0) + restart,
        "export": 4 * W + kept,
    }
    start = sample.peak
    checkpoint = 6 * W
    host: dict[str, float] = {}
    if on_cpu:
        held = 3 * W + gradients + kept + scratch + normalised
        phases |= {"start": 3 * W + libraries + start, "checkpoint": held + checkpoint}
    else:
        host = {"start": W + start, "training": sample.kept + waiting, "checkpoint": sample.kept + waiting + checkpoint}

    flows = all_flows(work, parallel, own, FLOAT if shape.itemsize < 2 else shape.itemsize)
    sent, moving = {name: flow.handed for name, flow in flows.items()}, sum(flow.moved for flow in flows.values())
    exchanges = {name: moved(work, name, m) for name in EXCHANGES if name != "auto" and m > 1}
    store = shape.rows * L * D * 2 * shape.itemsize
    seconds = _seconds(work, reaches, m, W, gradients, machine)
    seconds["communication"] = moving / parse_bytes(machine.link)
    seconds["reading"] = 2 * rows * L * D * shape.itemsize / m / parse_bytes(machine.store)
    return Plan(whole, own, parts, phases, host, sent, moving, parallel.exchange, exchanges, store, seconds)


def decided(
    shape: Shape,
    transcoder: TranscoderSettings,
    trainer: TrainerSettings,
    parallel: ParallelSettings,
    machine: MachineSettings,
) -> ParallelSettings:
    """The mesh with `exchange` no longer `auto`: what is fewer bytes. (A run times both.)"""
    if parallel.exchange != "auto":
        return parallel
    found = choices(shape, transcoder, trainer, parallel, machine)
    return replace(parallel, exchange=min(found, key=lambda name: sum(flow.moved for flow in found[name].values())))


def choices(
    shape: Shape,
    transcoder: TranscoderSettings,
    trainer: TrainerSettings,
    parallel: ParallelSettings,
    machine: MachineSettings,
) -> dict[str, dict[str, Flow]]:
    """What feature ranks would exchange in a step, by each way between which `auto` may choose: active values only
    where the step lists them from its beginning, and neither where only the other has room."""
    work, m = work_of(shape, transcoder, trainer, parallel, machine.device), parallel.features
    names = ["reconstructions"]
    if m > 1 and work.sparse and not work.d_model % m:
        names.append("actives")
        meshes = [replace(parallel, exchange=name) for name in names]
        fits = [make_plan(shape, transcoder, trainer, mesh, machine).fits(machine) for mesh in meshes]
        names = [name for name, room in zip(names, fits, strict=True) if room] or names
    return {name: exchanged(work, name, m) for name in names}


def work_of(
    shape: Shape, transcoder: TranscoderSettings, trainer: TrainerSettings, parallel: ParallelSettings, device: str
) -> Work:
    """A step of one rank, in numbers."""
    L, D, sizes = shape.n_layers, shape.d_model, transcoder.sizes(shape.n_layers)
    active = _active(transcoder, trainer, L)[1]
    topk_kind = transcoder.activation in TOPK
    return Work(
        sizes=sizes,
        d_model=D,
        rows=-(-trainer.batch // parallel.data),
        pieces=trainer.accumulate,
        active=active,
        auxiliary=min(trainer.aux_k or max(1, D // 2), max(sizes)) if topk_kind and trainer.aux_weight else 0,
        sparse=_is_sparse(transcoder, trainer, active, L, sum(sizes), device),
        norms=not topk_kind and (trainer.lam_preactivation > 0 or trainer.penalty() in NORMED),
        activation=transcoder.activation,
    )


def what_fits(
    shape: Shape,
    transcoder: TranscoderSettings,
    trainer: TrainerSettings,
    parallel: ParallelSettings,
    machine: MachineSettings,
) -> str | None:
    """The first of: more pieces a step, more feature ranks, both; as settings to type. None where nothing helps."""
    sizes = transcoder.sizes(shape.n_layers)
    ranks = parallel.features
    while ranks <= MOST_RANKS:
        if all(size % ranks == 0 for size in sizes) and (parallel.exchange != "actives" or shape.d_model % ranks == 0):
            for accumulate in (trainer.accumulate * 2**i for i in range(5)):
                if trainer.batch % (accumulate * parallel.data):
                    break
                pieces = replace(trainer, accumulate=accumulate)
                mesh = replace(parallel, features=ranks)
                if make_plan(shape, transcoder, pieces, mesh, machine).fits(machine):
                    words = (
                        [f"parallel.features={ranks} ({mesh.processes} processes)"] if ranks > parallel.features else []
                    )
                    words += [f"trainer.accumulate={accumulate}"] if accumulate > trainer.accumulate else []
                    return " with ".join(words)
        ranks *= 2
    return None


class _FirstRows(NamedTuple):
    peak: float
    kept: float
    """Their buffers stay in the loader's pool."""


def _first_rows(shape: Shape, sizes: list[int], rate: float) -> _FirstRows:
    """The rows by which the first biases are set (`initialisation.rows_for`), and one layer's pre-activations."""
    rows = min(shape.rows, rows_for(rate))
    kept = 2 * rows * shape.n_layers * shape.d_model * shape.itemsize
    read = rows * shape.n_layers * shape.d_model * FLOAT
    return _FirstRows(kept + read + min(rows * max(sizes), PREACTIVATIONS_AT_ONCE) * FLOAT, kept)


def _active(transcoder: TranscoderSettings, trainer: TrainerSettings, n_layers: int) -> tuple[float, float]:
    """Active features a token and layer: in the end, and at most (topk kinds begin with more)."""
    target = max(trainer.per_layer("target_l0", n_layers) or [float(transcoder.k)])
    if transcoder.activation not in TOPK:
        return target, target
    return target, max(target, trainer.first_k(target, max(transcoder.sizes(n_layers))))


def _is_sparse(
    transcoder: TranscoderSettings, trainer: TrainerSettings, active: float, layers: int, features: int, device: str
) -> bool:
    """jumprelu and relu begin with many entries near their thresholds: `auto` takes the dense step there."""
    auto = transcoder.activation in TOPK and use_sparse("auto", active * layers / features, device)
    return auto if trainer.sparse == "auto" else trainer.sparse == "on"


def _activations(
    transcoder: TranscoderSettings, trainer: TrainerSettings, work: Work, piece: int, m: int, slices: int, spare: float
) -> float:
    """What lies between the rows and the losses. Dense: h, a and what each term keeps, [B, F] each, of every layer.

    Where decoders are cut along their width, a rank works on its own entries and on everyone's.
    """
    everyones = 1.0 if slices > 1 else 0.0
    if work.sparse:
        entries = piece * work.active * work.layers * ENTRY_BYTES * spare
        return piece * max(work.sizes) // m * FLOAT + entries * (1 / m + everyones)
    copies = {"topk": 2.0, "batchtopk": 2.0, "relu": 3.0, "jumprelu": 3.0}[transcoder.activation]
    if transcoder.activation in ("relu", "jumprelu") and trainer.penalty() != "target":
        copies += 0.7
    return ((copies + 1.6 / work.layers) / m + everyones) * piece * sum(work.sizes) * FLOAT


def _spare(transcoder: TranscoderSettings, parallel: ParallelSettings) -> float:
    """How much longer an accelerator's lists are than what is active, since their length is set beforehand."""
    by_count = transcoder.activation in TOPK
    if by_count and transcoder.k_scope == "layer" and parallel.processes == 1:
        return 1.0
    return MARGIN * (UNEVEN if by_count else 1.0)


def _unformed(trainer: TrainerSettings, parallel: ParallelSettings, work: Work, reaches: list[int]) -> float:
    """Parameters of a rank whose gradients are never formed: nothing else is added to them."""
    if not work.sparse or trainer.accumulate > 1 or parallel.data > 1:
        return 0.0
    encoder = 0 if trainer.optimizer == "muon" else 1
    return sum(F * (encoder + r) * work.d_model for F, r in zip(work.sizes, reaches, strict=True)) / parallel.features


def _auxiliary(work: Work, piece: int, m: int, slices: int, written: float) -> float:
    """topk kinds, once features are dead."""
    if not work.auxiliary:
        return 0.0
    everyones = 1.0 if slices > 1 else 0.0
    if not work.sparse:
        return (1.3 / m + everyones) * piece * sum(work.sizes) * FLOAT + 3 * written
    return piece * work.auxiliary * work.layers * ENTRY_BYTES * (1 / m + everyones) + 3 * written


def _buffers(parallel: ParallelSettings, cut: list[int], written: float, work: Work, slices: int) -> float:
    """Copies that collectives work on."""
    shared = 0.0
    if slices > 1:
        shared = 3 * (FLOAT + FLOAT) * work.rows / work.pieces * work.layers * (work.active + work.auxiliary)
    elif parallel.features > 1:
        shared = written
    bucket = min(BUCKET_BYTES, max(cut) * FLOAT) if parallel.data > 1 else 0
    return shared + bucket


def _restart(trainer: TrainerSettings, features: int, d_model: int) -> float:
    """On all rows of all data ranks: a layer's features that start again, three times, and its rows, three times."""
    started = min(features, max(1, trainer.batch // RESTARTED_AT_ONCE))
    return trainer.batch * 3 * (started + d_model) * FLOAT


def _seconds(
    work: Work, reaches: list[int], m: int, W: float, gradients: float, machine: MachineSettings
) -> dict[str, float]:
    encoder = sum(2 * work.rows * work.d_model * F / m for F in work.sizes)
    decoder = sum(2 * work.rows * work.d_model * F * r / m for F, r in zip(work.sizes, reaches, strict=True))
    operations = encoder if work.sparse else 2 * encoder + 3 * decoder
    touched = 6 * W + gradients  # Adam reads weights, moments and gradients, and writes the first two
    if work.sparse:
        touched += 2 * gradients + 3 * sum(
            work.rows * work.active * (1 + r) * work.d_model * FLOAT / m for r in reaches
        )
    return {
        "arithmetic": operations / (machine.tflops * 1e12),
        "memory": touched / parse_bytes(machine.memory_bandwidth),
    }
