"""Learning rate, penalty and k as functions of the step: pure, so that a resumed run needs no state for them."""

import math

from ..settings import TrainerSettings


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float, shape: str = "linear") -> float:
    """Linear warm-up over the first `warmup` share of the run, `peak`, then to zero over the last `decay` share."""
    rising, falling = round(warmup * steps), round(decay * steps)
    if step < rising:
        return peak * (step + 1) / rising
    if shape == "constant" or falling == 0 or step < steps - falling:
        return peak
    left = (steps - step) / falling
    if shape == "linear":
        return peak * left
    return peak * 0.5 * (1 - math.cos(math.pi * left))


def ramp(step: int, steps: int, final: float, share: float = 1.0) -> float:
    """From 0 to `final` over the first `share` of the run, then `final`: the penalty's coefficient."""
    rising = share * steps
    if rising <= 0:
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


def scheduled_lr(settings: TrainerSettings, features: int, step: int) -> float:
    """The learning rate of a step, in a transcoder of so many features a layer."""
    peak = settings.lr or settings.rate_scale() * default_lr(features)
    return learning_rate(step, settings.steps, peak, settings.lr_warmup, settings.lr_decay, settings.lr_schedule)
