"""What can be asked of features, and what comes back: `Intervention`, `InterventionResult`, `Generation`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import SettingsError, UserError
from ...train.transcoder import Transcoder
from .answer import Answer

Prompt = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class Intervention:
    """One feature at one position or a slice of them; exactly one of `value`, `times` and `patch_from` is given."""

    layer: int
    """Layer of the model that the feature reads."""

    position: int | slice | str
    """A position, from the end if negative, or a slice; as text `3`, `2:5`, `4:`. One that is open at its end goes on
    over generated tokens."""

    feature: int
    """Index of the feature in its layer."""

    value: float | None = None
    """The activation to set."""

    times: float | None = None
    """A multiple of the clean activation: 0 ablates, -1 flips, 2 doubles."""

    patch_from: str | Sequence[int] | None = None
    """Another prompt, whose activation of this feature is taken."""

    patch_position: int | None = None
    """Where in the other prompt, from its end if negative; if not given, the same position, counted from its end where
    `position` is a negative number."""

    def __post_init__(self):
        given = [name for name in ("value", "times", "patch_from") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(
                f"set: layer {self.layer} feature {self.feature} has {' and '.join(given) or 'nothing'} to set;"
                " give one of value, times and patch_from"
            )
        for name in ("value", "times"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise SettingsError(
                    f"set: layer {self.layer} feature {self.feature} has {name}={number}; give a number"
                )
        if isinstance(self.position, str):
            object.__setattr__(self, "position", _parse_position(self.position))


def _parse_position(text: str) -> int | slice:
    match = re.fullmatch(r"(-?\d+)|(-?\d+)?:(-?\d+)?", text.strip())
    if match is None:
        raise SettingsError(f"set: position={text!r} is not a position; give a number or a slice such as 3: or 2:5")
    if match[1] is not None:
        return int(match[1])
    return slice(*(None if part is None else int(part) for part in (match[2], match[3])))


class FeatureAt(NamedTuple):
    """Where a feature sits."""

    layer: int
    position: int
    feature: int


@dataclass
class InterventionResult:
    """What one group of interventions did to one prompt."""

    tokens: Tensor
    """[T]"""
    logits: Tensor
    """[T, V] under the interventions."""
    clean_logits: Tensor
    """[T, V] without."""
    masked: Tensor
    """[T], True where the model keeps its own MLP output and has no features."""
    reads: dict[int, Tensor]
    """Covered model layer -> what the transcoder reads there under the interventions, [T, D]."""
    clean_reads: dict[int, Tensor]
    """The same without."""
    fixed: dict[FeatureAt, float]
    """The activations that were set."""
    transcoder: Transcoder
    answer: Answer
    """Who answered to the change, and what was frozen."""

    def activation(self, layer: int, position: int, feature: int) -> Tensor:
        """One feature's activation under the interventions; the set value where it was set."""
        position = range(len(self.tokens))[position]
        if (node := FeatureAt(layer, position, feature)) in self.fixed:
            return self.transcoder.b_dec[0].new_tensor(self.fixed[node])
        return self._encode(self.reads, layer, position)[feature]

    def clean_activation(self, layer: int, position: int, feature: int) -> Tensor:
        """One feature's activation without interventions."""
        return self._encode(self.clean_reads, layer, position)[feature]

    def activations(self, layer: int) -> Tensor:
        """All activations of a layer under the interventions, [T, F]."""
        acts = self._encode(self.reads, layer, slice(None))
        for node, value in self.fixed.items():
            if node.layer == layer:
                acts[node.position, node.feature] = value
        return acts

    def clean_activations(self, layer: int) -> Tensor:
        """All activations of a layer without interventions, [T, F]."""
        return self._encode(self.clean_reads, layer, slice(None))

    def effect(self, nodes: Sequence[tuple[int, int, int]]) -> Tensor:
        """How far the activations of (layer, position, feature) moved, [nodes]."""
        return torch.stack([self.activation(*node) - self.clean_activation(*node) for node in nodes])

    def preactivation(self, layer: int, position: int, feature: int, clean: bool = False) -> Tensor:
        """A feature's pre-activation as the encoder computes it, with or without the interventions."""
        l = self.transcoder.layers.index(layer)
        x = (self.clean_reads if clean else self.reads)[layer][position].to(self.transcoder.dtype)
        return x @ self.transcoder.W_enc[l][feature].to(x.dtype) + self.transcoder.b_enc[l][feature].to(x.dtype)

    def probabilities(self, clean: bool = False) -> Tensor:
        """Next-token probabilities after the last position, [V]."""
        return (self.clean_logits if clean else self.logits)[-1].float().softmax(-1)

    def _encode(self, reads: dict[int, Tensor], layer: int, position: int | slice) -> Tensor:
        l = self.transcoder.layers.index(layer)
        acts = self.transcoder.encode_layer(reads[layer][position].to(self.transcoder.dtype), l)
        return acts * ~self.masked[position, None] if isinstance(position, slice) else acts * ~self.masked[position]


class Generation(NamedTuple):
    """A prompt and how it went on."""

    tokens: Tensor
    """[T + new], the prompt included."""
    prompt_length: int
    text: str
    """The new tokens as text (ids where there is no tokenizer)."""
    clean_probabilities: Tensor
    """[V]: the first new token's probabilities without the interventions."""
    probabilities: Tensor
    """[V]: with them."""
    answer: Answer
    """Who answered, and what was frozen: whose text this is."""


def covered_positions(it: Intervention, prompt_length: int, end: int) -> range:
    """The positions below `end` that an intervention covers; negative ones count from the prompt's end."""
    if not isinstance(it.position, slice):
        position = int(it.position)
        at = position + prompt_length if position < 0 else position
        if not 0 <= at < max(end, prompt_length):
            raise UserError(f"set: position {position} is outside the prompt's {prompt_length} tokens")
        return range(at, min(at + 1, end))
    start, stop, step = it.position.start or 0, it.position.stop, it.position.step or 1
    if step < 1:
        raise UserError(f"set: a slice of positions goes forward, not by {step}")
    start = max(0, start + prompt_length) if start < 0 else start
    if stop is not None:
        stop = stop + prompt_length if stop < 0 else stop
        if stop <= start:
            raise UserError(f"set: positions {it.position.start or 0}:{it.position.stop} hold no token of the prompt")
    stop = end if stop is None else stop
    return range(start, min(stop, end), step)
