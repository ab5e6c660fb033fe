"""What a graph explains: next tokens, differences of two, directions, or features, at any position."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import UserError
from ...data.models import LanguageModel
from ...train.transcoder import Transcoder
from ..precision import wide
from .backward import Directions
from .linear import Recording, fold_reading
from .sources import ActiveFeatures, reading

FEATURE = re.compile(r"L(\d+):(\d+)$")
POSITION = re.compile(r"(.+)@(-?\d+)$", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Target:
    """One thing to explain: `token` (less `minus`), or `vector` (a direction in the last residual stream, after the
    final norm), or `feature` of `layer`."""

    token: int | str | None = None
    minus: int | str | None = None
    vector: Tensor | None = None
    layer: int | None = None
    feature: int | None = None
    position: int = -1
    label: str = ""

    @classmethod
    def parse(cls, given: "str | int | Tensor | Target", length: int) -> "Target":
        """`Austin`, `Austin - Dallas`, `L3:12` (feature 12 of layer 3), each with `@5` for position 5; a token id; a
        vector."""
        if isinstance(given, Target):
            return given
        if isinstance(given, Tensor):
            return cls(vector=given, label="vector")
        if isinstance(given, int) and not isinstance(given, bool):
            return cls(token=given)
        if not isinstance(given, str):
            raise UserError(f"target {given!r} is neither a text, nor a token id, nor a vector")
        text, position = given, -1
        if found := POSITION.match(text):
            text, position = found[1], int(found[2])
            if not -length <= position < length:
                raise UserError(f"target {found[0]!r} is at position {position}, but the prompt has {length} tokens")
        if found := FEATURE.match(text):
            return cls(layer=int(found[1]), feature=int(found[2]), position=position)
        first, dash, second = text.partition(" - ")
        return cls(token=first, minus=second if dash else None, position=position, label=text)

    def __str__(self) -> str:
        """As `parse` reads it, where it can."""
        if self.feature is not None:
            name = f"L{self.layer}:{self.feature}"
        elif self.token is not None:
            name = f"{self.token} - {self.minus}" if self.minus is not None else str(self.token)
        else:
            name = self.label or "vector"
        return name if self.position == -1 else f"{name}@{self.position}"


class Chosen(NamedTuple):
    """The targets of a graph and how its logit nodes are described."""

    targets: Directions
    probabilities: Tensor
    tokens: list[int]
    labels: list[str]


def likely_tokens(probabilities: Tensor, most: int, mass: float) -> Tensor:
    """The fewest tokens whose probability reaches `mass`, at most `most`."""
    values, tokens = probabilities.topk(min(most, len(probabilities)))
    return tokens[: int((wide(values).cumsum(0) < mass).sum()) + 1]


def one_token(lm: LanguageModel, text: int | str, probabilities: Tensor) -> int:
    """The id of a token that is named by its text; where ` text` and `text` are both tokens, the likelier one."""
    if isinstance(text, int):
        if not 0 <= text < lm.d_vocab:
            raise UserError(f"target {text} is no token: ids are 0 to {lm.d_vocab - 1}")
        return text
    if not text:
        raise UserError("a target is empty text; name a token, as in Austin or Austin - Dallas")
    if lm.tokenizer is None:
        raise UserError(f"target {text!r} cannot be looked up: the model has no tokenizer; give token ids")
    forms = [text] if text.startswith(" ") else [text, " " + text]
    pieces = [lm.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    single = [ids[0] for ids in pieces if len(ids) == 1]
    if not single:
        parts = ", ".join(map(repr, lm.token_strings(pieces[-1])))
        raise UserError(f"target {text!r} is not one token of this model but {len(pieces[-1])} ({parts}); name one")
    return max(single, key=lambda token: float(probabilities[token]))


def next_token_targets(lm: LanguageModel, recording: Recording, directions: Tensor, positions: Tensor) -> Directions:
    """Directions that read `directions [B, D]` after the final norm, at `positions [B]`."""
    dtype, norm = directions.dtype, lm.final_norm
    denominator = recording.denominators[lm.n_layers, "final_norm"].to(dtype)[positions]
    x = recording.layer_in[lm.n_layers][positions]
    normed = norm.frozen(x, recording.denominators[lm.n_layers, "final_norm"][positions]).to(dtype)
    bias = directions @ norm.bias.to(dtype) if norm.bias is not None else directions.new_zeros(len(directions))
    return Directions(
        torch.full_like(positions, lm.n_layers),
        positions,
        fold_reading(directions, norm, dtype) / denominator,
        bias,
        (normed * directions).sum(1),
    )


def token_directions(lm: LanguageModel, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unembedding rows less the mean row [B, D], and their biases likewise [B]."""
    W_U = lm.W_U
    rows = W_U[tokens].to(dtype) - W_U.mean(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    if lm.b_U is None:
        return rows, rows.new_zeros(len(rows))
    return rows, lm.b_U[tokens].to(dtype) - lm.b_U.to(dtype).mean()


@dataclass
class FeatureTargets:
    """Directions for features' pre-activations, made when asked for: those of a long prompt would fill memory."""

    lm: LanguageModel
    transcoder: Transcoder
    recording: Recording
    features: ActiveFeatures
    dtype: torch.dtype

    @property
    def layer(self) -> Tensor:
        return self.features.layer

    @property
    def position(self) -> Tensor:
        return self.features.position

    def select(self, ids: Tensor, layers: list[int] | None = None) -> Directions:
        """The directions of some; `layers` says where they are, which else the device is asked for."""
        features = ActiveFeatures(*(column[ids] for column in self.features))
        layers = features.layer.tolist() if layers is None else layers
        directions = torch.empty(len(ids), self.lm.d_model, dtype=self.dtype, device=ids.device)
        own_bias = directions.new_empty(len(ids))
        start = 0
        for layer, same in itertools.groupby(layers):
            mine = slice(start, start + len(list(same)))
            start, l = mine.stop, self.transcoder.layers.index(layer)
            norm, denominator, _ = reading(self.lm, self.transcoder, self.recording, l)
            index = features.index[mine]
            weight = self.transcoder.W_enc[l].detach()[index].to(self.dtype)
            own_bias[mine] = self.transcoder.b_enc[l].detach()[index].to(self.dtype)
            if norm is not None and norm.bias is not None:
                own_bias[mine] += weight @ norm.bias.to(self.dtype)
            divided = denominator.to(self.dtype)[features.position[mine]]
            directions[mine] = fold_reading(weight, norm, self.dtype) / divided
        values = features.preactivation.to(self.dtype)
        return Directions(features.layer, features.position, directions, own_bias, values)


def feature_targets(
    lm: LanguageModel, transcoder: Transcoder, recording: Recording, features: ActiveFeatures, dtype: torch.dtype
) -> Directions:
    """Directions for features' pre-activations, in the order of `features`."""
    every = torch.arange(len(features.layer), device=features.layer.device)
    return FeatureTargets(lm, transcoder, recording, features, dtype).select(every)


def choose_targets(
    lm: LanguageModel,
    transcoder: Transcoder,
    recording: Recording,
    wanted: Sequence[Target] | None,
    most: int,
    mass: float,
    dtype: torch.dtype,
) -> Chosen:
    """The likeliest next tokens, or what the caller names."""
    probabilities_TV = recording.logits.float().softmax(-1)
    if wanted is None:
        last = probabilities_TV[-1]
        tokens = likely_tokens(last, most, mass)
        directions, bias = token_directions(lm, tokens, dtype)
        targets = next_token_targets(lm, recording, directions, torch.full_like(tokens, len(recording.tokens) - 1))
        targets = targets._replace(own_bias=targets.own_bias + bias, value=targets.value + bias)
        return Chosen(targets, last[tokens], tokens.tolist(), lm.token_strings(tokens))
    if not wanted:
        raise UserError("trace.targets is empty; name at least one target, or leave it out")
    found = [_named(lm, transcoder, recording, target, probabilities_TV, dtype) for target in wanted]
    chosen = Chosen(
        Directions(*(torch.cat(column) for column in zip(*(one.targets for one in found)))),
        torch.cat([one.probabilities for one in found]),
        [one.tokens[0] for one in found],
        [one.labels[0] for one in found],
    )
    places = list(zip(chosen.tokens, chosen.labels, chosen.targets.position.tolist()))
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"trace.targets names {twice[1]!r} at position {twice[2]} twice; name each target once")
    if all(token >= 0 for token in chosen.tokens):
        return chosen
    return chosen._replace(probabilities=torch.full_like(chosen.probabilities, 1 / len(found)))


