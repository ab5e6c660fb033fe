"""Virtual weights and TWERA against loops over single features."""

import pytest
import torch
from crosslace.circuit.features.global_weights import GlobalWeightSettings, neighbourhood, virtual_weights
from crosslace.data.errors import UserError
from crosslace.data.store.store import in_memory_store
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

L, D, F, N = 3, 16, 10, 400


def make(reach="all", read="resid"):
    settings = TranscoderSettings(features=F, reach=reach, activation="jumprelu", read=read, theta_init=0.3)
    return Transcoder(settings, D, L, seed=1, dtype=torch.float64).requires_grad_(False)


def data():
    random = torch.Generator().manual_seed(0)
    return torch.randn(N, L, D, generator=random), torch.randn(N, L, D, generator=random)


def plain_virtual(transcoder, j, a, i, b, weight=None):
    """What feature a of layer j writes before layer i reads, along feature b's encoder."""
    written = torch.zeros(D, dtype=torch.float64)
    for target in range(j, i):
        if target - j < transcoder.reach_at(j):
            written += transcoder.W_dec[j][a, target - j]
    return float(written @ (transcoder.W_enc[i][b] * (1 if weight is None else weight)))


@pytest.mark.parametrize("reach", ["1", "2", "all"])
def test_twera_against_loops(reach):
    transcoder = make(reach)
    x, y = data()
    store = in_memory_store(x, y)
    found = neighbourhood(transcoder, store, 1, 4, GlobalWeightSettings(batch=64, top=L * F))
    acts = [a.double() for a in transcoder.encode(x.double())]
    own = acts[1][:, 4]
    assert len(found["inputs"]) == F and len(found["outputs"]) == F
    for n in found["inputs"]:
        source, V = acts[0][:, n.feature], plain_virtual(transcoder, 0, n.feature, 1, 4)
        assert n.layer == 0 and n.virtual == pytest.approx(V)
        expected = float((source * own).mean() / source.mean()) * V if source.any() else 0.0
        assert n.twera == pytest.approx(expected, abs=1e-12)
        both = float(((source > 0) & (own > 0)).sum() / max(1, int((source > 0).sum())))
        assert n.together == pytest.approx(both)
    for n in found["outputs"]:
        target, V = acts[2][:, n.feature], plain_virtual(transcoder, 1, 4, 2, n.feature)
        assert n.virtual == pytest.approx(V)
        assert n.twera == pytest.approx(float((own * target).mean() / own.mean()) * V, abs=1e-12)
    sizes = [abs(n.twera) for n in found["inputs"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_read_after_the_norm_folds_its_weight(make_tiny, name):
    lm = make_tiny(name, torch.float64)
    transcoder = make("1", "mlp_in")
    found = virtual_weights(transcoder, 2, 3, "inputs", lm)
    norm = lm.layers[2].mlp_norm
    x = torch.randn(D, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for j in (0, 1):
        for a in range(F):
            read = norm.frozen(x + transcoder.W_dec[j][a, 0], one) - norm.frozen(x, one)
            expected = read @ transcoder.W_enc[2][3]
            if j == 1 or transcoder.reach == 1:
                torch.testing.assert_close(found[j][a], expected)
    with pytest.raises(UserError, match="need the model"):
        virtual_weights(transcoder, 2, 3, "inputs")


def test_what_is_not_there_is_refused():
    transcoder, store = make(), in_memory_store(*data())
    with pytest.raises(UserError, match="does not cover layer 7"):
        neighbourhood(transcoder, store, 7, 0)
    with pytest.raises(UserError, match="features 0 to 9, not 10"):
        neighbourhood(transcoder, store, 0, 10)
    with pytest.raises(UserError, match="side=up"):
        virtual_weights(transcoder, 0, 0, "up")
