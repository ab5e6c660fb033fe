"""An MLP's own neurons as features: right for every family, exact where they can be."""

import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.store.store import in_memory_store
from crosslace.train.settings import TranscoderSettings
from crosslace.train.start.neurons import model_neurons, neurons_of
from crosslace.train.start.warmstart import start_from_neurons
from crosslace.train.transcoder.normalisation import normalisation_of
from crosslace.train.transcoder.transcoder import Transcoder

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
# norms of some families compute in float32 whatever the dtype
CLOSE = 1e-6


def rows_of(lm, seed: int = 1, sequences: int = 4) -> dict[str, torch.Tensor]:
    """What passes by on random tokens: site -> [N, L, D]."""
    tokens = torch.randint(0, lm.d_vocab, (sequences, 9), generator=torch.Generator().manual_seed(seed))
    with lm.capture(("resid", "mlp_in", "mlp_out")) as sites:
        lm(tokens)
    return {site: sites.stacked(site).flatten(0, 1) for site in ("resid", "mlp_in", "mlp_out")}


def store_of(lm, read: str):
    rows = {site: x.float() for site, x in rows_of(lm, sequences=60).items()}
    attributes = {"model": {"name": lm.name, "fingerprint": lm.fingerprint}}
    return in_memory_store(rows[read], rows["mlp_out"], attributes=attributes, read=read)


def test_the_parts_of_an_mlp_are_the_mlp(tiny):
    for parts in tiny.layers:
        mlp = parts.mlp_weights
        if mlp is None:
            assert tiny.family in EXPERTS
            continue
        z = torch.randn(5, tiny.d_model, dtype=tiny.dtype)
        maps = [affine for affine in (mlp.gate, mlp.up) if affine is not None]
        n = mlp.neurons(*(torch.nn.functional.linear(z, *affine) for affine in maps))
        torch.testing.assert_close(torch.nn.functional.linear(n, *mlp.down), parts.mlp(z))


@pytest.mark.parametrize("read", ["resid", "mlp_in"])
def test_on_its_own_row_each_tangent_touches(tiny, read):
    """Measured on one row alone, the features give the model's output there, and its slope with norms frozen."""
    if tiny.family in EXPERTS:
        return
    rows = rows_of(tiny)
    for l, parts in enumerate(tiny.layers):
        x, y = rows[read][3, l], rows["mlp_out"][3, l]
        neurons = neurons_of(parts, read, x[None])
        acts = neurons.W_in @ x + neurons.b_in
        torch.testing.assert_close(acts.relu() @ neurons.W_out + neurons.b_out, y, atol=CLOSE, rtol=CLOSE)

        norm = parts.mlp_norm if read == "resid" else None
        z = x if norm is None else norm.module(x)
        den, post = parts.mlp(z[None]), parts.post_mlp_norm

        def frozen(v, norm=norm, parts=parts, post=post, x=x, den=den):
            z = v if norm is None else norm.frozen(v, norm.denominator(x))
            out = parts.mlp(z[None])
            return (out if post is None else post.frozen(out, post.denominator(den)))[0]

        slope = torch.autograd.functional.jacobian(frozen, x)
        active = (acts > 0).to(x.dtype)
        torch.testing.assert_close(neurons.W_out.T * active @ neurons.W_in, slope, atol=CLOSE, rtol=CLOSE)


RELU = {"gpt2": {"activation_function": "relu"}, "gpt_neox": {"hidden_act": "relu"}, "phi": {"hidden_act": "relu"}}


@pytest.mark.parametrize("family", RELU)
def test_a_relu_mlp_is_reproduced(make_tiny, family):
    lm = make_tiny(family, torch.float64, **RELU[family])
    store = store_of(lm, "mlp_in")
    norm = normalisation_of(store.statistics, "mlp_in", store.layers, lm.d_model)
    settings = TranscoderSettings(features=24, activation="relu", read="mlp_in", reach="all")
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, dtype=torch.float64)
    start_from_neurons(transcoder, model_neurons(lm, store, None, "mlp_in"), norm)
    fresh = rows_of(lm, seed=2)  # rows that it was not measured on
    y = transcoder(fresh["mlp_in"] * norm.in_scale[:, None]) / norm.out_scale[:, None]
    torch.testing.assert_close(y, fresh["mlp_out"], atol=1e-6, rtol=1e-6)


def test_too_few_features_take_the_strongest_and_too_many_keep_fresh_ones(make_tiny):
    lm = make_tiny("gpt2", torch.float64, **RELU["gpt2"])
    store = store_of(lm, "mlp_in")
    norm = normalisation_of(store.statistics, "mlp_in", store.layers, lm.d_model)
    neurons = list(model_neurons(lm, store, None, "mlp_in"))
    batch = store.batch(0, 0, len(store))
    x, y = batch.sites["mlp_in"] * norm.in_scale[:, None], batch.mlp_out * norm.out_scale[:, None]

    @torch.no_grad()
    def error(features: int, neurons) -> float:
        shape = TranscoderSettings(features=features, activation="relu", read="mlp_in", reach="1")
        transcoder = Transcoder(shape, lm.d_model, lm.n_layers)
        before = [W.detach().clone() for W in transcoder.W_enc]
        start_from_neurons(transcoder, neurons, norm)
        if features > 48:
            assert all(torch.equal(W[48:], old[48:]) for W, old in zip(transcoder.W_enc, before))
            assert not any(W[48:].any() for W in transcoder.W_dec)
        return float((transcoder(x) - y).square().mean())

    errors = [error(n, neurons) for n in (4, 12, 24, 60)]
    assert errors[0] > errors[1] > errors[2] and max(errors[2:]) < 1e-6
    assert error(12, [n._replace(strength=1 / n.strength.clamp_min(1e-9)) for n in neurons]) > errors[1]


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts_are_refused(make_tiny, family):
    lm = make_tiny(family, torch.float64)
    with pytest.raises(UserError, match="mixtures of experts"):
        model_neurons(lm, store_of(lm, "mlp_in"), None, "mlp_in")


def test_neurons_of_another_model_are_refused(make_tiny):
    lm, other = make_tiny("gpt2", torch.float64), make_tiny("gpt2", torch.float64, 7)
    with pytest.raises(UserError, match="holds activations of"):
        model_neurons(other, store_of(lm, "mlp_in"), None, "mlp_in")
