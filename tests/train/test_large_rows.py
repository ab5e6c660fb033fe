"""Rows that are far larger than the others: restarts that do no harm, a loss that no few rows rule, a run that says
when it diverges, and figures that tell."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.store import ActivationStore, in_memory_store
from crosslace.train.loss.losses import RowBounds, reconstruction, row_losses, row_weights
from crosslace.train.parallel import SINGLE
from crosslace.train.run.metrics import ReconstructionMetrics
from crosslace.train.run.resampling import HOLD, drawing_weights, resample
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.step import step_inputs, train_step
from crosslace.train.trainer import Trainer

D, L, SINK = 24, 2, 7


def rows(n: int, share: float, seed: int, times: float = 10.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and y [n, L, D] of a small nonlinear map, and the rows [n] that stand apart: larger, in one direction."""
    world, draw = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    reads = torch.nn.functional.normalize(torch.randn(L, 4 * D, D, generator=world), dim=-1)
    writes = torch.randn(L, 4 * D, D, generator=world)
    apart = torch.nn.functional.normalize(torch.randn(2, L, D, generator=world), dim=-1)
    fires = torch.rand(n, L, 4 * D, generator=draw) < 6 / (4 * D)
    amounts = fires * torch.rand(n, L, 4 * D, generator=draw)
    x = torch.einsum("nlf,lfd->nld", 3 * amounts, reads) + torch.randn(L, D, generator=world)
    y = torch.einsum("nlf,lfd->nld", (torch.einsum("nld,lfd->nlf", x, reads) - 1).relu(), writes)
    sink = torch.rand(n, generator=draw) < share
    size = times * (1 + 0.3 * torch.randn(n, L, 1, generator=draw))
    x = x + sink[:, None, None] * size * apart[0] * x.norm(dim=-1).mean()
    y = y + sink[:, None, None] * size * apart[1] * y.norm(dim=-1).mean()
    return x, y, sink


def store(share: float, n: int = 12_000, seed: int = 0) -> ActivationStore:
    x, y, sink = rows(n, share, seed)
    return in_memory_store(x, y, token=torch.where(sink, SINK, 1).to(torch.int32))


SETTINGS = TrainerSettings(
    steps=190, batch=256, dead_after=7000, k_share=0.0, log_every=1, eval_every=0, checkpoint_every=0, sparse="on"
)
SHAPE = TranscoderSettings(features=192, k=6, reach="all")


@pytest.mark.parametrize("share", [0.0, 0.001])
def test_the_loss_does_not_rise_after_a_restart(share, tmp_path):
    """In the fifty steps after each restart, on rows that stay the same; with planted sinks, and without."""
    trainer = Trainer(replace(SETTINGS, resample_every=0), SHAPE, store(share), store(share, 2000, 1), tmp_path)
    parts, normalisation = trainer.parts, trainer.normalisation
    x, y, sink = rows(2000, share, seed=2)
    x, y, sink = normalisation.x(x), normalisation.y(y), sink
    assert (sink.sum() > 0) == (share > 0)
    seen, started = [], 0
    for step in range(170):
        batch = trainer.store.batch(0, step % 40, 256)
        inputs = normalisation.x(batch.resid), normalisation.y(batch.mlp_out)
        if step in (70, 120):
            given = step_inputs(parts)
            started += sum(int(dead.sum()) for dead in given.dead)
            resample(parts.transcoder, parts.optimizers, parts.state, given, *inputs, seed=step, comm=SINGLE)
        train_step(parts, *inputs)
        with torch.no_grad():
            h = parts.transcoder.preactivations(x)
            tau = parts.transcoder.select(h, SINGLE, 6.0)
            error = (parts.transcoder.decode(parts.transcoder.activate(h, tau, SINGLE), x) - y).square().sum((1, 2))
        seen.append((float(error[~sink].mean()), float(error.mean())))
    assert started > 40
    for at in (70, 120):
        for kind in (0, 1):
            before = max(values[kind] for values in seen[at - 10 : at])
            assert max(values[kind] for values in seen[at : at + 50]) < 1.1 * before


