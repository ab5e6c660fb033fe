"""Schedules, normalisation, initialisation, calibration, warm starts, resampling."""

import pytest
import torch
from crosslace.data.errors import SettingsError, UserError
from crosslace.train.loss.objective import StepInputs, choose
from crosslace.train.loss.schedules import annealed_k, default_lr, learning_rate, ramp, scheduled_lr
from crosslace.train.loss.state import RunningState
from crosslace.train.parallel.collectives import SINGLE
from crosslace.train.run.calibration import calibrated_thresholds
from crosslace.train.run.optimizers import Optimizers
from crosslace.train.run.resampling import assign_tokens, resample
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.start.initialisation import initialise, quantile_bias
from crosslace.train.start.neurons import Neurons
from crosslace.train.start.warmstart import start_from, start_from_neurons
from crosslace.train.trainer import Trainer
from crosslace.train.transcoder.normalisation import Normalisation, normalisation_of
from crosslace.train.transcoder.transcoder import Transcoder

L, D = 3, 8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_learning_rate_rises_holds_and_falls_to_zero():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.2) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == rates[80] == 1.0
    assert rates[90] == pytest.approx(0.5) and rates[100] == 0.0
    assert learning_rate(90, 100, 1.0, 0.1, 0.2, "cosine") == pytest.approx(0.5)
    assert learning_rate(99, 100, 1.0, 0.1, 0.2, "constant") == 1.0
    with pytest.raises(SettingsError, match="lr_schedule"):
        TrainerSettings(lr_schedule="square")


def test_ramps():
    assert ramp(99, 100, 2.0) == 2.0 and ramp(49, 100, 2.0) == 1.0 and ramp(0, 100, 2.0, share=0.0) == 2.0
    assert ramp(10, 100, 2.0, share=0.0) == 2.0
    assert annealed_k(0, 100, 10, 50.0, 0.5) == 50 and annealed_k(25, 100, 10, 50.0, 0.5) == 30
    assert annealed_k(50, 100, 10, 50.0, 0.5) == 10 == annealed_k(0, 100, 10, 50.0, 0.0)
    assert default_lr(2**14) == 2e-4


def test_rate_and_patience_go_by_the_length_of_the_training():
    def rate(**given):
        return scheduled_lr(TrainerSettings(lr_warmup=0.0, **given), 2**14, step=0) / 2e-4

    assert rate(steps=100) == rate(steps=4000) == pytest.approx(6.0)
    assert rate(steps=8000) == pytest.approx(3.0) and rate(steps=24_000) == rate(steps=10**6) == pytest.approx(1.0)
    assert rate(steps=100, lr_scale=2.0) == pytest.approx(2.0) and rate(steps=9, lr=1.0) == pytest.approx(5000)
    assert rate(steps=100, lr_schedule="constant") == pytest.approx(1.0)  # it may get more steps later

    def patience(**given):
        return TrainerSettings(batch=1000, **given).tokens_to_die()

    assert (patience(steps=10), patience(steps=1000), patience(steps=10**6)) == (10_000, 50_000, 10**6)
    assert patience(steps=10, dead_after=77) == 77 and patience(steps=10, lr_schedule="constant") == 10**6


def test_k_falls_where_a_training_begins_with_neurons(planted, tmp_path):
    def share(finished=False, neurons=False, **given):
        return TrainerSettings(**given).begun_with(finished, neurons).k_share

    assert (share(neurons=True), share(), share(k_first=40)) == (0.35, 0.0, 0.35)
    assert share(k_share=0.2) == share(neurons=True, k_share=0.2) == 0.2 and share(neurons=True, k_share=0.0) == 0.0
    assert share(finished=True) == share(finished=True, k_share=0.2) == 0.0
    assert share(finished=True, k_first=40, k_share=0.2) == 0.2
    for begin, expected in (({}, 0.0), ({"neurons": iter(())}, 0.35)):
        rows = planted.train, planted.held_out
        trainer = Trainer(TrainerSettings(batch=64), TranscoderSettings(features=32, k=4), *rows, tmp_path, **begin)
        assert trainer.parts.settings.k_share == expected


