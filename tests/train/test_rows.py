"""Gradients that are not formed: the same norm, the same update, and no memory for them."""

import pytest
import torch
from crosslace.train import step
from crosslace.train.loss.objective import dense_pass
from crosslace.train.loss.state import Counters, RunningState
from crosslace.train.parallel.collectives import SINGLE
from crosslace.train.run.optimizers import Optimizers
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.sparse import cpu as native
from crosslace.train.sparse.forward import sparse_pass
from crosslace.train.sparse.products import make_entries
from crosslace.train.sparse.row_gradients import (
    RowGradient,
    RowGradients,
    adam_numbers,
    adam_rows,
    form,
    row_gradient_norms,
)
from crosslace.train.sparse.workspace import Workspace
from crosslace.train.step import StepParts, objective_of, train_step
from crosslace.train.transcoder.transcoder import Transcoder
from torch import Tensor

L, D, F, B = 3, 8, 40, 24


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch):
    if request.param == "native" and native.load() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CROSSLACE_KERNELS", request.param)
    monkeypatch.setattr("crosslace.train.sparse.row_gradients._CHUNK", 5 * D)  # several chunks, the last one short
    return request.param


def make_parts(activation: str, forward, trainer: dict | None = None, dtype=torch.float64, **options) -> StepParts:
    settings = TrainerSettings(**({"steps": 10, "batch": B, "lr": 1e-2, "dead_after": 30} | (trainer or {})))
    shape = TranscoderSettings(features=F, k=4, activation=activation, theta_init=0.2, **options)
    transcoder = Transcoder(shape, D, L, dtype=dtype)
    with torch.no_grad():
        for b_enc in transcoder.b_enc:
            b_enc[:6] = -0.4
    return StepParts(
        settings, objective_of(settings, transcoder), transcoder, Optimizers(transcoder, settings),
        RunningState(transcoder, settings),
        Counters(use_aux=True, use_sparse=forward is not dense_pass), None, None, SINGLE, Workspace(),
    )  # fmt: skip


def batch(number: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)
    return x, x.flip(2) * 0.5 + 0.3


def worst(mine: StepParts, other: StepParts) -> float:
    """The largest difference between weights or moments, relative to the tensor's norm."""
    pairs = [(p.detach(), other.transcoder.get_parameter(name)) for name, p in mine.transcoder.named_parameters()]
    theirs = other.optimizers.tensors()
    pairs += [(tensor, theirs[name]) for name, tensor in mine.optimizers.tensors().items()]
    return max(float(((a - b).norm() / b.norm().clamp_min(1e-12)).detach()) for a, b in pairs)


PENALTIES = {"lam": 0.1, "lam_preactivation": 0.01, "lam_share": 0.0, "preactivation_over": "all"}
KINDS = [
    ("relu", PENALTIES, {}),
    ("jumprelu", PENALTIES | {"optimizer": "adamw", "weight_decay": 0.1}, {"bandwidth": 0.3}),
    ("batchtopk", {"clip": 1e-2}, {"reach": "1"}),
    ("batchtopk", {}, {"skip": True}),
    ("topk", {"optimizer": "muon"}, {"reach": "2"}),
]


# Muon's own arithmetic is in bfloat16: in float32 it makes much of the last bit.
CASES = [(*kind, dtype) for kind in KINDS for dtype in (torch.float64, torch.float32)][:-1]


@pytest.mark.parametrize(("activation", "trainer", "options", "dtype"), CASES)
def test_training_equals_the_dense_steps(activation, trainer, options, dtype, kernels):
    dense = make_parts(activation, dense_pass, trainer, dtype, **options)
    sparse = make_parts(activation, sparse_pass, trainer, dtype, **options)
    for number in range(4):
        for parts in (dense, sparse):
            train_step(parts, *batch(number, dtype))
        unformed = [p.grad is None for name, p in sparse.transcoder.named_parameters() if name.startswith("W_dec")]
        assert all(unformed) and dense.transcoder.W_dec[0].grad is not None
        for name, total in dense.state.sums.items():
            torch.testing.assert_close(sparse.state.sums[name], total, rtol=2e-6, atol=1e-6)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if trainer.get("clip"):
        tolerance = max(tolerance, 1e-7)  # torch's fused Adam takes the divisor in float32
    assert worst(sparse, dense) <= tolerance