def test_what_was_started_writes_no_more_than_the_error_it_found(tmp_path):
    """After every step that it is held for its decoders keep their bounds, and the encoders stand still."""
    trainer = Trainer(replace(SETTINGS, resample_every=0), SHAPE, store(0.001), store(0.001, 2000, 1), tmp_path)
    parts, norm = trainer.parts, trainer.normalisation
    data = [(norm.x(b.resid), norm.y(b.mlp_out)) for b in (trainer.store.batch(0, s, 256) for s in range(40))]
    for step in range(60):
        train_step(parts, *data[step % 40])
    given, (x, y) = step_inputs(parts), data[20]
    resample(parts.transcoder, parts.optimizers, parts.state, given, x, y, seed=1, comm=SINGLE)
    started = [steps > 0 for steps in parts.state.held_steps]
    assert all(64 >= int(mask.sum()) > 5 for mask in started)  # one for every fourth token of the batch at most
    encoders = [W[mask].clone() for W, mask in zip(parts.transcoder.W_enc, started)]
    largest = 0.0
    for step in range(HOLD):
        train_step(parts, *data[(21 + step) % 40])
        for l, mask in enumerate(started):
            assert torch.equal(parts.transcoder.W_enc[l][mask], encoders[l])
            norms = parts.transcoder.W_dec[l][mask].norm(dim=-1)
            assert (norms <= parts.state.write_limit[l][mask] * 1.0001).all()
        largest = max(largest, float(norms.max()))
    assert largest > 0
    train_step(parts, *data[0])
    assert not torch.equal(parts.transcoder.W_enc[0][started[0]], encoders[0])  # free again


def test_rows_are_drawn_by_their_squared_error_and_large_ones_by_what_is_missing():
    error, size = torch.ones(100), torch.ones(100)
    error[0], error[1] = 4.0, 400.0
    size[1] = 400.0
    weight = drawing_weights(error, size)
    assert weight[0] == 4 * weight[2] and weight[1] == weight[2]
    error[3] = 1e9
    weight = drawing_weights(error, size)
    assert weight[3] / weight.sum() <= 0.11


def test_a_row_far_above_the_rest_counts_up_to_the_cap():
    y, y_hat = torch.zeros(4, 1, 2), torch.ones(4, 1, 2, requires_grad=True)
    y[3] = 101.0
    loss = row_losses(y_hat, y)
    assert loss[:, 0].tolist() == pytest.approx([1.0, 1.0, 1.0, 10000.0])
    size = torch.ones(4, 1)

    def bounds(cap: float, limit: float = torch.inf) -> RowBounds:
        return RowBounds(*(torch.tensor([value]) for value in (cap, limit, 0.5)))

    capped = reconstruction(y_hat, y, row_weights(loss, size, bounds(16.0)))
    assert capped.tolist() == pytest.approx([(3 + 16) / 4])
    size[3] = 100.0  # outsize, its error counts as if the row were of another size
    assert row_weights(loss, size, bounds(1e5, 9.0))[:, 0].tolist() == pytest.approx([1, 1, 1, 0.005])
    assert row_weights(loss, size, bounds(16.0, 9.0))[3] == pytest.approx(16 / 10_000)
    whole, free = reconstruction(y_hat, y), reconstruction(y_hat, y, row_weights(loss, size, bounds(1e5)))
    assert torch.equal(whole, free)
    for term in (whole, free):
        term.sum().backward(retain_graph=True)
    assert torch.equal(*(torch.autograd.grad(term.sum(), y_hat)[0] for term in (whole, free)))


def test_a_row_is_outsize_against_the_largest_hundredth_and_no_long_tail_is(tmp_path):
    trainer = Trainer(SETTINGS, SHAPE, store(0.0), store(0.0, 2000, 1), tmp_path)
    state, words = trainer.parts.state, torch.ones(L)
    assert state.row_bounds().outsize.isinf().all()  # before any row
    count = state.row_sizes.shape[1]
    state.row_losses.fill_(1.0)
    state.row_sizes.copy_((count / torch.arange(1, count + 1)).sqrt())  # a smooth tail up to 64 medians of |y|^2
    bounds = state.row_bounds()
    assert (bounds.outsize > state.row_sizes.amax(1)).all() and torch.equal(bounds.cap, 4 * words)
    state.row_sizes.fill_(1.0)
    state.row_sizes[0, :40], state.row_losses[0, :40] = 100.0, 100.0
    bounds = state.row_bounds()
    assert torch.equal(bounds.outsize, 16 * words) and torch.equal(bounds.large, words)
    assert torch.equal(bounds.cap, 4 * words)  # the quantile is not the sinks'


