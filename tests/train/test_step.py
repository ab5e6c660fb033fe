"""One step: pieces equal the whole, the sparse pass equals the dense one, bad values change nothing."""

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from crosslace.train.loss.objective import StepLoss, dense_pass
from crosslace.train.loss.state import Counters, RunningState
from crosslace.train.parallel.collectives import SINGLE
from crosslace.train.run.optimizers import Optimizers
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.sparse.forward import sparse_pass, use_sparse
from crosslace.train.sparse.row_gradients import RowGradient, form
from crosslace.train.sparse.workspace import Workspace
from crosslace.train.step import StepParts, measured_break_even, objective_of, step_inputs, train_step
from crosslace.train.transcoder.transcoder import Transcoder

from .host_reads import Reads

L, D, F, B = 3, 8, 40, 24


def make_parts(
    activation: str, trainer: dict[str, Any], forward=dense_pass, dtype=torch.float64, **options
) -> StepParts:
    settings = TrainerSettings(**({"steps": 10, "batch": B, "lr": 1e-2, "dead_after": 30, "lr_warmup": 0.0} | trainer))
    shape = {"features": F, "k": 4, "activation": activation, "theta_init": 0.2} | options
    transcoder = Transcoder(TranscoderSettings(**shape), D, L, dtype=dtype)
    targets = settings.per_layer("target_l0", L)
    parts = StepParts(
        settings=settings,
        objective=objective_of(settings, transcoder),
        transcoder=transcoder,
        optimizers=Optimizers(transcoder, settings),
        state=RunningState(transcoder, settings),
        counters=Counters(use_aux=True, use_sparse=forward is sparse_pass),
        target_l0=None if targets is None else torch.tensor(targets),
        targets=targets,
        comm=SINGLE,
        workspace=Workspace(),
    )
    with torch.no_grad():
        for l in range(L):  # some features are dead from the start
            transcoder.b_enc[l][:6] = -0.4
    return parts


def data(step: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, L, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x.flip(2) * 0.5 + 0.3).to(dtype)


def weights(parts: StepParts) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parts.transcoder.named_parameters()}


KINDS = [
    ("relu", {"sparsity": "tanh", "lam": 0.1, "lam_preactivation": 0.01}, {}),
    ("jumprelu", {"sparsity": "tanh", "lam": 0.1, "lam_preactivation": 0.01, "preactivation_over": "all"}, {}),
    (
        "jumprelu",
        {"sparsity": "target", "target_l0": 3.0, "lam": 0.5, "lam_preactivation": 0.01},
        {"ste_reaches_h": False},
    ),
    ("jumprelu", {"sparsity": "l1", "lam": 0.1, "target_l0": 3.0}, {"reach": "1"}),
    ("topk", {"target_l0": 3.0}, {"skip": True}),
    ("batchtopk", {"target_l0_per_layer": [2.0, 3.0, 5.0]}, {}),
    ("batchtopk", {}, {"k_scope": "all", "reach": "2"}),
]


def ids(kinds):
    return [f"{activation}-{i}" for i, (activation, _, _) in enumerate(kinds)]


@pytest.mark.parametrize("forward", [dense_pass, sparse_pass])
@pytest.mark.parametrize(("activation", "trainer", "options"), KINDS, ids=ids(KINDS))
def test_accumulation_equals_the_large_batch(activation, trainer, options, forward):
    whole = make_parts(activation, trainer, forward, **options)
    pieces = make_parts(activation, trainer | {"accumulate": 4}, forward, **options)
    start = weights(whole)
    for step in range(4):
        for parts in (whole, pieces):
            train_step(parts, *data(step))
    for name, weight in weights(whole).items():
        assert torch.allclose(weight, pieces.transcoder.get_parameter(name), atol=1e-9), name
    assert any(not torch.equal(weight, start[name]) for name, weight in weights(whole).items())
    for a, b in zip(whole.state.tensors().values(), pieces.state.tensors().values()):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_accumulation_in_float32_is_equal_to_1e_6(activation):
    runs = [make_parts(activation, {"accumulate": n, "optimizer": "adam"}, dtype=torch.float32) for n in (1, 3)]
    for parts in runs:
        x, y = data(dtype=torch.float32)
        parts.optimizers.step = lambda divisor, bad, rows=None: None  # the gradients are what is compared
        train_step(parts, x, y)
    for name, parameter in runs[0].transcoder.named_parameters():
        other = runs[1].transcoder.get_parameter(name).grad
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, other, atol=1e-6 * max(1.0, float(parameter.grad.abs().max()))), name


