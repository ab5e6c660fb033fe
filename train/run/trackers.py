"""Where metrics go besides metrics.jsonl: Weights & Biases, a progress bar; `launch/` makes them."""

from typing import Any, Protocol

from torch import Tensor


class Tracker(Protocol):
    """A listener to one training run, on the main process."""

    def resume(self, state: dict[str, Any]) -> None:
        """Once, before the first line: {} on a fresh run, else what `state` gave at the checkpoint."""
        ...

    def log(self, step: int, values: dict[str, float], histograms: dict[str, Tensor]) -> None:
        """A metric line; histograms are raw values on the CPU (densities, thresholds), often empty."""
        ...

    def state(self) -> dict[str, Any]:
        """What the tracker needs to go on after a resume, as JSON."""
        ...

    def close(self, summary: dict[str, float]) -> None:
        """Once, at the end, with the last held-out figures, tokens/s and the first step's seconds."""
        ...