def error_of_other_rows(share: float, times: float, folder: Path) -> float:
    """Held out, on all rows but the sinks."""
    x, y, _ = rows(12_000, share, 0, times)
    held_x, held_y, sink = rows(3000, share, 50, times)
    stores = in_memory_store(x, y), in_memory_store(held_x, held_y)
    trainer = Trainer(replace(SETTINGS, log_every=190), SHAPE, *stores, folder)
    trainer.run()
    x, y = trainer.normalisation.x(held_x[~sink]), trainer.normalisation.y(held_y[~sink])
    transcoder, evaluation = trainer.parts.transcoder, trainer.evaluation
    assert evaluation is not None
    with torch.no_grad():
        acts = transcoder.activate(transcoder.preactivations(x), evaluation.thresholds, SINGLE)
        return float((transcoder.decode(acts, x) - y).square().sum() / y.square().sum())


@pytest.fixture(scope="module")
def error_without_sinks(tmp_path_factory) -> float:
    return error_of_other_rows(0.0, 1.0, tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("share, times", [(0.001, 10.0), (0.001, 100.0), (0.005, 10.0)])
def test_planted_sinks_leave_the_other_rows_alone(share, times, error_without_sinks, tmp_path):
    assert error_of_other_rows(share, times, tmp_path) < 1.1 * error_without_sinks


def test_a_divergence_is_said_with_its_tokens_and_may_stop_or_rewind(tmp_path):
    """The learning rate is absurd: the first alarm names the step, and what carries the error."""
    wild = replace(SETTINGS, steps=120, lr=3e-3, resample_every=0, log_every=5, checkpoint_every=20)
    stores = store(0.001), store(0.001, 2000, 1)

    def broken(settings, folder):
        trainer = Trainer(settings, SHAPE, *stores, folder)
        steps = trainer.records.write

        def write(step, values):
            steps(step, values)
            if step == 50 and "loss" in values and not trainer.parts.counters.rewinds:
                with torch.no_grad():
                    for W in trainer.parts.transcoder.W_dec:
                        W.mul_(100)

        trainer.records.write = write
        return trainer

    trainer = broken(wild, tmp_path / "warn")
    assert trainer.run().status == "finished"
    assert len(trainer.guard.said) >= 1
    assert (
        "step 55: the training NMSE is" in trainer.guard.said[0]
        and "of the last batch's error is in 1 row (token" in (trainer.guard.said[0])
    )
    with pytest.raises(UserError, match=r"training stopped at step 55: .*on_divergence=stop"):
        broken(replace(wild, on_divergence="stop"), tmp_path / "stop").run()
    trainer = broken(replace(wild, on_divergence="rewind"), tmp_path / "rewind")
    assert trainer.run().status == "finished" and trainer.parts.counters.rewinds == 1
    assert trainer.parts.settings.lr == 1.5e-3 and trainer.evaluation is not None
    assert trainer.evaluation.report["overall"]["nmse"] < 0.5


def test_no_mean_alone():
    """One row of 2,000 makes the mean: the median says what is usual, and the row's token is named."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2000, 1, 4, generator=generator)
    y_hat, token = 0.9 * y, torch.arange(2000)
    y_hat[11] = 400.0
    metrics = ReconstructionMetrics([3], 4)
    for part in (slice(0, 500), slice(500, 2000)):
        metrics.update(y[part], y_hat[part], [torch.ones(len(y[part]), 3)], token[part])
    report = metrics.compute()
    assert report["overall"]["nmse"] > 10 and report["overall"]["nmse_median"] == pytest.approx(0.01, rel=1e-3)
    assert report["overall"]["worst_share"] > 0.99 and 11 in report["worst_tokens"][0]
    calm = ReconstructionMetrics([3], 4)
    calm.update(y, 0.9 * y, [torch.ones(2000, 3)])
    assert calm.compute()["overall"]["worst_share"] < 0.02 and "worst_tokens" not in calm.compute()
