"""The sparse step against the dense reference: the same loss, the same gradients, whatever computes it."""

import functools

import pytest
import torch
from crosslace.train.loss.objective import Objective, Pass, StepInputs, dense_pass, step_loss
from crosslace.train.parallel.collectives import SINGLE
from crosslace.train.settings import TranscoderSettings
from crosslace.train.sparse import cpu as native
from crosslace.train.sparse.forward import SPARSE_BELOW, sparse_pass, use_sparse
from crosslace.train.sparse.workspace import Room, Workspace
from crosslace.train.transcoder.transcoder import Transcoder
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DEGENERATE = ["silent", "all active", "duplicated tokens", "duplicated features", "one token", "no dead", "all dead"]
L, D, FEATURES = 3, 16, 40


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch):
    if request.param == "native" and native.load() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CROSSLACE_KERNELS", request.param)
    return request.param


def make(activation: str, dtype=torch.float64, features: int | list[int] = FEATURES, **settings) -> Transcoder:
    sizes = {"features_per_layer": features} if isinstance(features, list) else {"features": features}
    transcoder = Transcoder(TranscoderSettings(activation=activation, k=4, **sizes, **settings), D, L, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for l in range(L):
            transcoder.W_enc[l].mul_(3)
            for vector in (transcoder.b_enc[l], transcoder.b_dec[l]):
                vector.copy_(torch.randn(vector.shape, generator=generator) - 0.3)
    return transcoder


def make_objective(activation: str, sparsity: str = "tanh", over_dead: bool = True) -> Objective:
    penalised = activation in ("relu", "jumprelu")
    aux_weight = 0.0 if penalised else 1 / 32
    return Objective(sparsity if penalised else None, 4.0, penalised, over_dead, aux_weight, 5)


def make_inputs(transcoder: Transcoder, dead_share: float = 0.3, **changes) -> StepInputs:
    generator = torch.Generator().manual_seed(2)
    dtype = transcoder.dtype
    dead = [torch.rand(n, generator=generator) < dead_share for n in transcoder.features]
    inputs = StepInputs([4.0, 2.5, 4.0], torch.tensor([0.1, 0.2, 0.3], dtype=dtype), 0.01, dead)
    return inputs._replace(target_l0=torch.tensor([2.0, 3.0, 4.0], dtype=dtype), **changes)


def make_batch(dtype, tokens: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, tokens, L, D, dtype=dtype, generator=generator)
    return x, y


def both(transcoder, batch, inputs, objective, **sparse_options):
    """(StepLoss, gradients) of the dense and of the sparse step."""
    outcomes = []
    x, y = batch
    for forward in (dense_pass, functools.partial(sparse_pass, **sparse_options)):
        transcoder.zero_grad()
        result = step_loss(transcoder, x, y, inputs, objective, forward=forward)
        result.loss.backward()
        names = [name for name, parameter in transcoder.named_parameters() if parameter.grad is not None]
        outcomes.append((result, {name: transcoder.get_parameter(name).grad.clone() for name in names}))
    return outcomes


def assert_equal(outcomes, dtype) -> None:
    (dense, dense_gradients), (sparse, sparse_gradients) = outcomes
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(sparse.loss, dense.loss, rtol=tolerance, atol=0)
    for name, term in dense.terms.items():
        torch.testing.assert_close(sparse.terms[name], term, rtol=tolerance, atol=tolerance * dense.loss.item())
    assert all(torch.equal(a, b) for a, b in zip(dense.fired, sparse.fired, strict=True))
    whole = float(torch.stack([g.norm() for g in dense_gradients.values()]).norm())
    for name, expected in dense_gradients.items():
        found = sparse_gradients.get(name, torch.zeros_like(expected))
        scale = max(float(expected.norm()), 1e-6 * whole)  # a gradient that cancels to nothing is held to the whole
        assert float((found - expected).norm()) <= tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reach", ["all", "1", "2"])
@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("relu", {}),
        ("jumprelu", {}),
        ("jumprelu", {"ste_reaches_h": False, "bandwidth": 0.3}),
        ("topk", {}),
        ("batchtopk", {}),
        ("batchtopk", {"k_scope": "all"}),
    ],
)
def test_loss_and_gradients_equal_the_dense_step(activation, options, reach, dtype, kernels):
    transcoder = make(activation, dtype, reach=reach, **options)
    outcomes = both(transcoder, make_batch(dtype), make_inputs(transcoder), make_objective(activation))
    assert_equal(outcomes, dtype)
    assert outcomes[0][0].l0.sum() > 0


