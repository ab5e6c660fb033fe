"""What test_kernels.py runs in a process of its own: on the device, or under Triton's interpreter where there is none.

Triton decides when it is first imported whether kernels are compiled or interpreted, so that no test here may share a
process with one that has imported it already.
"""

import functools

import pytest
import torch
from crosslace.train.loss.objective import Objective, StepInputs, dense_pass, step_loss
from crosslace.train.loss.state import Counters, RunningState
from crosslace.train.parallel.collectives import SINGLE
from crosslace.train.run.optimizers import Optimizers
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.sparse.forward import sparse_pass
from crosslace.train.sparse.products import Entries, gather_sum, make_entries
from crosslace.train.sparse.row_gradients import (
    RowGradient,
    RowGradients,
    adam_numbers,
    adam_rows,
    decode_backward,
    form,
    row_gradient_norms,
)
from crosslace.train.sparse.workspace import Workspace
from crosslace.train.step import StepParts, objective_of, train_step
from crosslace.train.transcoder.transcoder import Transcoder
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, FEATURES, N = 6, 9, 30


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    monkeypatch.setenv("CROSSLACE_KERNELS", "triton")


def make_lists() -> Entries:
    """Lists with empty ones among them, rows and features that occur often."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, ROWS - 1, (N,), generator=generator).sort().values
    features = torch.randint(1, FEATURES, (N,), generator=generator)
    return make_entries(rows.to(DEVICE).int(), features.to(DEVICE).int(), ROWS, FEATURES)


def incidence(entries: Entries, values: Tensor) -> Tensor:
    """[R, F]: the same entries as a dense matrix."""
    dense = values.new_zeros(ROWS, FEATURES)
    return dense.index_put((entries.rows, entries.features), values, accumulate=True)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("columns", [5, 64, 2048 + 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_decode_and_weight_gradient(columns, dtype, add):
    """One kernel, both ways round: rows by token, and tokens by feature."""
    entries = make_lists()
    values = torch.rand(N, device=DEVICE)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    weight = torch.randn(FEATURES, columns, device=DEVICE, dtype=dtype)
    wide = torch.randn(ROWS, columns + 7, device=DEVICE, dtype=dtype)
    out = wide[:, 3 : 3 + columns]
    expected = incidence(entries, values.double()) @ weight.double() + (out.double() if add else 0)
    gather_sum(weight, entries.features, entries.row_pointer, values, out, add=add)
    assert_near(out, expected, tolerance)

    grad = torch.randn(ROWS, columns + 7, device=DEVICE, dtype=dtype)[:, 2 : 2 + columns]
    found = torch.empty_like(weight)
    gather_sum(grad, entries.ordered_rows, entries.feature_pointer, values[entries.order], found)
    assert_near(found, incidence(entries, values.double()).T @ grad.double(), tolerance)


def make_rows(entries: Entries, columns: int, dtype: torch.dtype, scaled: bool, outer: bool) -> RowGradient:
    values = torch.rand(N, device=DEVICE).to(dtype)
    weight = torch.randn(FEATURES, columns, device=DEVICE, dtype=dtype)
    source = torch.randn(ROWS, columns + 7, device=DEVICE, dtype=dtype)[:, 2 : 2 + columns]
    scale, left = torch.rand(2, FEATURES, device=DEVICE).to(dtype)
    right = torch.randn(columns, device=DEVICE, dtype=dtype)
    lists = entries.ordered_rows, entries.feature_pointer, values[entries.order]
    return RowGradient(source, *lists, weight, scale if scaled else None, *((left, right) if outer else (None, None)))


def dense_gradient(entries: Entries, rows: RowGradient) -> Tensor:
    values = torch.empty_like(rows.values)
    values[entries.order] = rows.values
    gradient = incidence(entries, values.double()).T @ rows.source.double()
    if rows.scale is not None:
        gradient += rows.scale.double()[:, None] * rows.weight.double()
    if rows.left is not None and rows.right is not None:
        gradient += torch.outer(rows.left.double(), rows.right.double())
    return gradient


@pytest.mark.parametrize("columns", [5, 64, 2048 + 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_both_gradients_in_one_pass(columns, dtype, scaled):
    entries = make_lists()
    rows = make_rows(entries, columns, dtype, scaled, outer=False)
    out = torch.empty_like(rows.weight)
    grad_values, norms = decode_backward(rows, entries, out)
    assert norms is None
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    expected = dense_gradient(entries, rows)
    assert_near(out, expected, tolerance)
    decode_backward(rows, entries, out, add=True)
    assert_near(out, 2 * expected, tolerance)
    dots = (rows.source.double() @ rows.weight.double().T)[entries.rows, entries.features]
    assert_near(grad_values, dots, tolerance)
    grad_values, norms = decode_backward(rows, entries, None)
    assert norms is not None
    assert_near(grad_values, dots, tolerance)
    assert_near(norms, expected.norm(dim=1), tolerance)


@pytest.mark.parametrize("columns", [5, 1024 + 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scaled", "outer"), [(False, True), (True, False), (False, False)])
def test_adam_by_rows_needs_no_gradient(columns, dtype, scaled, outer):
    """Held against torch's own AdamW on the gradient in one piece, over steps of which one is bad."""
    entries, tolerance = make_lists(), 1e-5 if dtype == torch.float32 else 1e-10
    weight = torch.randn(FEATURES, columns, device=DEVICE, dtype=dtype)
    reference = torch.nn.Parameter(weight.clone())
    adam = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.1)
    first, second = torch.zeros(2, *weight.shape, device=DEVICE, dtype=dtype)
    steps, divisor = torch.zeros(1, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    for bad in (0.0, 0.0, 1.0, 0.0):
        rows = make_rows(entries, columns, dtype, scaled, outer)._replace(weight=weight)
        assert_near(row_gradient_norms(rows), dense_gradient(entries, rows).norm(dim=1), tolerance)
        numbers = adam_numbers(adam.param_groups[0], steps, divisor, torch.tensor(bad, device=DEVICE))
        if not bad:
            reference.grad = (dense_gradient(entries, rows) / 2).to(dtype)
            adam.step()
            steps += 1
        adam_rows(rows, first, second, numbers[:, 0])
        assert_near(weight, reference.detach().double(), tolerance)
    assert_near(second, adam.state[reference]["exp_avg_sq"].double(), tolerance)


def test_empty_places_stand_in_no_list():
    rows = torch.tensor([0, 1, 1, 3, 5, 5], device=DEVICE)
    features = torch.tensor([4, 0, 2, 2, 0, 0], device=DEVICE)
    absent = torch.tensor([False, True, False, False, True, True], device=DEVICE)
    entries = make_entries(rows, features, ROWS, FEATURES, absent)
    assert (entries.feature_pointer.diff() == torch.tensor([0, 0, 2, 0, 1, 0, 0, 0, 0], device=DEVICE)).all()
    assert (entries.row_pointer.diff() == torch.tensor([1, 1, 0, 1, 0, 0], device=DEVICE)).all()
    weight, values = torch.randn(FEATURES, 5, device=DEVICE), torch.rand(6, device=DEVICE)
    out = torch.zeros(ROWS, 5, device=DEVICE)
    gather_sum(weight, *entries.by_row(values), out)
    kept = ~absent
    expected = torch.zeros_like(out).index_add(0, rows[kept], values[kept, None] * weight[features[kept]])
    torch.testing.assert_close(out, expected)
    source = torch.randn(ROWS, 5, device=DEVICE)
    given = entries.ordered_rows, entries.feature_pointer, values[entries.order]
    grad_values, _ = decode_backward(RowGradient(source, *given, weight), entries, None)
    torch.testing.assert_close(grad_values, (source[rows] * weight[features]).sum(1) * kept)


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_equals_the_dense_one(activation, dtype):
    L, D, F, B = 2, 8, 12, 5
    transcoder = Transcoder(TranscoderSettings(features=F, activation=activation, k=3), D, L, dtype=dtype).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, L, D, dtype=dtype, generator=generator).to(DEVICE) for _ in range(2))
    steps = activation == "jumprelu"
    objective = Objective("tanh" if steps else None, 4.0, steps, True, 0.0 if steps else 1 / 32, 3)
    dead = [torch.arange(F, device=DEVICE) % 3 == 0 for _ in range(L)]
    inputs = StepInputs([3.0] * L, torch.tensor([0.1, 0.2], dtype=dtype, device=DEVICE), 0.01, dead)
    gradients = []
    for forward in (dense_pass, sparse_pass):
        transcoder.zero_grad()
        step_loss(transcoder, x, y, inputs, objective, forward=forward).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in transcoder.named_parameters() if p.grad is not None})
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, expected in gradients[0].items():
        assert float((gradients[1][name] - expected).norm()) <= tolerance * float(expected.norm() + 1e-6), name