@pytest.mark.parametrize(("activation", "trainer", "options"), KINDS, ids=ids(KINDS))
def test_sparse_and_dense_steps_train_alike(activation, trainer, options):
    dense = make_parts(activation, trainer, dense_pass, **options)
    sparse = make_parts(activation, trainer, sparse_pass, **options)
    for step in range(4):
        train_step(dense, *data(step))
        train_step(sparse, *data(step))
    for name, weight in weights(dense).items():
        assert torch.allclose(weight, sparse.transcoder.get_parameter(name), atol=1e-9), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_batch_changes_no_weight_and_is_counted(optimizer, poison):
    parts = make_parts("batchtopk", {"optimizer": optimizer}, dtype=torch.float32)
    train_step(parts, *data(0, torch.float32))
    before, density = weights(parts), copy.deepcopy(parts.state.density)
    moments = {name: tensor.clone() for name, tensor in parts.optimizers.tensors().items()}
    x, y = data(1, torch.float32)
    y[0, 0, 0] = poison
    for _ in range(2):
        train_step(parts, x, y)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(parts).items())
    assert all(torch.equal(moments[name], tensor) for name, tensor in parts.optimizers.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(density, parts.state.density))
    assert parts.state.bad_in_row == 2 and parts.state.bad_total == 2
    train_step(parts, *data(2, torch.float32))
    assert parts.state.bad_in_row == 0 and parts.state.bad_total == 2


def test_clipping_is_by_the_global_norm():
    loose, tight = (make_parts("relu", {"clip": clip, "optimizer": "adam"}) for clip in (0.0, 1e-3))
    seen = []
    for parts in (loose, tight):
        parts.optimizers.step = lambda divisor, bad, rows=None: seen.append(float(divisor))
        train_step(parts, *data())
    norm = torch.stack([p.grad.norm() for p in tight.transcoder.parameters() if p.grad is not None]).norm()
    layers = [[] for _ in range(tight.transcoder.n_layers)]
    for name, p in tight.transcoder.named_parameters():
        layers[int(name[-1])] += [] if p.grad is None else [p.grad.norm()]
    known = [norm, *(torch.stack(norms).norm() for norms in layers)]
    torch.testing.assert_close(tight.state.sums["grad_norms"], torch.stack(known).to(torch.float32))
    assert seen[0] == 1.0 and seen[1] == pytest.approx(float(norm) / 1e-3, rel=1e-9)


def test_the_divisor_reaches_every_optimizer():
    for optimizer in ("adam", "muon"):
        plain, divided = (make_parts("relu", {"optimizer": optimizer}) for _ in range(2))
        for parts, factor in ((plain, 1.0), (divided, 8.0)):
            for parameter in parts.transcoder.parameters():
                parameter.grad = torch.ones_like(parameter) * factor
            parts.optimizers.set_lr(1e-2)
            parts.optimizers.step(torch.tensor(factor, dtype=torch.float64), torch.tensor(0.0))
        for name, weight in weights(plain).items():
            assert torch.allclose(weight, divided.transcoder.get_parameter(name), atol=1e-12), name


def test_decoder_norms_get_gradient_through_the_penalty():
    parts = make_parts("relu", {"sparsity": "tanh", "lam": 1.0, "lam_share": 0.0, "lam_preactivation": 0.0})
    x, _ = data()
    y = parts.transcoder(x).detach()
    parts.optimizers.step = lambda divisor, bad, rows=None: None
    train_step(parts, x, y)  # no error: all gradient comes from the penalty
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in parts.transcoder.W_dec)


