"""What test_kernels.py runs in a process of its own: on the device, or under Triton's interpreter where there is none.

Triton decides when it is first imported whether kernels are compiled or interpreted, so that no test here may share a
process with one that has imported it already.
"""

import pytest
import torch
from crosslace.train.gather import Entries, decode_backward, gather_sum, make_entries
from crosslace.train.objective import Objective, StepInputs, dense_pass, step_loss
from crosslace.train.sparse import sparse_pass
from crosslace.train.transcoder import Transcoder, TranscoderSettings
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
    return make_entries(rows.to(DEVICE), features.to(DEVICE), ROWS, FEATURES)


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


@pytest.mark.parametrize("columns", [5, 64, 2048 + 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_both_gradients_in_one_pass(columns, dtype, scaled):
    entries = make_lists()
    values = torch.rand(N, device=DEVICE).to(dtype)
    weight = torch.randn(FEATURES, columns, device=DEVICE, dtype=dtype)
    grad = torch.randn(ROWS, columns + 7, device=DEVICE, dtype=dtype)[:, 2 : 2 + columns]
    scale = torch.rand(FEATURES, device=DEVICE).to(dtype) if scaled else None
    out = torch.empty_like(weight)
    grad_values = decode_backward(grad, weight, entries, values, scale, out)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    expected = incidence(entries, values.double()).T @ grad.double()
    if scale is not None:
        expected += scale.double()[:, None] * weight.double()
    assert_near(out, expected, tolerance)
    decode_backward(grad, weight, entries, values, scale, out, add=True)
    assert_near(out, 2 * expected, tolerance)
    dots = (grad.double() @ weight.double().T)[entries.rows, entries.features]
    assert_near(grad_values, dots, tolerance)


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


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_step_reads_nothing_back():
    transcoder = Transcoder(TranscoderSettings(features=256, activation="batchtopk", k=4), 64, 3, device=DEVICE)
    x, y = torch.randn(2, 128, 3, 64, device=DEVICE)
    objective = Objective(None, 4.0, False, True, 1 / 32, 8)
    dead = [torch.arange(256, device=DEVICE) % 20 == 0 for _ in range(3)]
    inputs = StepInputs([4.0] * 3, torch.zeros(3, device=DEVICE), 0.0, dead)
    step_loss(transcoder, x, y, inputs, objective, forward=sparse_pass).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_loss(transcoder, x, y, inputs, objective, forward=sparse_pass).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