def test_under_autocast_error_rows_are_halved():
    L, D, F, B = 2, 8, 12, 5
    transcoder = Transcoder(TranscoderSettings(features=F, activation="relu"), D, L).to(DEVICE)
    x, y = torch.randn(2, B, L, D, device=DEVICE)
    objective = Objective(None, 4.0, False, True, 0.0, 3)
    dead = [torch.zeros(F, dtype=torch.bool, device=DEVICE)] * L
    gradients = []
    for halved in (False, True):
        rows = RowGradients(transcoder.W_dec)
        inputs = StepInputs([3.0] * L, torch.zeros(L, device=DEVICE), 0.0, dead)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=halved):
            forward = functools.partial(sparse_pass, unformed=rows)
            loss = step_loss(transcoder, x, y, inputs, objective, forward=forward).loss
        loss.backward()
        assert all(given.source.dtype == (torch.bfloat16 if halved else torch.float32) for _, given in rows.items())
        gradients.append([form(given, torch.empty_like(given.weight)) for _, given in rows.items()])
    for exact, rounded in zip(*gradients, strict=True):
        assert 0 < float((rounded - exact).norm()) <= 2e-2 * float(exact.norm())


def make_parts(activation: str, sparse: bool) -> StepParts:
    settings = TrainerSettings(steps=10, batch=10, lr=1e-2, optimizer="adamw", weight_decay=0.1, dead_after=10)
    transcoder = Transcoder(
        TranscoderSettings(features=16, activation=activation, k=3, bandwidth=0.2), 8, 2, device=DEVICE
    )
    return StepParts(
        settings, objective_of(settings, transcoder), transcoder, Optimizers(transcoder, settings),
        RunningState(transcoder, settings), 
        Counters(use_aux=True, use_sparse=sparse), None, None, SINGLE, Workspace(),
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
def test_training_equals_the_dense_step_and_reads_nothing_back(activation):
    """Whole steps, the update by rows included; on a device, with an error for whatever makes the host wait."""
    dense = make_parts(activation, sparse=False)
    sparse = make_parts(activation, sparse=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        x, y = (torch.randn(10, 2, 8, generator=generator).to(DEVICE) for _ in range(2))
        train_step(dense, x, y)
        if DEVICE == "cuda" and step > 0:  # the first one compiles, and counts
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(sparse, x, y)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert sparse.transcoder.W_dec[0].grad is None
    for name, weight in dense.transcoder.named_parameters():
        assert_near(sparse.transcoder.get_parameter(name).detach(), weight.detach().double(), 1e-5)