def test_auxiliary_loss_gives_dead_features_a_gradient():
    gradients = []
    for use_aux in (True, False):
        parts = make_parts("batchtopk", {"aux_weight": 1.0})
        parts.counters.step, parts.counters.use_aux = 9, use_aux
        for silent in parts.state.silent:
            silent[:6] = 100
        parts.optimizers.step = lambda divisor, bad, rows=None: None
        train_step(parts, *data())
        gradients.append([weight.grad.clone() for weight in parts.transcoder.W_dec])
    for with_aux, without in zip(*gradients):
        assert not torch.allclose(with_aux[:6], without[:6])
        assert torch.allclose(with_aux[6:], without[6:])


def test_bf16_autocast_keeps_float32_masters():
    parts = make_parts("jumprelu", {"precision": "bf16", "target_l0": 3.0}, dtype=torch.float32)
    reference = make_parts("jumprelu", {"target_l0": 3.0}, dtype=torch.float32)
    for step in range(3):
        train_step(parts, *data(step, torch.float32))
        train_step(reference, *data(step, torch.float32))
    assert all(p.dtype == torch.float32 for p in parts.transcoder.parameters())
    for key in ("reconstruction", "l0"):
        assert torch.allclose(parts.state.sums[key], reference.state.sums[key], rtol=0.05)


def test_fp16_scales_the_loss_and_gives_way_to_overflow():
    parts = make_parts("relu", {"precision": "fp16"}, dtype=torch.float32)
    scale = float(parts.state.loss_scale)
    train_step(parts, *data(0, torch.float32))
    assert parts.state.loss_scale == scale and parts.state.bad_total == 0
    before = weights(parts)
    x, y = data(1, torch.float32)
    train_step(parts, x, y * 1e30)
    assert parts.state.loss_scale == scale / 2 and parts.state.bad_in_row == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(parts).items())


@pytest.mark.parametrize(("activation", "trainer", "options"), KINDS, ids=ids(KINDS))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_an_accelerator_reads_nothing_back(activation, trainer, options, accumulate, monkeypatch):
    """With the branches that an accelerator takes, and plain operations in place of its kernels."""
    monkeypatch.setenv("CROSSLACE_KERNELS", "torch")
    for module in ("active_set", "forward"):
        monkeypatch.setattr(f"crosslace.train.sparse.{module}.read_freely", lambda tensor: False)
    monkeypatch.setattr("crosslace.train.sparse.row_gradients.chunks", whole_chunk)
    forward = functools.partial(sparse_pass, workspace=Workspace())
    parts = make_parts(activation, {**trainer, "accumulate": accumulate}, forward, **options)
    reference = make_parts(activation, {**trainer, "accumulate": accumulate}, dense_pass, **options)
    for step in range(3):
        with Reads() as reads:
            train_step(parts, *data(step))
        train_step(reference, *data(step))
        assert step == 0 or reads.seen == []
    for name, weight in weights(reference).items():
        assert torch.allclose(weight, parts.transcoder.get_parameter(name), atol=1e-9), name


def test_which_step_is_faster_is_measured():
    """A clock by which the sparse step takes 3 seconds and the dense one 6: equal at twice the list."""
    parts = make_parts("batchtopk", {})
    ticks = iter([0, 99, 0, 3, 0, 99, 0, 6])
    listed = sum(step_inputs(parts).k) / (L * F)
    found = measured_break_even(parts, *data(0), clock=lambda: next(ticks))
    assert found == pytest.approx(2 * listed) and all(p.grad is None for p in parts.transcoder.parameters())
    assert use_sparse("auto", listed, "cuda", found) and not use_sparse("auto", 3 * listed, "cuda", found)


def whole_chunk(rows: RowGradient):
    """The kernels of an accelerator find the ends of the lists by themselves."""
    yield slice(0, len(rows.weight)), form(rows, torch.empty_like(rows.weight))


