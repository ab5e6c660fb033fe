"""Runs under torchrun: trains small transcoders on a mesh, and the same ones whole, and holds them against each other.

Every rank trains the whole one too (float64, one process) on the whole batch, so each checks its own part. Prints one
line per case from the first rank; a failed comparison ends the process with its message.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from crosslace.train.loss.objective import dense_pass, step_loss
from crosslace.train.loss.state import Counters, RunningState
from crosslace.train.parallel.collectives import SINGLE, Collectives, whole_rows
from crosslace.train.parallel.mesh import ParallelSettings, processes
from crosslace.train.run.checkpoint import Checkpoints
from crosslace.train.run.metrics import ReconstructionMetrics
from crosslace.train.run.optimizers import Optimizers
from crosslace.train.run.resampling import resample
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.sparse import active_set as select
from crosslace.train.sparse import forward as sparse
from crosslace.train.sparse import row_gradients, sharing
from crosslace.train.sparse.entries import RowGradient
from crosslace.train.sparse.row_gradients import form
from crosslace.train.sparse.workspace import Workspace
from crosslace.train.step import StepParts, chosen_pass, objective_of, step_inputs, train_step
from crosslace.train.transcoder.partition import cut_dim, new_part, part_of
from crosslace.train.transcoder.slices import all_slices
from crosslace.train.transcoder.transcoder import Transcoder
from host_reads import Reads

STEPS, TOKENS, LAYERS, WIDTH, FEATURES = 20, 16, 3, 8, 12


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str
    transcoder: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    sparse: bool = False
    fixed: bool = False
    """Lists of fixed length with empty places, as on an accelerator."""


PENALTIES = {"lam": 0.05, "lam_share": 0.0, "lam_preactivation": 0.01, "preactivation_over": "all"}
CASES = [
    Case("clt batchtopk", {"activation": "batchtopk", "k": 3}),
    Case("clt batchtopk over all layers, aux, accumulated",
         {"activation": "batchtopk", "k": 3, "k_scope": "all"}, {"accumulate": 2, "dead_after": TOKENS}),
    Case("clt batchtopk, sparse, aux", {"activation": "batchtopk", "k": 3}, {"dead_after": TOKENS}, sparse=True),
    Case("plt topk, sparse", {"activation": "topk", "k": 3, "reach": "1"}, sparse=True),
    Case("clt jumprelu, penalties, accumulated", {"activation": "jumprelu"}, {**PENALTIES, "accumulate": 2}),
    Case("clt jumprelu, penalties, sparse", {"activation": "jumprelu"}, PENALTIES, sparse=True),
    Case("clt batchtopk, sparse, aux, fixed lists", {"activation": "batchtopk", "k": 3}, {"dead_after": TOKENS},
         sparse=True, fixed=True),
    Case("clt batchtopk over all layers, sparse, fixed lists", {"activation": "batchtopk", "k": 3, "k_scope": "all"},
         sparse=True, fixed=True),
    Case("clt topk, sparse, aux, fixed lists", {"activation": "topk", "k": 3}, {"dead_after": TOKENS}, sparse=True,
         fixed=True),
    Case("clt jumprelu, penalties, sparse, fixed lists", {"activation": "jumprelu"}, PENALTIES, sparse=True,
         fixed=True),
    Case("plt jumprelu, steered, skip, tight clip", {"activation": "jumprelu", "reach": "1", "skip": True},
         {**PENALTIES, "target_l0": 2.0, "clip": 1e-2}),
    Case("windowed jumprelu, quadratic target", {"activation": "jumprelu", "reach": "2"},
         {"sparsity": "target", "target_l0": 2.0, "accumulate": 2}),
]  # fmt: skip


@contextmanager
def lists_as_on_an_accelerator() -> Iterator[None]:
    with ExitStack() as kept:
        kept.enter_context(patch.dict(os.environ, CROSSLACE_KERNELS="torch"))
        kept.enter_context(patch.object(row_gradients, "chunks", whole_chunk))
        for module in (select, sparse, sharing):
            kept.enter_context(patch.object(module, "read_freely", lambda _: False))
        yield


def whole_chunk(rows: RowGradient) -> Iterator[tuple[slice, torch.Tensor]]:
    """The kernels of an accelerator find the ends of the lists by themselves."""
    yield slice(0, len(rows.weight)), form(rows, torch.empty_like(rows.weight))


def parts_for(case: Case, comm: Collectives) -> StepParts:
    settings = TrainerSettings(steps=STEPS, batch=TOKENS, lr=1e-2, **case.trainer)
    shape = TranscoderSettings(features=FEATURES, **case.transcoder)
    whole = Transcoder(shape, WIDTH, LAYERS, dtype=torch.float64)
    transcoder = part_of(whole, comm)
    targets = settings.per_layer("target_l0", LAYERS)
    target = None if targets is None else torch.tensor(targets)
    counters, state = Counters(use_aux=True, use_sparse=case.sparse), RunningState(transcoder, settings)
    return StepParts(
        settings, objective_of(settings, transcoder), transcoder, Optimizers(transcoder, settings), state, counters,
        target, targets, comm, Workspace(),
    )  # fmt: skip


@torch.no_grad()
def whole_of(part: Transcoder, comm: Collectives) -> Transcoder:
    """The whole transcoder, gathered on every rank."""
    if comm.feature_ranks == 1:
        return part
    settings = replace(part.settings, features_per_layer=[size * comm.feature_ranks for size in part.features])
    whole = Transcoder(
        settings, part.d_model, part.layers, seed=None, device=part.device, dtype=part.dtype, meta=part.meta
    )
    for name, parameter in whole.named_parameters():
        source, dim = part.get_parameter(name).detach(), cut_dim(name, comm)
        parameter.copy_(source if dim is None else comm.cat_features(source, dim))
    return whole


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, LAYERS, WIDTH, generator=random, dtype=torch.float64)
    return x, torch.tanh(x.flip(-1)) + 0.1 * torch.randn(x.shape, generator=random, dtype=torch.float64)


def rows_of(x: torch.Tensor, comm: Collectives, pieces: int) -> torch.Tensor:
    """This data rank's rows: of each micro-batch its share, so that micro-batches hold the same rows on any mesh."""
    cut = x.unflatten(0, (pieces, comm.data_ranks, -1))
    return cut[:, comm.data_rank].flatten(0, 1)