@pytest.mark.parametrize("sparsity", ["tanh", "l1", "l0", "target"])
@pytest.mark.parametrize("over_dead", [True, False])
def test_every_penalty_equals_the_dense_one(sparsity, over_dead):
    transcoder = make("jumprelu", features=[FEATURES, 24, 33], skip=True)
    objective = make_objective("jumprelu", sparsity, over_dead)
    assert_equal(both(transcoder, make_batch(torch.float64), make_inputs(transcoder), objective), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize(
    "degenerate",
    ["silent", "all active", "duplicated tokens", "duplicated features", "one token", "no dead", "all dead"],
)
def test_degenerate_inputs(degenerate, activation, dtype, kernels):
    transcoder = make(activation, dtype)
    x, y = make_batch(dtype, tokens=1 if degenerate == "one token" else 12)
    dead_share = {"no dead": 0.0, "all dead": 1.0}.get(degenerate, 0.3)
    with torch.no_grad():
        if degenerate == "silent":
            for b in transcoder.b_enc:
                b.fill_(-100.0)
        if degenerate == "all active":
            for b in transcoder.b_enc:
                b.fill_(100.0)
        if degenerate == "duplicated features":
            for W, b in zip(transcoder.W_enc, transcoder.b_enc, strict=True):
                W[1::2], b[1::2] = W[::2].clone(), b[::2].clone()
    if degenerate == "duplicated tokens":
        x = x[:1].expand(12, L, D).contiguous()
    outcomes = both(transcoder, (x, y), make_inputs(transcoder, dead_share), make_objective(activation))
    assert_equal(outcomes, dtype)
    if degenerate == "silent":
        assert outcomes[1][0].l0.sum() == 0
    if degenerate == "all active" and activation in ("relu", "jumprelu"):
        assert (outcomes[1][0].l0 == FEATURES).all()


def test_a_dead_decoder_row_has_no_gradient_through_its_norm(kernels):
    transcoder = make("jumprelu")
    with torch.no_grad():
        transcoder.W_dec[0][:7] = 0
    outcomes = both(transcoder, make_batch(torch.float64), make_inputs(transcoder), make_objective("jumprelu"))
    assert all(torch.isfinite(g).all() for g in outcomes[1][1].values())
    assert_equal(outcomes, torch.float64)


def test_thresholds_and_norms_from_outside():
    transcoder, batch = make("batchtopk"), make_batch(torch.float64)
    thresholds = [torch.tensor(tau, dtype=torch.float64) for tau in (0.4, 0.9, 0.0)]
    inputs = make_inputs(transcoder, thresholds=thresholds)
    assert_equal(both(transcoder, batch, inputs, make_objective("batchtopk")), torch.float64)

    transcoder = make("jumprelu")
    norms = [transcoder.decoder_norms(l).detach().requires_grad_() for l in range(L)]
    inputs = make_inputs(transcoder, norms=norms)
    assert_equal(both(transcoder, batch, inputs, make_objective("jumprelu")), torch.float64)
    found = [n.grad.clone() for n in norms]  # type: ignore[union-attr]
    step_loss(transcoder, *batch, inputs, make_objective("jumprelu")).loss.backward()
    for n, twice in zip(norms, found, strict=True):  # dense and sparse have each added their share
        torch.testing.assert_close(n.grad, 1.5 * twice)


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """The lists of an accelerator, whose lengths are known beforehand, and no host read in sight; on the CPU."""
    monkeypatch.setenv("CROSSLACE_KERNELS", "torch")
    for module in ("active_set", "forward"):
        monkeypatch.setattr(f"crosslace.train.sparse.{module}.read_freely", lambda tensor: False)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("degenerate", ["none", "silent", "all active", "no dead", "all dead"])
def test_lists_of_fixed_length_give_the_same(activation, degenerate, as_on_an_accelerator):
    transcoder, batch = make(activation), make_batch(torch.float64)
    with torch.no_grad():
        for b_enc in transcoder.b_enc:
            b_enc.fill_({"silent": -100.0, "all active": 100.0}.get(degenerate, 0.1))
    inputs = make_inputs(transcoder, {"no dead": 0.0, "all dead": 1.0}.get(degenerate, 0.3))
    objective, workspace = make_objective(activation), Workspace()
    workspace.room = Room([1000] * L)
    assert_equal(both(transcoder, batch, inputs, objective, workspace=workspace), torch.float64)
    if activation in ("relu", "jumprelu"):
        assert all(len(layer.h) == 1000 for layer in sparse_pass(transcoder, batch[0], inputs, objective, SINGLE,
                                                                 workspace).layers)  # type: ignore[attr-defined]  # fmt: skip


def test_lists_that_are_too_short_grow_and_their_step_is_void(as_on_an_accelerator):
    transcoder, (x, y), workspace = make("jumprelu"), make_batch(torch.float64), Workspace()
    inputs, objective = make_inputs(transcoder), make_objective("jumprelu")
    workspace.room = Room([5] * L)
    forward = functools.partial(sparse_pass, workspace=workspace)
    losses = [float(step_loss(transcoder, x, y, inputs, objective, forward=forward).loss.detach()) for _ in range(4)]
    assert [loss != loss for loss in losses] == [True, True, True, False]
    exact = step_loss(transcoder, x, y, inputs, objective).loss
    assert losses[3] == pytest.approx(float(exact.detach()), rel=1e-12)

    fresh = Workspace()
    first = step_loss(transcoder, x, y, inputs, objective, forward=functools.partial(sparse_pass, workspace=fresh))
    assert float(first.loss.detach()) == pytest.approx(losses[3], rel=1e-12) and fresh.room.of(0) is not None


def test_gradient_memory_is_reused_and_gradients_accumulate(kernels):
    transcoder, workspace = make("jumprelu"), Workspace()
    inputs, objective = make_inputs(transcoder), make_objective("jumprelu")
    forward = functools.partial(sparse_pass, workspace=workspace)
    places, expected = set(), None
    for _ in range(3):
        transcoder.zero_grad()
        step_loss(transcoder, *make_batch(torch.float64), inputs, objective, forward=forward).loss.backward()
        places.add(transcoder.W_dec[0].grad.data_ptr())  # type: ignore[union-attr]
        expected = [parameter.grad.clone() for parameter in transcoder.parameters()]  # type: ignore[union-attr]
    assert len(places) == 1
    step_loss(transcoder, *make_batch(torch.float64), inputs, objective, forward=forward).loss.backward()
    for parameter, once in zip(transcoder.parameters(), expected or [], strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)


def test_two_passes_under_one_backward_do_not_share_memory():
    transcoder, objective = make("jumprelu"), make_objective("jumprelu")
    inputs, batch = make_inputs(transcoder), make_batch(torch.float64)
    expected = both(transcoder, batch, inputs, objective)[0][1]
    forward = functools.partial(sparse_pass, workspace=Workspace())
    transcoder.zero_grad()
    first, second = (step_loss(transcoder, *batch, inputs, objective, forward=forward).loss for _ in range(2))
    (first + second).backward()
    for name, parameter in transcoder.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name])


