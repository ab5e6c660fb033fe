"""Where metrics go: metrics.jsonl and trackers; and the figures of one metric line."""

import json
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from ..loss import scheduled_lr
from ..transcoder import decoder_norms
from .metrics import DENSE_ABOVE, finite_rows, worst_rows
from .parts import StepParts

_log = logging.getLogger(__name__)

MOST_STALL = 0.05
"""A larger share of the time spent waiting for rows is said."""

# Above this many features a histogram is drawn from a sample.
_HISTOGRAM = 16_384


class Tracker(Protocol):
    """A listener to one training run, on the main process."""

    def resume(self, state: dict[str, Any]) -> None:
        """Once, before the first line: {} on a fresh run, else what `state` gave at the checkpoint."""
        ...

    def log(self, step: int, values: dict[str, float], histograms: dict[str, Tensor]) -> None:
        """A metric line; histograms are raw values on the CPU (densities, thresholds), often empty."""
        ...

    def state(self) -> dict[str, Any]:
        """What the tracker needs to go on after a resume, as JSON."""
        ...

    def close(self, summary: dict[str, float]) -> None:
        """Once, at the end, with the last held-out figures, tokens/s and the first step's seconds."""
        ...


class Records:
    """One JSON object a line, each with its step; a resumed run first drops lines of steps that it will repeat."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path, self.active = path, active
        self._file: TextIO | None = None
        self.clock = time.perf_counter()
        self.stalled = 0.0
        self.last_step = 0
        self.note = ""
        """The last line in short, for the progress bar."""
        self.speed: dict[str, float] = {}
        self._rated_steps, self._rated_seconds = 0, 0.0
        self._stall_said = False

    def start(self, step: int) -> None:
        self.clock, self.last_step = time.perf_counter(), step
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            aside = self.path.with_name(f".{self.path.name}.writing")
            aside.write_text("".join(f"{line}\n" for line in kept))
            aside.replace(self.path)
        self._file = self.path.open("a")

    def set_apart(self, step: int, stall_seconds: float, device: torch.device) -> None:
        """After this process's first step, which builds kernels and touches its memory for the first time:
        its seconds, without the wait for data, are a figure of their own, and no part of tokens/s."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.speed["first_step_seconds"] = now - self.clock - stall_seconds
        self.clock, self.stalled, self.last_step = now, stall_seconds, step

    def rates(self, step: int, stall_seconds: float, batch: int) -> dict[str, float]:
        """Of the steps since the last line, but for the first one."""
        now = time.perf_counter()
        steps, seconds = step - self.last_step, max(now - self.clock, 1e-9)
        stall = (stall_seconds - self.stalled) / seconds
        if stall > MOST_STALL and seconds > 1 and self.active and not self._stall_said:
            self._stall_said = True
            _log.warning(
                "training waited for rows %.0f%% of the last %d steps' time: raise trainer.prefetch, put the store on "
                "a faster disk, or keep it as int8 (store.dtype=int8)", 100 * stall, steps,
            )  # fmt: skip
        self.clock, self.stalled, self.last_step = now, stall_seconds, step
        self._rated_steps, self._rated_seconds = self._rated_steps + steps, self._rated_seconds + seconds
        if self._rated_steps:
            self.speed["tokens_per_second"] = self._rated_steps * batch / self._rated_seconds
        known = {name: value for name, value in self.speed.items() if name != "tokens_per_second"}
        return known | ({"tokens_per_second": steps * batch / seconds, "loader_stall": stall} if steps else {})

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self._file is not None:
            finite = {
                name: value if not isinstance(value, float) or math.isfinite(value) else None
                for name, value in values.items()
            }
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash counts as never written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


@torch.no_grad()
def training_values(
    parts: StepParts, stall_seconds: float, records: Records
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The means since the last line, per layer and overall: the one place where training reads its device."""
    transcoder, state, counters, comm = parts.transcoder, parts.state, parts.counters, parts.comm
    means = state.read_sums()
    densities = state.densities(counters.step)
    columns: dict[str, Tensor] = {
        f"loss/{name}": means[name] for name in ("reconstruction", "sparsity", "preactivation", "auxiliary")
    }
    sizes = torch.tensor([float(size * comm.feature_ranks) for size in transcoder.features])

    def share(masks: list[Tensor]) -> Tensor:
        return comm.all_reduce_features(torch.stack([mask.sum() for mask in masks]).float()).cpu() / sizes

    columns["nmse"] = means["reconstruction"] / means["power"].clamp_min(1e-30)
    columns["capped_rows"] = means["capped"]
    columns["worst_share"] = worst_rows(finite_rows(state.row_losses))[0].cpu()
    columns["l0"] = means["l0"]
    columns["lam"] = means["lam"]
    columns["dead"] = share(state.dead(counters.step))
    columns["dense"] = share([density > DENSE_ABOVE for density in densities])
    norms = decoder_norms(transcoder, comm)
    columns["decoder_norm"] = comm.all_reduce_features(torch.stack([norm.sum() for norm in norms])).cpu() / sizes
    if len(transcoder.log_theta):
        thetas = [transcoder.theta(l) for l in range(transcoder.n_layers)]
        columns["theta"] = comm.all_reduce_features(torch.stack([theta.sum() for theta in thetas])).cpu() / sizes

    values = {
        "tokens": float(counters.step * parts.settings.batch),
        "loss": float(sum(columns[name].sum() for name in columns if name.startswith("loss/"))),
        "grad_norm": float(means["grad_norms"][0]),
        **{f"grad_norm/{l}": float(norm) for l, norm in zip(transcoder.layers, means["grad_norms"][1:], strict=True)},
        "lr": scheduled_lr(parts.settings, max(transcoder.features) * comm.feature_ranks, counters.step - 1),
        "bad_steps": float(state.bad_total),
        "bad_steps_in_row": float(state.bad_in_row),
        **records.rates(counters.step, stall_seconds, parts.settings.batch),
        "memory": float(memory_bytes(transcoder.device)),
        "sparse_step": float(counters.use_sparse),
        "seconds": counters.seconds,
    }
    for name, column in columns.items():
        values[name] = float(column.mean() if not name.startswith("loss/") else column.sum())
        values |= {f"{name}/{layer}": float(v) for layer, v in zip(transcoder.layers, column, strict=True)}
    histograms = {f"density/{l}": _sample(d) for l, d in zip(transcoder.layers, densities, strict=True)}
    for l, log_theta in zip(transcoder.layers, transcoder.log_theta):
        histograms[f"theta/{l}"] = _sample(log_theta.exp())
    return values, histograms


def _sample(values: Tensor) -> Tensor:
    return values[:: -(-values.numel() // _HISTOGRAM)].detach().float().cpu()


def memory_bytes(device: torch.device) -> int:
    """Peak memory: the device's, or this process's where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