def _named(
    lm: LanguageModel,
    transcoder: Transcoder,
    recording: Recording,
    target: Target,
    probabilities_TV: Tensor,
    dtype: torch.dtype,
) -> Chosen:
    """One target that the caller names."""
    T, device = len(recording.tokens), recording.tokens.device
    if not -T <= target.position < T:
        raise UserError(f"target position {target.position} is outside the prompt, which has {T} tokens")
    position = torch.tensor([target.position % T], device=device)
    probabilities = probabilities_TV[position[0]]
    one = probabilities.new_ones(1)
    if target.feature is not None:
        return _named_feature(lm, transcoder, recording, target, position, dtype)
    if target.vector is not None:
        if target.vector.shape != (lm.d_model,):
            raise UserError(f"a target vector takes {lm.d_model} numbers, not {tuple(target.vector.shape)}")
        directions = target.vector.to(device, dtype)[None]
        return Chosen(next_token_targets(lm, recording, directions, position), one, [-1], [target.label or "vector"])
    if target.token is None:
        raise UserError("a target takes a token, a vector or a feature")
    token = torch.tensor([one_token(lm, target.token, probabilities)], device=device)
    directions, bias = token_directions(lm, token, dtype)
    label = lm.token_strings(token)[0]
    if target.minus is not None:
        other = torch.tensor([one_token(lm, target.minus, probabilities)], device=device)
        other_directions, other_bias = token_directions(lm, other, dtype)
        directions, bias = directions - other_directions, bias - other_bias
        label = f"{label} - {lm.token_strings(other)[0].strip()}"
    targets = next_token_targets(lm, recording, directions, position)
    targets = targets._replace(own_bias=targets.own_bias + bias, value=targets.value + bias)
    return Chosen(targets, probabilities[token], [-1 if target.minus is not None else int(token)], [label])


def _named_feature(
    lm: LanguageModel,
    transcoder: Transcoder,
    recording: Recording,
    target: Target,
    position: Tensor,
    dtype: torch.dtype,
) -> Chosen:
    """A feature's pre-activation, whether it fires or not."""
    if target.layer not in transcoder.layers:
        raise UserError(f"target layer {target.layer} is not one that the transcoder covers: {transcoder.layers}")
    l = transcoder.layers.index(target.layer)
    if target.feature is None or not 0 <= target.feature < transcoder.features[l]:
        raise UserError(f"layer {target.layer} has features 0 to {transcoder.features[l] - 1}, not {target.feature}")
    x = reading(lm, transcoder, recording, l)[2][position].to(dtype)
    h = transcoder.preactivation(x, l).detach()[:, target.feature]
    place = torch.tensor([target.layer], device=position.device), position, position.new_tensor([target.feature])
    targets = feature_targets(lm, transcoder, recording, ActiveFeatures(*place, h, h), dtype)
    return Chosen(targets, h.new_ones(1), [-1], [target.label or f"feature L{target.layer}:{target.feature}"])
