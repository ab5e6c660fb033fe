"""Settings of the bundled world and what each size holds."""

from dataclasses import dataclass
from typing import Any

from ...errors import check_choice, check_range
from ..bundled import LlamaShape
from .questions import Extent


@dataclass(frozen=True)
class WorldSettings:
    size: str = "small"
    """`tiny` (seconds, for tests), `small` (at most 3 minutes on 2 cores) or `large` (adds addition, trains longer)."""
    seed: int = 0
    """Decides the model's initial weights, what is held out, and the order of training."""
    steps: int | None = None
    """Training steps; null takes the size's own number."""

    def __post_init__(self) -> None:
        check_choice("world.size", self.size, SIZES)
        check_range("world.seed", self.seed, low=0)
        if self.steps is not None:
            check_range("world.steps", self.steps, low=1)


@dataclass(frozen=True)
class WorldSize:
    shape: LlamaShape
    extent: Extent
    weights: dict[str, float]
    """Share of each family in a training batch."""


SIZES: dict[str, WorldSize] = {
    "tiny": WorldSize(
        LlamaShape(layers=3, width=64, heads=4, mlp=128, context=64, steps=300, batch=256, lr=5e-3),
        Extent(states=6, cities=10, relations=2, pairs=8, names=300, sums=0, held_out=0.2),
        {"two_hop": 0.6, "opposites": 0.25, "acronyms": 0.15, "addition": 0.0},
    ),
    "small": WorldSize(
        LlamaShape(layers=4, width=128, heads=4, mlp=256, context=64, steps=800, batch=256, lr=5e-3),
        Extent(states=50, cities=20, relations=7, pairs=60, names=4000, sums=0, held_out=0.2),
        {"two_hop": 0.55, "opposites": 0.35, "acronyms": 0.1, "addition": 0.0},
    ),
    "large": WorldSize(
        LlamaShape(layers=6, width=256, heads=8, mlp=768, context=64, steps=3000, batch=1024, lr=2e-3),
        Extent(states=50, cities=20, relations=7, pairs=60, names=8000, sums=8100, held_out=0.2),
        {"two_hop": 0.45, "opposites": 0.15, "acronyms": 0.1, "addition": 0.3},
    ),
}


def as_dict(settings: WorldSettings) -> dict[str, Any]:
    return {"size": settings.size, "seed": settings.seed, "steps": settings.steps or SIZES[settings.size].shape.steps}
