"""A training that gets worse for good is said at once, with the rows that carry the error."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ...data.errors import UserError
from ...data.store import Batch
from ..parallel import whole_batch
from ..settings import TOPK, TrainerSettings
from .metrics import finite_rows, worst_rows
from .parts import StepParts
from .records import Records

_log = logging.getLogger(__name__)

FAR = 10.0
"""An NMSE of so many times the best one has diverged."""
MOST_REWINDS = 3
"""How often a run goes back to a checkpoint."""
_FIRST_SHARE = 0.1
"""Share of the run in which an NMSE above 1 is still the beginning."""


class Diverged(Exception):
    """The message says when, how far, and on which rows."""


class Guard:
    """Looks at each NMSE that a run finds."""

    def __init__(self, parts: StepParts, records: Records, token_name: Callable[[int], str] = str) -> None:
        self.settings, self.counters, self.state, self.comm = parts.settings, parts.counters, parts.state, parts.comm
        self.records, self.token_name = records, token_name
        # while k falls, the error rises for that reason
        topk_kind = parts.transcoder.settings.activation in TOPK
        self.settled_at = self.settings.falling_share() * self.settings.steps if topk_kind else 0
        self.said: list[str] = []
        self.batch: Batch | None = None
        """The last rows that were trained on."""

    def look(self, nmse: float, held_out: bool = False) -> None:
        """Say, stop, or ask to go back, at the first look that finds the error above 1 or far above its best."""
        best = self.counters.best_held_out_nmse if held_out else self.counters.best_nmse
        if not self._is_news(nmse, best, held_out):
            return
        message = (
            f"step {self.counters.step}: the {'held-out' if held_out else 'training'} NMSE is {nmse:.3g}, its best was "
            f"{best:.3g}; {self._worst_rows()}"
        )
        self.say(message)
        if self.settings.on_divergence == "stop":
            raise UserError(f"training stopped at {message} (trainer.on_divergence=stop)")
        if self.settings.on_divergence == "rewind":
            raise Diverged(message)

    def say(self, message: str) -> None:
        """To metrics.jsonl and to whoever watches."""
        self.said.append(message)
        self.records.write(self.counters.step, {"divergence": message})
        if self.comm.is_main:
            _log.warning("%s", message)

    def _worst_rows(self) -> str:
        losses_LN = self.state.row_losses[:, -self.settings.batch :]
        token_N = self.batch.token.to(losses_LN.device) if self.batch is not None else losses_LN.new_zeros(0)
        if len(token_N) * self.comm.data_ranks < self.settings.batch:
            token_N = self.comm.all_gather_features(token_N).flatten()
        return worst_in_words(losses_LN, whole_batch(token_N, self.comm)[-losses_LN.shape[1] :], self.token_name)

    def _is_news(self, nmse: float, best: float, held_out: bool) -> bool:
        counters = self.counters
        far = nmse > FAR * best or (nmse > 1 and (best < 1 or counters.step > _FIRST_SHARE * self.settings.steps))
        news, counters.diverging = far and not counters.diverging, far
        if not far:
            settled = counters.step > self.settled_at
            setattr(counters, "best_held_out_nmse" if held_out else "best_nmse", min(best, nmse) if settled else nmse)
        return news


def eased(settings: TrainerSettings, rewinds: int) -> TrainerSettings:
    """After rewinds: half the learning rate for each, and nothing started again."""
    if not rewinds:
        return settings
    lr = settings.lr if settings.lr is None else settings.lr * 0.5**rewinds
    return replace(settings, lr=lr, lr_scale=settings.rate_scale() * 0.5**rewinds, resample_every=0)


def worst_in_words(row_loss_LN: Tensor, token_N: Tensor, name: Callable[[int], str] = str) -> str:
    """In words: the share of the error that the worst thousandth of these rows has, at least one row, and their
    tokens."""
    share, worst = worst_rows(finite_rows(row_loss_LN).sum(1, keepdim=True))
    tokens = [name(token) for token in token_N[worst[:, 0]].tolist()]
    return f"{float(share):.0%} of the last batch's error is in {named_tokens(tokens)}"


def named_tokens(tokens: list[str]) -> str:
    """Such as "3 rows (token ' the' 2 times, token ' a')"."""
    counted = Counter(tokens).most_common(5)
    words = ", ".join(f"token {token}" + (f" {n} times" if n > 1 else "") for token, n in counted)
    return f"{len(tokens)} row{'s' * (len(tokens) != 1)} ({words})"
