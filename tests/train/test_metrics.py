import pytest
import torch
from crosslace.train.run.metrics import ReconstructionMetrics
from crosslace.train.transcoder.activations import to_sparse

N, L, D, F = 50, 2, 6, 12


def rows():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(N, L, D, generator=generator) + 3.0
    y_hat = y + 0.3 * torch.randn(N, L, D, generator=generator)
    acts = [(torch.randn(N, F, generator=generator) - 1).relu() for _ in range(L)]
    acts[0][:, 0] = 0.0  # never fires
    acts[1][:, 1] = 1.0  # always fires
    return y, y_hat, acts


@pytest.mark.parametrize("sparse", [False, True])
def test_streamed_figures_are_the_definitions(sparse):
    y, y_hat, acts = rows()
    metrics = ReconstructionMetrics([F] * L, D)
    for start in range(0, N, 7):
        part = [a[start : start + 7] for a in acts]
        metrics.update(y[start : start + 7], y_hat[start : start + 7], [to_sparse(a) for a in part] if sparse else part)
    result = metrics.compute()
    for l in range(L):
        error = (y - y_hat)[:, l].square().sum()
        want = {
            "nmse": error / y[:, l].square().sum(),
            "fvu": error / (y[:, l] - y[:, l].mean(0)).square().sum(),
            "cosine": torch.cosine_similarity(y[:, l], y_hat[:, l], dim=-1).mean(),
            "l0": (acts[l] > 0).sum() / N,
            "dead": ((acts[l] > 0).sum(0) == 0).float().mean(),
            "dense": ((acts[l] > 0).float().mean(0) > 0.1).float().mean(),
        }
        for name, value in want.items():
            assert result["layers"][l][name] == pytest.approx(float(value), rel=1e-5), name
    assert result["overall"]["l0_total"] == pytest.approx(sum(row["l0"] for row in result["layers"]))
    assert result["overall"]["nmse"] == pytest.approx(sum(row["nmse"] for row in result["layers"]) / L)
    assert result["tokens"] == N
    assert torch.allclose(metrics.densities()[1].float(), (acts[1] > 0).float().mean(0))


def test_fvu_keeps_its_digits_far_from_zero():
    y = torch.randn(2000, 1, 4, generator=torch.Generator().manual_seed(1)) + 1000
    metrics = ReconstructionMetrics([3], 4)
    metrics.update(y, y.mean(0, keepdim=True).expand_as(y), [torch.zeros(2000, 3)])
    assert metrics.compute()["layers"][0]["fvu"] == pytest.approx(1.0, rel=1e-4)
