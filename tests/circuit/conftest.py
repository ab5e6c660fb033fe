"""Replacement models over tiny random models of any family, for the tests of this room."""

import pytest
import torch
from crosslace.circuit.model import ReplacementModel
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

FEATURES = 12


def random_transcoder(lm, seed: int = 0, features: int = FEATURES, layers=None, **settings) -> Transcoder:
    """Weights of the size that matters: about a third of the features fire, outputs as large as the MLP's."""
    settings = TranscoderSettings(**{"activation": "jumprelu", "features": features, **settings})
    covered = list(range(lm.n_layers)) if layers is None else list(layers)
    transcoder = Transcoder(settings, lm.d_model, covered, seed=seed, dtype=lm.dtype, device=lm.device)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in transcoder.named_parameters():
            if name.startswith("log_theta"):
                continue
            scale = {"W_enc": lm.d_model**-0.5, "W_dec": 0.3, "W_skip": 0.1}.get(name.partition(".")[0], 0.3)
            weight.copy_(torch.randn(weight.shape, generator=random) * scale)
    return transcoder.requires_grad_(False)


@pytest.fixture(scope="session")
def make_replacement(make_tiny):
    """`make_replacement(family, dtype=float64, seed=0, layers=None, **TranscoderSettings)`."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, layers=None, **settings):
        lm = make_tiny(family, dtype)
        return ReplacementModel(lm, random_transcoder(lm, seed, layers=layers, **settings))

    return make


@pytest.fixture(scope="session")
def make_exact_replacement(make_tiny):
    """A model whose MLPs are one ReLU layer, and the transcoder that they are: one feature a neuron."""

    def make(family: str = "gpt2", dtype: torch.dtype = torch.float64) -> ReplacementModel:
        change = {"gpt2": {"activation_function": "relu"}}.get(family, {"hidden_act": "relu"})
        lm = make_tiny(family, dtype, **change)
        neurons = lm.layers[0].mlp_down.nx if family == "gpt2" else lm.layers[0].mlp_down.in_features
        settings = TranscoderSettings(features=neurons, reach="1", activation="relu", read="mlp_in")
        transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=lm.dtype, device=lm.device)
        with torch.no_grad():
            for l, parts in enumerate(lm.layers):
                up = parts.mlp.c_fc if family == "gpt2" else parts.mlp.dense_h_to_4h
                W_in, W_out = up.weight, parts.mlp_down.weight  # Linear is [out, in], GPT-2's Conv1D [in, out]
                transcoder.W_enc[l].copy_(W_in.T if family == "gpt2" else W_in)
                transcoder.b_enc[l].copy_(up.bias)
                transcoder.W_dec[l][:, 0].copy_(W_out if family == "gpt2" else W_out.T)
                transcoder.b_dec[l].copy_(parts.mlp_down.bias)
        return ReplacementModel(lm, transcoder)

    return make


@pytest.fixture
def prompt() -> list[int]:
    return [3, 0, 17, 9, 9, 28, 4]
