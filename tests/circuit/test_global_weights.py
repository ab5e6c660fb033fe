"""Virtual weights and TWERA of all features at once, against loops over single ones."""

import pytest
import torch
from crosslace.circuit.features import global_weights
from crosslace.circuit.features.global_weights import Together, find_neighbours, virtual_weights
from crosslace.data.errors import UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

L, D, F, N = 3, 16, 10, 400


def make(reach="all", read="resid"):
    settings = TranscoderSettings(features=F, reach=reach, activation="jumprelu", read=read, theta_init=0.3)
    return Transcoder(settings, D, L, seed=1, dtype=torch.float64).requires_grad_(False)


def plain_virtual(transcoder, j, a, i, b):
    """What feature a of layer j writes before layer i reads, along feature b's encoder."""
    written = torch.zeros(D, dtype=torch.float64)
    for target in range(j, i):
        if target - j < transcoder.reach_at(j):
            written += transcoder.W_dec[j][a, target - j]
    return float(written @ transcoder.W_enc[i][b])


@pytest.mark.parametrize("reach", ["1", "2", "all"])
def test_twera_against_loops(reach, monkeypatch):
    monkeypatch.setattr(global_weights, "AT_ONCE", 4 * F)  # blocks of four targets
    transcoder = make(reach)
    x = torch.randn(N + 50, L, D, generator=torch.Generator().manual_seed(0))
    together = Together(L, N)
    for some in x.split(150):
        for l, acts in enumerate(transcoder.encode(some.double())):
            together.update(l, acts)
    acts = [a[:N].double() for a in transcoder.encode(x.double())]
    torch.testing.assert_close(
        together.of([(2, 4), (0, 3), (2, 1)]).double(), torch.stack([acts[2][:, 4], acts[0][:, 3], acts[2][:, 1]], 1)
    )
    found = find_neighbours(transcoder, together, 6)
    for layer in range(L):
        for feature in range(F):
            for side, near in found.of(layer, feature).items():
                expected = {}
                for other in range(layer) if side == "inputs" else range(layer + 1, L):
                    for f in range(F):
                        (j, a), (i, b) = sorted([(layer, feature), (other, f)])
                        source, target = acts[j][:, a], acts[i][:, b]
                        V = plain_virtual(transcoder, j, a, i, b)
                        if source.any():
                            expected[other, f] = float((source * target).mean() / source.mean()) * V, V
                strongest = sorted((abs(t) for t, _ in expected.values() if t), reverse=True)[:6]
                assert [abs(n.twera) for n in near] == pytest.approx(strongest, rel=1e-4)
                for n in near:
                    assert (n.twera, n.virtual) == pytest.approx(expected[n.layer, n.feature], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_read_after_the_norm_folds_its_weight(make_tiny, name):
    lm = make_tiny(name, torch.float64)
    transcoder = make("1", "mlp_in")
    found = virtual_weights(transcoder, 1, 2, lm)
    norm = lm.layers[2].mlp_norm
    x = torch.randn(D, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for a in range(F):
        read = norm.frozen(x + transcoder.W_dec[1][a, 0], one) - norm.frozen(x, one)
        torch.testing.assert_close(found[a, 3], read @ transcoder.W_enc[2][3])
    with pytest.raises(UserError, match="need the model"):
        virtual_weights(transcoder, 1, 2)