def agree(name: str, mine: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    scale = expected.double().abs().max().clamp_min(1e-12)
    worst = (mine.double() - expected.double()).abs().max() / scale
    if not worst <= tolerance:
        raise SystemExit(f"{name} differs by {float(worst):.2e} of its largest entry")


def compare_gradients(case: Case, sharded: StepParts, whole: StepParts, comm: Collectives) -> None:
    """Loss terms and every gradient of the first batch."""
    x, y = batch(0)
    seen = {}
    for parts, rows in ((sharded, (rows_of(x, comm, 1), rows_of(y, comm, 1))), (whole, (x, y))):
        inputs = step_inputs(parts)
        result = step_loss(parts.transcoder, *rows, inputs, parts.objective, parts.comm, chosen_pass(parts))
        result.loss.backward()
        parts.comm.reduce_gradients([p.grad for p in parts.transcoder.parameters() if p.grad is not None])
        seen[parts is whole] = result
    agree(f"{case.name}: loss", comm.mean_data(seen[False].loss), seen[True].loss.detach())
    agree(f"{case.name}: l0", comm.mean_data(seen[False].l0), seen[True].l0)
    for name, term in seen[True].terms.items():
        agree(f"{case.name}: {name}", comm.mean_data(seen[False].terms[name]), term)
    for name, parameter in whole.transcoder.named_parameters():
        if parameter.grad is not None:
            gradient = sharded.transcoder.get_parameter(name).grad
            assert gradient is not None
            dim = cut_dim(name, comm)
            gathered = gradient if dim is None else comm.cat_features(gradient, dim)
            agree(f"{case.name}: gradient of {name}", gathered, parameter.grad)
    for parts in (sharded, whole):
        parts.optimizers.zero_grad()


def compare_training(case: Case, sharded: StepParts, whole: StepParts, comm: Collectives) -> None:
    """Weights, clip norm and running state after 20 steps, some features started again half-way; then metrics."""
    pieces = whole.settings.accumulate
    for step in range(STEPS):
        if step == STEPS // 2:
            resample_alike(sharded, whole, comm)
        x, y = batch(step)
        train_step(whole, x, y)
        rows = rows_of(x, comm, pieces), rows_of(y, comm, pieces)
        with Reads() if case.fixed else nullcontext() as reads:
            train_step(sharded, *rows)
        # the first step finds out how long lists are; after a restart it is looked up what is held
        if reads is not None and step not in (0, STEPS // 2) and reads.seen:
            raise SystemExit(f"{case.name}: step {step} made the host wait for {reads.seen}")
    tolerance = 1e-7 if case.trainer.get("clip") == 1e-2 else 1e-9  # torch's fused Adam takes the divisor in float32
    together = whole_of(sharded.transcoder, comm)
    for name, parameter in whole.transcoder.named_parameters():
        agree(f"{case.name}: {name} after training", together.get_parameter(name), parameter, tolerance)
    mine, expected = sharded.state.read_sums(), whole.state.read_sums()
    for name, value in expected.items():
        agree(f"{case.name}: mean {name}", mine[name], value, 1e-6)  # running averages are float32
    for l, density in enumerate(whole.state.density):
        agree(f"{case.name}: density", comm.cat_features(sharded.state.density[l]), density, 1e-6)
    compare_metrics(case, sharded, whole, comm)


def resample_alike(sharded: StepParts, whole: StepParts, comm: Collectives) -> None:
    """Start the same features again on the mesh and whole."""
    x, y = batch(STEPS)
    random = torch.Generator().manual_seed(5)
    dead = [torch.rand(FEATURES, generator=random) < 0.3 for _ in range(LAYERS)]
    size = FEATURES // comm.feature_ranks
    own = [mask[comm.feature_rank * size :][:size] for mask in dead]
    for parts, mask, rows in ((sharded, own, (rows_of(x, comm, 1), rows_of(y, comm, 1))), (whole, dead, (x, y))):
        inputs = step_inputs(parts)._replace(dead=mask)
        resample(parts.transcoder, parts.optimizers, parts.state, inputs, *rows, seed=3, comm=parts.comm)
        started = [steps > 0 for steps in parts.state.held_steps]
        assert not any((steps & ~m).any() for steps, m in zip(started, mask))
        assert all((silent[m] == 0).all() for silent, m in zip(parts.state.silent, started))
        assert comm.max_all(torch.stack([steps.any() for steps in started]).any().float()) > 0


def compare_metrics(case: Case, sharded: StepParts, whole: StepParts, comm: Collectives) -> None:
    x, y = batch(99)
    reports = []
    for parts, rows in ((sharded, (rows_of(x, comm, 1), rows_of(y, comm, 1))), (whole, (x, y))):
        metrics = ReconstructionMetrics(parts.transcoder.features, WIDTH, comm=parts.comm)
        done = dense_pass(parts.transcoder, rows[0], step_inputs(parts), parts.objective, parts.comm)
        metrics.update(rows[1], all_slices(done.y_hat, parts.comm), [layer.acts for layer in done.layers])
        reports.append(metrics.compute())
    for name, value in reports[1]["overall"].items():
        agree(f"{case.name}: metric {name}", torch.tensor(reports[0]["overall"][name]), torch.tensor(value), 1e-7)


def compare_beginnings(comm: Collectives) -> None:
    """A part that is drawn in place holds the numbers that the whole would have."""
    shape = TranscoderSettings(features=FEATURES, skip=True, activation="jumprelu")
    drawn = new_part(shape, WIDTH, list(range(LAYERS)), 3, {}, comm)
    for name, parameter in part_of(Transcoder(shape, WIDTH, LAYERS, seed=3), comm).named_parameters():
        agree(f"{name} at first", drawn.get_parameter(name), parameter, 0.0)


def compare_rows(comm: Collectives) -> None:
    """Rows that feature ranks have read apart are, together, those of their data rank, as they lie in a batch."""
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.randn(LAYERS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype).transpose(0, 1)
        own = rows.unflatten(0, (comm.feature_ranks, -1))[comm.feature_rank]
        whole = whole_rows(own, comm)
        assert torch.equal(whole, rows) and whole.stride() == rows.stride()


def compare_checkpoints(comm: Collectives) -> None:
    """What is saved in the background while steps go on is what there was, and can be read back on this mesh."""
    parts = parts_for(CASES[0], comm)
    folder = Path(comm.broadcast(tempfile.mkdtemp() if comm.is_main else None))
    saves = Checkpoints(folder, comm=comm, background=True)
    tensors = {f"weights/{name}": p.data for name, p in parts.transcoder.named_parameters()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saves.save(1, tensors, {"counters": {}})
    for step in range(5):
        train_step(parts, *(rows_of(part, comm, 1) for part in batch(step)))
    saves.finish()
    path, _ = saves.newest() or (folder, {})
    saves.load(path, tensors)
    for name, tensor in tensors.items():
        agree(f"{name} as saved", tensor, before[name], 0.0)
    comm.barrier()
    if comm.is_main:
        shutil.rmtree(folder)


def main(data: int, features: int, exchange: str) -> None:
    torch.set_num_threads(1)
    with processes(ParallelSettings(data, features, exchange)) as comm:
        assert comm.slices == (features if exchange == "actives" else 1)
        compare_beginnings(comm)
        compare_rows(comm)
        compare_checkpoints(comm)
        for case in CASES:
            with lists_as_on_an_accelerator() if case.fixed else nullcontext():
                for compare in (compare_gradients, compare_training):
                    compare(case, parts_for(case, comm), parts_for(case, SINGLE), comm)
            if comm.is_main:
                print("agrees:", case.name, flush=True)
        assert comm.broadcast({"folder": "ä", "step": 3} if comm.is_main else None) == {"folder": "ä", "step": 3}
        assert comm.broadcast(None) is None


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