def test_settings_say_what_is_wrong():
    from crosslace.data.errors import SettingsError

    wrong = [
        ({"steps": 0}, "trainer.steps"),
        ({"lr": -1.0}, "trainer.lr"),
        ({"optimizer": "sgd"}, "trainer.optimizer"),
        ({"accumulate": 3, "batch": 16}, "trainer.batch"),
        ({"sparsity": "target"}, "trainer.target_l0"),
        ({"lr_warmup": 0.9, "lr_decay": 0.9}, "trainer.lr_warmup"),
        ({"precision": "int8"}, "trainer.precision"),
        ({"betas": [0.9]}, "trainer.betas"),
        ({"betas": [0.9, 1.0]}, "trainer.betas"),
        ({"lr": math.nan}, "trainer.lr=nan is not a finite number"),
        ({"lr_warmup": math.nan}, "trainer.lr_warmup"),
        ({"lr_scale": 0.0}, "trainer.lr_scale"),
        ({"tanh_c": -4.0}, "trainer.tanh_c"),
        ({"weight_decay": -1.0, "optimizer": "adamw"}, "trainer.weight_decay"),
        ({"weight_decay": 0.1}, "weight_decay is for adamw"),
        ({"target_l0": math.inf}, "trainer.target_l0"),
        ({"target_l0_per_layer": [4.0, 0.0]}, "trainer.target_l0_per_layer=0.0"),
        ({"lam_per_layer": [1.0, -1.0]}, "trainer.lam_per_layer"),
        ({"aux_k": 0}, "trainer.aux_k"),
        ({"init_firing_rate": 1.5}, "trainer.init_firing_rate"),
        ({"seed": 2**64}, "trainer.seed"),
    ]
    for setting, message in wrong:
        with pytest.raises(SettingsError, match=message):
            TrainerSettings(**setting)
    with pytest.raises(SettingsError, match="target_l0_per_layer"):
        replace(TrainerSettings(), target_l0_per_layer=[1.0]).per_layer("target_l0", 2)


def test_decay_acts_on_matrices_alone():
    """Decay of log theta would move every threshold towards one, of a bias towards zero."""
    parts = make_parts("jumprelu", {"optimizer": "adamw", "weight_decay": 0.1, "lr": 1e-2}, skip=True)
    before = weights(parts)
    for parameter in parts.transcoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(20):
        parts.optimizers.set_lr(1e-2)
        parts.optimizers.step(torch.ones(()), torch.zeros(()))
    for name, weight in weights(parts).items():
        shrunk = before[name] * (1 - 1e-3) ** 20
        assert torch.allclose(weight, shrunk if name.startswith("W_") else before[name], rtol=1e-6, atol=0), name


def test_a_feature_is_dead_after_so_many_tokens_and_not_before():
    parts = make_parts("batchtopk", {"dead_after": 10 * B})
    state, silent, fired = parts.state, torch.zeros(F), torch.ones(F)

    def update(counts: torch.Tensor, bad: float = 0.0) -> None:
        zero, rows = torch.zeros(L), torch.zeros(B, L)
        seen = StepLoss(torch.zeros(()), {"reconstruction": zero}, [counts] * L, zero, zero, rows, rows, zero)
        state.update(seen, B, torch.zeros(1 + L), torch.tensor(bad), zero, SINGLE)

    for step in range(1, 10):
        update(silent)
        assert not any(dead.any() for dead in state.dead(step))
    update(silent, bad=1.0)  # a step that is left out counts for nothing
    assert not state.dead(10)[0].any()
    update(silent)
    assert all(dead.all() for dead in state.dead(11))
    update(fired)  # once in a long while is enough
    assert not state.dead(12)[0].any()


def test_layers_add_up_in_float32():
    """Of many layers, in bfloat16, the last one's sum is as exact as its parts."""
    transcoder = Transcoder(TranscoderSettings(features=64, activation="relu"), 32, 16)
    acts = [torch.rand(8, 64) for _ in range(16)]
    exact = transcoder.double().decode_features([a.double() for a in acts])[-1]
    transcoder.float()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [transcoder.decode_from(l, a)[:, 15 - l] for l, a in enumerate(acts)]
        total = transcoder.decode_features(acts)[-1]
    one_by_one = functools.reduce(torch.add, parts)
    assert total.dtype == torch.float32 and one_by_one.dtype == torch.bfloat16
    assert (total - exact).norm() < 0.7 * (one_by_one - exact).norm()