def test_normalised_rows_have_square_d(planted):
    store = planted.train
    norm = normalisation_of(store.statistics, "resid", [0, 1], store.d_model)
    batch = store.batch(0, 0, len(store))
    for values in (norm.x(batch.x), norm.y(batch.y)):
        assert torch.allclose(values.square().sum(-1).mean(0), torch.full((2,), float(store.d_model)), rtol=1e-4)
    assert torch.allclose(norm.y_mean, norm.y(batch.y).mean(0), atol=1e-4)
    one = normalisation_of(store.statistics, "resid", [1], store.d_model)
    assert torch.equal(one.in_scale, norm.in_scale[1:])


def test_a_layer_of_zeros_is_refused(planted):
    statistics = planted.train.statistics
    broken = statistics._replace(mean_square={site: v * 0 for site, v in statistics.mean_square.items()})
    with pytest.raises(UserError, match="all zero"):
        normalisation_of(broken, "resid", [0], 16)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("features", [16, 300])
def test_features_start_at_the_chosen_rate(activation, features):
    transcoder = Transcoder(TranscoderSettings(features=features, activation=activation), D, L)
    x, mean = normal(4096, L, D), normal(L, D, seed=1)
    initialise(transcoder, x, mean, [0.02, 0.05, 0.2], "zero")
    for l, rate in enumerate([0.02, 0.05, 0.2]):
        fires = (transcoder.preactivation(x[:, l], l) > transcoder.theta(l)).float().mean(0)
        assert torch.allclose(fires, torch.full_like(fires, rate), atol=1e-3)
        assert torch.equal(transcoder.b_dec[l], mean[l]) and not transcoder.W_dec[l].any()
    assert torch.allclose(quantile_bias(normal(100, 2), torch.zeros(2), 1.0), -normal(100, 2).min(0).values)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize(("scope", "bias"), [("layer", 0.0), ("layer", -1.0), ("all", 0.0)])
def test_calibrated_thresholds_give_the_target(activation, scope, bias):
    settings = TranscoderSettings(features=50, activation=activation, k=5, k_scope=scope, theta_init=0.1)
    transcoder = Transcoder(settings, D, L)
    x, targets = normal(1000, L, D), [3.0, 5.0, 7.5]
    if activation in ("relu", "jumprelu"):  # with a low bias, too few are above zero: the others must be let in
        with torch.no_grad():
            for b_enc in transcoder.b_enc:
                b_enc.fill_(bias)
        assert bias == 0 or all((h > 0).sum(1).float().mean() < 2 for h in transcoder.preactivations(x))
    thresholds = calibrated_thresholds(transcoder, x.split(130), 1000, targets)
    acts = transcoder.activate(transcoder.preactivations(x), thresholds)
    l0 = [float((a > 0).sum()) / 1000 for a in acts]
    if activation == "batchtopk" and scope == "all":
        assert sum(l0) == pytest.approx(sum(targets), rel=1e-3)
    else:
        assert l0 == pytest.approx(targets, rel=1e-3)
    ones = torch.ones(L)
    exported = transcoder.folded(ones, ones, thresholds).encode(x)
    assert [float((a > 0).sum()) / 1000 for a in exported] == pytest.approx(l0, rel=2e-3)


def test_an_entry_at_a_small_threshold_is_not_lost_to_rounding():
    """Rows come several times in real text: with the entry at the threshold all its twins would go."""
    x, targets, ones = normal(40, L, D).repeat(10, 1, 1), [3.0, 5.0, 7.5], torch.ones(L)
    relu = Transcoder(TranscoderSettings(features=50, activation="relu"), D, L)
    for small in (0.0, 1e-5, 1e-4, 1e-3):
        thresholds = calibrated_thresholds(relu, [x], 400, targets)
        with torch.no_grad():
            for b_enc, tau in zip(relu.b_enc, thresholds, strict=True):
                b_enc.sub_(tau - small)
        thresholds = calibrated_thresholds(relu, [x], 400, targets)
        for scale in (1.0, 0.37, 23.0):
            exported = relu.folded(ones * scale, ones, thresholds).encode(x / scale)
            assert [float((a > 0).sum()) / 400 for a in exported] == pytest.approx(targets, abs=1e-9)


