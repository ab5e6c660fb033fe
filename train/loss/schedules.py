"""Learning rate, penalty and k as functions of the step: pure, so that a resumed run needs no state for them."""

import math

from ...data.errors import check_choice

DECAYS = ("linear", "cosine", "constant")
RAMPS = ("linear", "constant")


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float, shape: str = "linear") -> float:
    """Linear warm-up over the first `warmup` share of the run, `peak`, then to zero over the last `decay` share."""
    check_choice("trainer.lr_schedule", shape, DECAYS)
    rising, falling = round(warmup * steps), round(decay * steps)
    if step < rising:
        return peak * (step + 1) / rising
    if shape == "constant" or falling == 0 or step < steps - falling:
        return peak
    left = (steps - step) / falling
    if shape == "linear":
        return peak * left
    return peak * 0.5 * (1 - math.cos(math.pi * left))


def ramp(step: int, steps: int, final: float, share: float = 1.0, shape: str = "linear") -> float:
    """From 0 to `final` over the first `share` of the run, then `final`: the penalty's coefficient."""
    check_choice("trainer.lam_schedule", shape, RAMPS)
    rising = share * steps
    if shape == "constant" or rising <= 0:
        return final
    return final * min(1.0, (step + 1) / rising)


def annealed_k(step: int, steps: int, k: float, first: float, share: float) -> float:
    """From `first` (say, many features while they find their place) down to `k` over the first `share` of the run."""
    falling = share * steps
    if falling <= 0 or step >= falling:
        return k
    return first + (k - first) * step / falling


def default_lr(features: int) -> float:
    """2e-4 * sqrt(2^14 / F): a starting point that published runs agree on."""
    return 2e-4 * (2**14 / features) ** 0.5