def test_a_bad_step_changes_nothing(kernels):
    parts = make_parts("jumprelu", sparse_pass, PENALTIES, torch.float32)
    train_step(parts, *batch(0, torch.float32))
    before = {name: tensor.clone() for name, tensor in parts.optimizers.tensors().items()}
    weights = [p.detach().clone() for p in parts.transcoder.parameters()]
    x, y = batch(1, torch.float32)
    y[0, 0, 0] = torch.nan
    train_step(parts, x, y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.optimizers.tensors().items())
    assert all(torch.equal(p, old) for p, old in zip(parts.transcoder.parameters(), weights, strict=True))
    assert parts.state.bad_total == 1 and torch.isfinite(parts.transcoder.W_dec[0]).all()


def test_the_same_bits_every_time(kernels):
    runs = [make_parts("batchtopk", sparse_pass, dtype=torch.float32) for _ in range(2)]
    for parts in runs:
        for number in range(3):
            train_step(parts, *batch(number, torch.float32))
    assert worst(*runs) == 0


def test_loss_scaling_comes_out_again():
    parts, plain = (
        make_parts("relu", sparse_pass, {"precision": precision}, torch.float32) for precision in ("fp16", "float32")
    )
    for each in (parts, plain):
        train_step(each, *batch(0, torch.float32))
    assert parts.state.loss_scale > 1
    scaled, unscaled = (each.state.sums["grad_norms"].tolist() for each in (parts, plain))
    assert scaled == pytest.approx(unscaled, rel=0.02)


@pytest.mark.parametrize("trainer", [{"accumulate": 2}, {"optimizer": "muon"}])
def test_what_must_be_whole_is_formed(trainer):
    parts = make_parts("batchtopk", sparse_pass, trainer)
    train_step(parts, *batch(0))
    assert parts.transcoder.W_enc[0].grad is not None
    assert (parts.transcoder.W_dec[0].grad is None) is ("accumulate" not in trainer)


def test_a_second_gradient_is_added():
    """What reaches a matrix by another way too (norms taken outside, a second pass) is not lost."""
    parts = make_parts("relu", sparse_pass, PENALTIES)
    x, y = batch(0)
    inputs = step.step_inputs(parts)
    norms = {}
    for held in (RowGradients(parts.optimizers.by_rows), RowGradients([])):
        parts.optimizers.zero_grad()
        for _ in range(2):
            loss = step.step_loss(
                parts.transcoder, x, y, inputs, parts.objective, SINGLE, step.chosen_pass(parts, held)
            ).loss
            (loss + parts.transcoder.decoder_norms(0).sum()).backward()
        unformed = [norms for _, norms in held.settled()]
        grads = [p.grad for p in parts.transcoder.parameters() if p.grad is not None]
        norms[bool(held._asked)] = torch.stack([g.norm() for g in [*grads, *unformed]]).norm()
    torch.testing.assert_close(norms[True], norms[False], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_by_rows_is_torch_s_own(dtype, kernels):
    """Long lists, empty ones, items of value 0, rows wider than a block; every term of the gradient."""
    features, columns, n, tokens = 7, 2048 + 300, 60, 9
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    rows = torch.randint(0, tokens, (n,), generator=generator).sort().values
    listed = torch.randint(0, features - 2, (n,), generator=generator)
    entries = make_entries(rows, listed, tokens, features)
    values = normal(n) * (torch.rand(n, generator=generator) < 0.6)
    weight, source = normal(features, columns), normal(tokens, columns + 5)[:, 3 : 3 + columns]
    given = RowGradient(
        source, entries.ordered_rows, entries.feature_pointer, values[entries.order], weight, normal(features),
        normal(features), normal(columns),
    )  # fmt: skip
    reference = torch.nn.Parameter(weight.clone())
    adam = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1)
    first, second = torch.zeros(2, features, columns, dtype=dtype)
    for steps in range(3):
        dense = torch.zeros(tokens, features, dtype=dtype).index_put((rows, listed), values, accumulate=True)
        assert given.scale is not None and given.left is not None and given.right is not None
        gradient = dense.T @ source + given.scale[:, None] * weight + torch.outer(given.left, given.right)
        torch.testing.assert_close(form(given, torch.empty_like(weight)), gradient)
        torch.testing.assert_close(row_gradient_norms(given), gradient.norm(dim=1))
        reference.grad = gradient / 4
        adam.step()
        numbers = adam_numbers(
            adam.param_groups[0], torch.full((1,), float(steps)), torch.tensor(4.0), torch.tensor(0.0)
        )
        adam_rows(given, first, second, numbers[:, 0])
        torch.testing.assert_close(weight, reference.detach(), rtol=1e-5, atol=1e-5)