NORM = Normalisation(torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0.1, 4.0, 1.5]), torch.zeros(L, D))


def finished(reach: str, skip: bool = False) -> Transcoder:
    """A finished transcoder: raw activations."""
    transcoder = Transcoder(
        TranscoderSettings(features=20, reach=reach, activation="jumprelu", skip=skip), D, L, seed=5
    )
    return transcoder.folded(*NORM[:2])


@pytest.mark.parametrize("reach", ["1", "2"])
@pytest.mark.parametrize("features", [20, 32])
@pytest.mark.parametrize("skip", [False, True])
def test_embedded_in_a_clt_it_is_exact_at_step_0(reach, features, skip):
    source, x = finished(reach, skip), normal(40, L, D)
    settings = TranscoderSettings(features=features, reach="all", activation="jumprelu", skip=True)
    clt = Transcoder(settings, D, L, seed=9)
    start_from(clt, source, NORM)
    y = clt(x * NORM.in_scale[:, None]) / NORM.out_scale[:, None]
    assert torch.allclose(y, source(x), atol=1e-5)


def test_another_activation_keeps_what_is_read_and_written():
    source, x = finished("1"), normal(40, L, D)
    batchtopk = Transcoder(TranscoderSettings(features=24, reach="all", skip=True), D, L, seed=9)
    start_from(batchtopk, source, NORM)
    scaled, fresh = x * NORM.in_scale[:, None], torch.full((4,), 1e9)
    thresholds = [torch.cat([source.theta(l), fresh]) for l in range(L)]
    y = batchtopk.decode(batchtopk.encode(scaled, thresholds=thresholds), scaled) / NORM.out_scale[:, None]
    assert torch.allclose(y, source(x), atol=1e-5)


def test_warm_starts_that_cannot_be_are_refused():
    source = finished("1")
    for settings, message in (
        (TranscoderSettings(features=8), "fewer"),
        (TranscoderSettings(features=32, read="mlp_in"), "reads"),
    ):
        with pytest.raises(UserError, match=message):
            start_from(Transcoder(settings, D, L), source, NORM)
    with pytest.raises(UserError, match=r"transcoder\.skip=true"):
        start_from(Transcoder(TranscoderSettings(features=32), D, L), finished("1", skip=True), NORM)
    with pytest.raises(UserError, match="wide"):
        start_from(Transcoder(TranscoderSettings(features=32), D + 1, L), source, NORM)
    with pytest.raises(UserError, match="layer 7"):
        start_from(Transcoder(TranscoderSettings(features=32), D, [7]), source, NORM)


def test_a_steered_penalty_falls_faster_than_it_rises_and_gains_speed():
    transcoder = Transcoder(TranscoderSettings(features=30, activation="relu"), D, L)
    settings = TrainerSettings(target_l0=4.0)
    moved = {}
    for name, l0 in (("above", 8.0), ("below", 2.0)):
        state = RunningState(transcoder, settings)
        state.l0.fill_(l0)
        start = state.log_lam.clone()
        steps = []
        for _ in range(50):
            before = state.log_lam.clone()
            state.steer(torch.full((L,), 4.0), settling=1.0)
            steps.append(state.log_lam - before)
        moved[name] = state.log_lam - start
        assert (steps[-1].abs() > 2 * steps[0].abs()).all()
        state.l0.fill_(16 / l0)  # on the other side of the target, it goes carefully again
        before = state.log_lam.clone()
        state.steer(torch.full((L,), 4.0), settling=1.0)
        assert ((state.log_lam - before).sign() == -steps[0].sign()).all()
        assert (state.boost < 1.2).all()
    assert (moved["above"] > 0).all() and (moved["below"] < -2 * moved["above"]).all()


