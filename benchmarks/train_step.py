"""Seconds and peak memory of one training step: forward, loss, backward, clip, Adam; dense reference and sparse path.

    python -m benchmarks.train_step [--json] [--shape small|large|...] [--transcoder clt,plt] [--activation ...]

The dense reference is the trainer's own dense step (`objective.dense_pass`: one product per source layer), with the
same losses and the same optimizer. Each measurement runs in a process of its own, so that its peak is its own.
`*_peak` is the highest memory during a step beyond parameters and optimizer state, gradients included; `gradients`
is what they take where they are formed (the dense step forms all of them, the sparse one next to none).


On a GPU, `python -m benchmarks.train_step --json` takes the shapes of GPT-2 small and of a wider model in bf16.
"""

import argparse
import cProfile
import functools
import json
import multiprocessing
import platform
import pstats
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from crosslace.data.pages import keep_pages
from crosslace.train.loss.objective import Objective, StepInputs, dense_pass, step_loss
from crosslace.train.run.optimizers import Optimizers, total_and_layer_norms
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.sparse import cpu as native
from crosslace.train.sparse.forward import sparse_pass
from crosslace.train.sparse.row_gradients import RowGradients
from crosslace.train.sparse.workspace import Workspace
from crosslace.train.transcoder.transcoder import Transcoder
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    L: int
    D: int
    F: int
    B: int
    k: int = 16


SHAPES = {
    "tiny": Shape(4, 64, 512, 128, 8),
    "mid": Shape(4, 256, 2048, 512),
    "small": Shape(12, 256, 4096, 512),
    "large": Shape(12, 768, 8192, 512),
    "smollm2": Shape(30, 576, 2304, 512, 32),
    "gpt2": Shape(12, 768, 24576, 4096),
    "wide": Shape(16, 2048, 16384, 4096),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    transcoder: str
    activation: str
    shape: Shape
    device: str
    precision: str
    aux: bool
    repeats: int
    profile: bool = False


def build(case: Case) -> tuple[Transcoder, Tensor, Tensor, StepInputs, Objective]:
    """Weights as after some training: pre-activations of unit spread, each feature firing on k / F of tokens."""
    s, device = case.shape, torch.device(case.device)
    settings = TranscoderSettings(
        features=s.F, reach="all" if case.transcoder == "clt" else "1", activation=case.activation, k=s.k
    )
    transcoder = Transcoder(settings, s.D, s.L, device=device)
    rare = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(s.k / s.F)).item()
    with torch.no_grad():
        for W, b in zip(transcoder.W_enc, transcoder.b_enc, strict=True):
            W.div_(W.norm(dim=1, keepdim=True))
            if case.activation == "jumprelu":
                b.fill_(settings.theta_init + rare)
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(s.B, s.L, s.D, device=device, generator=generator) for _ in range(2))
    steps = case.activation == "jumprelu"
    objective = Objective("tanh" if steps else None, 4.0, steps, True, 1 / 32 if case.aux else 0.0, s.D // 2)
    dead = [torch.arange(s.F, device=device) % 20 == 0 for _ in range(s.L)]
    inputs = StepInputs([s.k] * s.L, torch.full((s.L,), 1e-3, device=device), 3e-6, dead)
    return transcoder, x, y, inputs, objective


def resident() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(case: Case, sparse: bool) -> dict[str, Any]:
    """Seconds of the fastest step (others share the machine), its peak memory, and where the time goes."""
    keep_pages()  # as the command does
    transcoder, x, y, inputs, objective = build(case)
    cuda = case.device.startswith("cuda")
    optimizers = Optimizers(transcoder, TrainerSettings())
    optimizers.set_lr(1e-4)
    for tensor in optimizers.tensors().values():
        tensor.fill_(0)  # touch the pages: the optimizer's state is not the step's own memory
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident()
    workspace = Workspace()
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "clip and Adam": []}
    found: Any = None
    profile = cProfile.Profile()

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for repeat in range(case.repeats + 1):
        if case.profile and repeat == 1:
            profile.enable()
        start = clock()
        rows = RowGradients(optimizers.by_rows)
        with torch.autocast(case.device.split(":")[0], torch.bfloat16, enabled=case.precision == "bf16"):
            chosen = functools.partial(sparse_pass, workspace=workspace, unformed=rows) if sparse else dense_pass
            found = step_loss(transcoder, x, y, inputs, objective, forward=chosen)
        forwards = clock()
        found.loss.backward()
        backwards = clock()
        formed = [(name, p.grad) for name, p in transcoder.named_parameters() if p.grad is not None]
        names = {id(p): name for name, p in transcoder.named_parameters()}
        unformed = [(names[id(p)], norms) for p, norms in rows.settled()]
        norm = total_and_layer_norms([*formed, *unformed], [], transcoder.n_layers)[0]
        optimizers.step(norm.clamp_min(1.0), (~norm.isfinite()).float(), rows)
        optimizers.zero_grad()
        for name, seconds in zip(parts, (forwards - start, backwards - forwards, clock() - backwards), strict=True):
            parts[name].append(seconds)
    if case.profile:
        profile.disable()
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(16)
    totals = [sum(step) for step in zip(*parts.values(), strict=True)]
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "first_s": totals[0],
        "seconds": min(totals[1:]),
        "median": statistics.median(totals[1:]),
        "parts": {name: round(min(values[1:]), 4) for name, values in parts.items()},
        "peak": peak - before,
        "gradients": sum(p.numel() * p.element_size() for p in transcoder.parameters()),
        "l0": float(found.l0.mean()),
        "loss": float(found.loss.detach()),
    }


