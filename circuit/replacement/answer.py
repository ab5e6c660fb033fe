"""Who answers to an intervention: layer by layer the MLPs, and what of attention and norms stays as it was.

Two switches. `mlps`, a layer: `model` (the language model's own MLP is live, and what set features write is
added to it), `transcoder` (features are encoded anew, the clean error is added), `clean` (frozen, but for a skip
connection, which follows its input as it does in a graph). `freeze`: `attention` (patterns) and `norms`
(denominators) as in the clean run. The modes are names for what people use.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ...data.errors import UserError, check_choice

Mode = Literal["steer", "free", "constrained", "direct"]
Who = Literal["model", "transcoder", "clean"]
MODES = ("steer", "free", "constrained", "direct")
WHO = ("model", "transcoder", "clean")
FREEZES = ("attention", "norms")
SAYS = {"model": "the model's own MLPs", "transcoder": "the transcoder", "clean": "nobody (MLPs as in the clean run)"}


@dataclass(frozen=True)
class Answer:
    """Who answers in each layer, and what is frozen where."""

    mode: Mode
    mlps: tuple[Who, ...]
    """One a layer of the model."""
    attention: frozenset[int]
    """Layers whose attention patterns are frozen."""
    norms: frozenset[int]
    """Layers whose norm denominators are frozen; the number of layers stands for the last norm."""

    def __str__(self) -> str:
        parts, layer = [], 0
        for who, same in groupby(self.mlps):
            first, layer = layer, layer + len(list(same))
            where = "" if layer - first == len(self.mlps) else f" in layers {first} to {layer - 1}"
            parts.append(SAYS[who] + where)
        n = len(self.mlps)
        frozen = [_frozen("attention", self.attention, n), _frozen("norms", self.norms, n + 1)]
        said = " and ".join(part for part in frozen if part) or "nothing"
        return f"{self.mode}: answered by {', '.join(parts)}; frozen: {said}"


def _frozen(what: str, layers: frozenset[int], all_layers: int) -> str:
    if not layers:
        return ""
    if len(layers) == all_layers:
        return what
    shown = sorted(layers)
    whole = shown == list(range(shown[0], shown[-1] + 1))
    return f"{what} of layers {f'{shown[0]} to {shown[-1]}' if whole else ', '.join(map(str, shown))}"


def who_answers(
    mode: Mode,
    n_layers: int,
    touched: Collection[int] = (),
    layers: Collection[int] | None = None,
    mlps: Mapping[int | range, Who] | None = None,
    freeze: Sequence[str] = (),
) -> Answer:
    """The answer that a mode names. `layers`: the frozen range of `constrained`, up to the last layer `touched` unless
    given. `mlps` says for single layers or ranges who answers instead, and `freeze` what else is frozen everywhere."""
    check_choice("mode", mode, MODES)
    if layers is not None and mode != "constrained":
        raise UserError(f"layers={list(layers)} belongs to mode=constrained; mode={mode} takes none")
    everywhere, nowhere = frozenset(range(n_layers + 1)), frozenset()
    frozen: frozenset[int] = nowhere
    if mode == "constrained":
        frozen = frozenset(range(max(touched, default=-1) + 1) if layers is None else layers)
        _check_layers(frozen, n_layers)
        if not set(touched) <= frozen:
            raise UserError(f"layer {min(set(touched) - frozen)} is changed but lies outside layers={sorted(frozen)}")
    usual: Who = {"steer": "model", "free": "transcoder", "constrained": "model", "direct": "clean"}[mode]  # type: ignore[assignment]
    who: list[Who] = ["clean" if layer in frozen else usual for layer in range(n_layers)]
    for place, by in (mlps or {}).items():
        check_choice("mlps", by, WHO)
        for layer in [place] if isinstance(place, int) else place:
            _check_layers([layer], n_layers)
            who[layer] = by
    for what in freeze:
        check_choice("freeze", what, FREEZES)
    attention, norms = (everywhere if mode == "direct" or what in freeze else frozen for what in FREEZES)
    return Answer(mode, tuple(who), attention - {n_layers}, norms)


def _check_layers(layers: Collection[int], n_layers: int) -> None:
    if not set(layers) <= set(range(n_layers)):
        raise UserError(f"layers={sorted(layers)} goes beyond the model's layers 0 to {n_layers - 1}")