def test_an_mlps_own_neurons_are_an_exact_start():
    neurons = [
        Neurons(normal(12, D, seed=l), normal(12, seed=l + 9), normal(12, D, seed=l + 20), normal(D), torch.ones(12))
        for l in range(L)
    ]
    transcoder = Transcoder(TranscoderSettings(features=12, activation="relu", reach="all"), D, L)
    start_from_neurons(transcoder, neurons, NORM)
    x = normal(30, L, D, seed=3)
    want = torch.stack(
        [(x[:, l] @ mlp.W_in.T + mlp.b_in).relu() @ mlp.W_out + mlp.b_out for l, mlp in enumerate(neurons)], dim=1
    )
    y = transcoder(x * NORM.in_scale[:, None]) / NORM.out_scale[:, None]
    assert torch.allclose(y, want, atol=1e-4)


def resampled(activation: str, **options) -> tuple[Transcoder, Optimizers, RunningState, StepInputs]:
    """Features 0 to 4 of layer 1 were dead and have been started again."""
    settings = TrainerSettings(dead_after=1000, batch=64)
    transcoder = Transcoder(TranscoderSettings(features=30, activation=activation, k=3, **options), D, L)
    optimizers, state = Optimizers(transcoder, settings), RunningState(transcoder, settings)
    with torch.no_grad():
        transcoder.b_enc[1][:5] = -50.0
    for name, moments in optimizers.tensors().items():
        moments.fill_(1.0 if name.startswith("exp_avg/") else 4.0)
        if moments.dim():
            moments[:5] = 1e-6
    dead = [torch.zeros(30, dtype=torch.bool) for _ in range(L)]
    dead[1][:5] = True
    inputs = StepInputs([3.0] * L, torch.zeros(L), 0.0, dead)
    x, y = normal(64, L, D), normal(64, L, D, seed=1)
    broken = x.clone()
    broken[7, 0, 0] = torch.nan
    resample(transcoder, optimizers, state, inputs, broken, y, seed=0, comm=SINGLE)
    assert (transcoder.b_enc[1][:5] == -50.0).all()  # nothing is pointed at what is no number
    resample(transcoder, optimizers, state, inputs, x, y, seed=0, comm=SINGLE)
    return transcoder, optimizers, state, inputs


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("batchtopk", {}),
        ("batchtopk", {"k_scope": "all"}),
        ("topk", {}),
        ("jumprelu", {"theta_init": 0.5}),
        ("relu", {}),
    ],
)
def test_resampled_features_fire_again_and_start_fresh(activation, options):
    before = Transcoder(TranscoderSettings(features=30, activation=activation, k=3, **options), D, L)
    transcoder, optimizers, state, inputs = resampled(activation, **options)
    h = transcoder.preactivations(normal(64, L, D))
    fired = (transcoder.activate(h, choose(transcoder, h, inputs.k, SINGLE))[1] > 0)[:, :5]
    assert fired.any(0).all() and fired.sum() < 0.3 * fired.numel()
    assert len(torch.unique(transcoder.W_enc[1][:5], dim=0)) == 5
    assert (state.silent[1][:5] == 0).all()
    moments = optimizers.tensors()
    for name in ("W_enc.1", "b_enc.1", "W_dec.1"):
        assert not moments[f"exp_avg/{name}"][:5].any() and moments[f"exp_avg/{name}"][5:].all()
        second = moments[f"exp_avg_sq/{name}"]
        assert torch.allclose(second[:5], torch.tensor(0.03 * 4.0)) and (second[5:] == 4.0).all()
    for name, parameter in before.named_parameters():
        kept = slice(5, None) if name.endswith(".1") and "b_dec" not in name else slice(None)
        assert torch.equal(transcoder.get_parameter(name)[kept], parameter[kept])


def test_dead_features_get_tokens_of_their_own_and_the_worst_ones_first():
    error, dead = torch.full((20,), 1e-6), torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.4
    error[[3, 11, 17]] = 1.0
    tokens = assign_tokens(normal(20, D), error, dead, seed=7)[dead]
    assert set(tokens[:3].tolist()) == {3, 11, 17}
    assert tokens[:20].unique().numel() == min(20, len(tokens))
    assert tokens.max() < 20


def test_tokens_that_are_alike_are_dealt_once():
    x, error, dead = normal(20, D), torch.ones(20), torch.ones(8, dtype=torch.bool)
    x[5:15] = x[5]
    for seed in range(20):
        tokens = assign_tokens(x, error, dead, seed)
        assert torch.unique(x[tokens], dim=0).shape[0] == 8