def _measure_if_it_fits(case: Case, sparse: bool) -> dict[str, Any] | None:
    try:
        return measure(case, sparse)
    except torch.OutOfMemoryError:
        return None


def _in_process(case: Case, sparse: bool) -> dict[str, Any] | None:
    """The figures, or None where the device's memory does not suffice."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_if_it_fits, (case, sparse))


def bandwidth_share(case: Case, seconds: float) -> float | None:
    """Bytes that a step cannot do without (Adam reads and writes parameters and moments; the encoder is read once more,
    the decoder twice), over the time taken, as a share of what a large copy reaches on this device."""
    if not case.device.startswith("cuda"):
        return None
    s = case.shape
    decoder = s.F * s.D * (s.L * (s.L + 1) // 2 if case.transcoder == "clt" else s.L)
    encoder = s.L * s.F * s.D
    floor = 4 * (6 * (decoder + encoder) + encoder + 2 * decoder)
    big = torch.empty(1 << 28, device=case.device)
    other = torch.empty_like(big)
    other.copy_(big)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        other.copy_(big)
    torch.cuda.synchronize()
    return round(floor / seconds / (20 * big.numel() * 4 / (time.perf_counter() - start)), 3)


def encoder_seconds(case: Case) -> float:
    """The products of all layers' encoders with a batch, in the case's precision, and nothing else."""
    s, dtype = case.shape, torch.bfloat16 if case.precision == "bf16" else torch.float32
    x = torch.randn(s.B, s.D, device=case.device, dtype=dtype)
    weights = [torch.randn(s.F, s.D, device=case.device, dtype=dtype) for _ in range(s.L)]
    seconds = []
    for _ in range(case.repeats + 1):
        start = time.perf_counter()
        for W in weights:
            torch.matmul(x, W.T)
        if case.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def compare(case: Case) -> dict[str, Any] | None:
    """One line of the output; null where the dense step does not fit into the device, None where neither does."""
    sparse, dense = _in_process(case, True), _in_process(case, False)
    if sparse is None:
        return None
    s = case.shape
    line = {
        "transcoder": case.transcoder, "activation": case.activation, "L": s.L, "D": s.D, "F": s.F, "B": s.B,
        "k": s.k, "device": case.device, "dtype": case.precision, "aux": case.aux, "l0": round(sparse["l0"], 2),
        "dense_s": None, "sparse_s": round(sparse["seconds"], 4), "ratio": None, "dense_peak": None,
        "sparse_peak": sparse["peak"], "peak_ratio": None, "gradients": sparse["gradients"],
        "sparse_parts": sparse["parts"], "dense_parts": None, "first_s": round(sparse["first_s"], 3),
        "tokens_per_s": round(s.B / sparse["seconds"]), "loss_difference": None,
        "bandwidth_share": bandwidth_share(case, sparse["seconds"]),
        "encoder_share": round(encoder_seconds(case) / sparse["seconds"], 3),
    }  # fmt: skip
    if dense is not None:
        line |= {
            "dense_s": round(dense["seconds"], 4), "ratio": round(dense["seconds"] / sparse["seconds"], 2),
            "dense_peak": dense["peak"], "peak_ratio": round(sparse["peak"] / dense["peak"], 3),
            "dense_parts": dense["parts"],
            "loss_difference": abs(dense["loss"] - sparse["loss"]) / abs(dense["loss"]),
        }  # fmt: skip
    return line


def summary(name: str, line: dict[str, Any]) -> str:
    """The same for a reader."""
    dense = "does not fit"
    if line["dense_s"] is not None:
        dense = f"{line['dense_s']:.3f} s, {line['dense_peak'] / 2**20:.0f} MiB"
    ratios = "" if line["ratio"] is None else f": {line['ratio']:.1f}x, memory {line['peak_ratio']:.2f}"
    share = "" if line["bandwidth_share"] is None else f", {line['bandwidth_share']:.0%} of bandwidth"
    sparse = f"{line['sparse_s']:.3f} s, {line['sparse_peak'] / 2**20:.0f} MiB"
    words = f"{name:6} {line['transcoder']} {line['activation']:9} dense {dense}; sparse {sparse}{ratios}"
    return (
        f"{words}; {line['tokens_per_s']} tokens/s{share}, {line['encoder_share']:.0%} encoder; {line['sparse_parts']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--shape", help=f"comma-separated: {', '.join(SHAPES)}; small, or gpt2,wide on a GPU")
    parser.add_argument("--transcoder", default="clt,plt", help="comma-separated: clt, plt")
    parser.add_argument("--activation", default="batchtopk,jumprelu", help="comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None, help="float32 or bf16 (autocast); bf16 on CUDA by default")
    parser.add_argument("--aux", action="store_true", help="topk kinds: with the auxiliary loss (5%% dead)")
    parser.add_argument("--k", help="comma-separated; other k than the shape's (to find where dense wins)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where the sparse step's time goes, and nothing else")
    options = parser.parse_args()
    if not options.json:
        kernels = "C++" if native.load() is not None else "none"
        print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, kernels: {kernels}")
    precision = options.precision or ("bf16" if options.device.startswith("cuda") else "float32")
    names = options.shape or ("gpt2,wide" if options.device.startswith("cuda") else "small")
    ks = [int(k) for k in options.k.split(",")] if options.k else [None]
    shapes = [(name, replace(SHAPES[name], k=k or SHAPES[name].k)) for name in names.split(",") for k in ks]
    for name, shape in shapes:
        for transcoder in options.transcoder.split(","):
            for activation in options.activation.split(","):
                aux = options.aux and activation != "jumprelu"
                case = Case(transcoder, activation, shape, options.device, precision, aux, options.repeats)
                if options.profile:
                    measure(replace(case, profile=True), sparse=True)
                    continue
                if (line := compare(case)) is None:
                    print(f"{case} does not fit into this device's memory", file=sys.stderr)
                    continue
                print(json.dumps(line) if options.json else summary(name, line), flush=True)


if __name__ == "__main__":
    main()