def test_acts_are_those_of_the_transcoder(kernels):
    for activation in ("relu", "jumprelu", "topk", "batchtopk"):
        transcoder, (x, _) = make(activation), make_batch(torch.float64)
        done = sparse_pass(transcoder, x, make_inputs(transcoder, k=[4.0] * L), make_objective(activation))
        for layer, expected in zip(done.layers, transcoder.encode(x), strict=True):
            torch.testing.assert_close(layer.dense(), expected)  # type: ignore[attr-defined]


def test_nothing_of_the_size_of_tokens_times_features_is_left_after_the_product():
    """Everything that autograd keeps for the backward pass, and every list, is far smaller than B x F."""
    transcoder = Transcoder(TranscoderSettings(features=2000, activation="batchtopk", k=2), D, L)
    x, y = make_batch(torch.float32, tokens=200)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.numel())
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in transcoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step_loss(
            transcoder, x, y, make_inputs(transcoder, k=[2.0] * L), make_objective("batchtopk"), forward=sparse_pass
        )
    assert max(kept) <= 2 * x.numel()
    result.loss.backward()


def test_the_switch():
    assert use_sparse("on", 1.0, "cpu") and not use_sparse("off", 0.0, "cpu")
    for device, limit in SPARSE_BELOW.items():
        assert use_sparse("auto", limit / 2, device) and not use_sparse("auto", limit * 2, device)


def test_x_with_gradient_is_refused():
    transcoder, (x, _) = make("topk"), make_batch(torch.float64)
    with pytest.raises(ValueError, match="dense"):
        sparse_pass(transcoder, x.requires_grad_(), make_inputs(transcoder), make_objective("topk"))


def test_autocast_keeps_the_lists_in_float32():
    transcoder, (x, y) = make("jumprelu", torch.float32), make_batch(torch.float32)
    inputs, objective = make_inputs(transcoder), make_objective("jumprelu")
    exact = step_loss(transcoder, x, y, inputs, objective, forward=sparse_pass).loss
    with torch.autocast("cpu", torch.bfloat16):
        done: Pass = sparse_pass(transcoder, x, inputs, objective)
        rounded = step_loss(transcoder, x, y, inputs, objective, forward=sparse_pass).loss
    assert done.y_hat.dtype == torch.float32 and all(layer.acts.dtype == torch.float32 for layer in done.layers)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)
