"""Small stores whose right features are known."""

from typing import NamedTuple

import pytest
import torch
from crosslace.data.store.store import ActivationStore, in_memory_store


class Split(NamedTuple):
    train: ActivationStore
    held_out: ActivationStore


def make_planted(rows: int = 4096, layers: int = 2, width: int = 16, features: int = 24, active: float = 2.0) -> Split:
    """Sparse sums of planted directions; each feature of layer l writes to l and all later layers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    reads = torch.nn.functional.normalize(normal(layers, features, width), dim=-1)
    writes = normal(layers, features, width) / width**0.5
    fires = torch.rand(rows, layers, features, generator=generator) < active / features
    amounts = fires * (0.5 + torch.rand(rows, layers, features, generator=generator))
    x = torch.einsum("nlf,lfd->nld", amounts, reads) + 0.02 * normal(rows, layers, width)
    y = torch.einsum("nlf,lfd->nld", amounts, writes).cumsum(1) * torch.arange(1.0, layers + 1)[:, None]
    attributes = {"model": {"name": "planted", "fingerprint": "planted"}}
    cut = rows // 4
    return Split(
        in_memory_store(x[cut:], y[cut:], attributes=attributes),
        in_memory_store(x[:cut], y[:cut], attributes=attributes),
    )


@pytest.fixture(scope="session")
def planted() -> Split:
    return make_planted()


@pytest.fixture(scope="session")
def wide() -> Split:
    """Wide enough for sixteen active features a token."""
    return make_planted(rows=6144, width=48, features=96, active=8.0)
