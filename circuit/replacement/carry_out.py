"""Carrying interventions out: set features of a prompt and see what the model does.

    groups of interventions --_changes--> activations to set: row, position, feature, value [n] a covered layer
    clean run [1, T] + changes --_writer--> MLP outputs [R, T, D], a row per group --lm--> logits [R, T, V]

An intervention fixes a feature's activation; the change from what it was, times the feature's decoder, is what it
writes. Who answers, and what is frozen, says `answer.py`:

- where MLPs are `clean`, the change counts from the clean activation, and no other feature changes;
- where the `transcoder` answers, features are encoded anew and pass the change on; errors stay;
- where the `model` answers, its own MLP is live and what set features write is added. There a change counts from what
  the feature would be at that moment, so that two set features do not count one effect twice.

In mode `constrained`, what a set feature writes to layers past the frozen range is added to their live outputs;
`past_range=False` leaves that out. (Measured on the bundled world with a CLT, adding it agrees better with graphs: it
is what a changed feature does.)

There are two runs over the same tokens, one clean and one with a row per group of interventions. In generation both
advance step by step, each with its own cache, so that a clean activation exists at every new token as well; as the
groups' texts part, the clean run has a row per group too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import UserError
from ..precision import refuse_overflow
from .answer import Answer, Mode, Who, who_answers
from .local import CleanRun, LocalModel
from .memory import memory_named
from .requests import FeatureAt, Generation, Intervention, InterventionResult, Prompt, covered_positions
from .substitute import add_written, skip_part, written_by

Writer = Callable[[int, dict[str, Tensor]], Tensor | None]


def check_intervention(rm: LocalModel, it: Intervention) -> None:
    """Refuse a layer or a feature that the transcoder does not have."""
    layers = rm.transcoder.layers
    if it.layer not in layers:
        raise UserError(f"set: layer {it.layer} has no features; the transcoder covers layers {layers}")
    n = rm.transcoder.features[layers.index(it.layer)]
    if not 0 <= it.feature < n:
        raise UserError(f"set: layer {it.layer} has features 0 to {n - 1}, not {it.feature}")


class _Patches:
    """Activations of other prompts, each run once."""

    def __init__(self, rm: LocalModel):
        self.rm = rm
        self._acts: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}

    def activation(self, it: Intervention, position: int) -> float:
        tokens = self.rm.lm.tokenize(it.patch_from)  # type: ignore[arg-type]
        key = tuple(tokens.tolist())
        if key not in self._acts:
            self._acts[key] = self.rm.activations(tokens), self.rm.masked_positions(tokens)
        acts, masked = self._acts[key]
        at = it.patch_position
        if at is None:
            at = it.position if isinstance(it.position, int) and it.position < 0 else position
        at = at + len(tokens) if at < 0 else at
        if not 0 <= at < len(tokens) or masked[at]:
            reason = "is masked there" if 0 <= at < len(tokens) else f"has {len(tokens)} tokens"
            raise UserError(f"set: position {at} of patch_from holds no features, it {reason}; give patch_position")
        return acts[self.rm.transcoder.layers.index(it.layer)][at, it.feature].item()


class _Changes(NamedTuple):
    """Activations to set in one covered layer, [n] each; positions count within the step."""

    row: Tensor
    position: Tensor
    feature: Tensor
    value: Tensor


def _open_ended(it: Intervention) -> bool:
    """Whether an intervention covers whatever tokens follow."""
    return isinstance(it.position, slice) and it.position.stop is None


@dataclass
class _Step:
    """What one step of both runs gave."""

    clean: CleanRun
    logits: Tensor  # [R, T, V]; the clean run has one row or R
    reads: dict[int, Tensor]  # covered model layer -> [R, T, D]
    fixed: list[dict[FeatureAt, float]]  # one a row


class _Runs:
    """The clean run and the changed one, side by side. One step over a whole prompt, or several with caches."""

    def __init__(
        self,
        rm: LocalModel,
        groups: Sequence[Sequence[Intervention]],
        answer: Answer,
        past_range: bool,
        prompt_length: int,
        cached: bool = False,
    ):
        self.rm, self.groups, self.answer, self.past_range = rm, groups, answer, past_range
        self.prompt_length, self.seen = prompt_length, 0
        self.patches = _Patches(rm)
        self.number = {layer: l for l, layer in enumerate(rm.transcoder.layers)}
        self.clean_cache = rm.lm.new_cache() if cached else None
        self.cache = rm.lm.new_cache() if cached else None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> _Step:
        """Both runs over the next tokens: [1, T] of all groups, or [R, T]."""
        clean = self.rm.clean(tokens, self.clean_cache, self.seen, attention=self.answer.attention)
        clean_acts = self.rm.features(clean)
        changes, fixed = self._changes(clean, clean_acts)
        reads: dict[int, Tensor] = {}
        write = self._writer(clean, clean_acts, changes)

        def overwrite(layer: int, sites: dict[str, Tensor]) -> Tensor | None:
            if layer in self.number:
                reads[layer] = sites[self.rm.transcoder.settings.read]
            return write(layer, sites)

        lm, rows = self.rm.lm, tokens.expand(len(self.groups), -1)
        with ExitStack() as stack:
            stack.enter_context(lm.freeze_attention({layer: clean.patterns[layer] for layer in self.answer.attention}))
            norms = {key: value for key, value in clean.denominators.items() if key[0] in self.answer.norms}
            stack.enter_context(lm.freeze_norms(norms))
            stack.enter_context(lm.overwrite(overwrite))
            logits = lm(rows, cache=self.cache)
        if not bool(logits.isfinite().all()):
            refuse_overflow({**reads, lm.n_layers: logits}, "model, as it is changed,")
        self.seen += tokens.shape[1]
        return _Step(clean, logits, reads, fixed)

    def _changes(self, clean: CleanRun, clean_acts: list[Tensor]) -> tuple[dict[int, _Changes], list[dict]]:
        """Per covered layer the activations to set in this step, and per row the same by node."""
        fixed: list[dict[FeatureAt, float]] = [{} for _ in self.groups]
        length = clean.tokens.shape[1]
        for row, it in ((row, it) for row, group in enumerate(self.groups) for it in group):
            own, acts = row if len(clean.tokens) > 1 else 0, clean_acts[self.number[it.layer]]
            active = []
            for position in covered_positions(it, self.prompt_length, self.seen + length):
                at = position - self.seen
                if at < 0 or not self._replaced(clean, own, it, at):
                    continue
                node = FeatureAt(it.layer, position, it.feature)
                if node in fixed[row]:
                    raise UserError(f"set: layer {it.layer} feature {it.feature} is set twice at position {position}")
                active.append(bool(acts[own, at, it.feature] > 0))
                fixed[row][node] = self._value(it, position, acts[own, at])
            if it.times and active and not any(active) and not _open_ended(it):
                raise UserError(
                    f"set: feature {it.feature} of layer {it.layer} is silent at position {it.position}, and "
                    f"{it.times:g} times 0 is 0; give value= to set its activation"
                )
        return {l: self._gathered(l, fixed, clean_acts[l]) for l in self.number.values()}, fixed

    def _replaced(self, clean: CleanRun, row: int, it: Intervention, at: int) -> bool:
        """Whether a position holds features; one that was asked for by number must."""
        if not clean.masked[row, at]:
            return True
        if isinstance(it.position, slice):
            return False
        raise UserError(
            f"set: position {it.position} keeps the model's own output (it is first, BOS or a sink) and has no features"
        )

    def _value(self, it: Intervention, position: int, acts_F: Tensor) -> float:
        if it.value is not None:
            return float(it.value)
        if it.times is not None:
            return it.times * acts_F[it.feature].item()
        return self.patches.activation(it, position)

    def _gathered(self, l: int, fixed: list[dict[FeatureAt, float]], acts_BTF: Tensor) -> _Changes:
        layer, device = self.rm.transcoder.layers[l], acts_BTF.device
        found = [
            (row, node.position - self.seen, node.feature, value)
            for row, nodes in enumerate(fixed)
            for node, value in nodes.items()
            if node.layer == layer
        ]
        where = torch.tensor([entry[:3] for entry in found], dtype=torch.long, device=device).reshape(-1, 3)
        value = torch.tensor([entry[3] for entry in found], dtype=acts_BTF.dtype, device=device)
        return _Changes(where[:, 0], where[:, 1], where[:, 2], value)

    def _writer(self, clean: CleanRun, clean_acts: list[Tensor], changes: dict[int, _Changes]) -> Writer:
        """MLP outputs of the changed run, by who answers in each layer."""
        transcoder, answer, n = self.rm.transcoder, self.answer, self.rm.transcoder.n_layers
        who = [answer.mlps[layer] for layer in transcoder.layers]
        # layers of the transcoder that take what features do when they are encoded anew
        taking = {l for l in range(n) if who[l] == "transcoder"}
        anew = [who[l] != "clean" and bool(taking & set(range(l, l + transcoder.reach_at(l)))) for l in range(n)]
        set_writes: dict[int, list[tuple[_Changes, Tensor]]] = {}  # covered layer -> what set features write, [n, D]
        all_write: dict[int, Tensor] = {}  # covered layer -> what all features that were encoded anew write, [R, T, D]

        def send(l: int, x: Tensor) -> None:
            """What features of covered layer l write from now on, given what it reads, x [R, T, D]."""
            change = changes[l]
            if anew[l]:
                acts = transcoder.encode_layer(x, l) * ~clean.masked[..., None]
                acts[change.row, change.position, change.feature] = change.value.to(acts.dtype)
                add_written(all_write, l, written_by(transcoder, l, acts - clean_acts[l]), taking)
            if len(change.row):
                before = self._before(l, x, clean, clean_acts[l], change)
                rows = transcoder.W_dec[l][change.feature].to(before.dtype)
                vectors = (change.value - before)[:, None, None] * rows
                for target, part in enumerate(vectors.unbind(1), start=l):
                    if not (anew[l] and target in taking):
                        set_writes.setdefault(target, []).append((change, part))

        def write(layer: int, sites: dict[str, Tensor]) -> Tensor | None:
            own, by = sites["mlp_out"], answer.mlps[layer]
            if layer not in self.number:
                return clean.mlp_out[layer].expand_as(own) if by == "clean" else None
            l, x = self.number[layer], sites[transcoder.settings.read].to(transcoder.dtype)
            send(l, x)
            if by == "transcoder":
                moved = x - clean.read[layer].to(x.dtype)
                y = all_write.pop(l) + skip_part(transcoder, moved, l)
                out = torch.where(clean.masked[..., None], own, clean.mlp_out[layer] + y.to(own.dtype))
            elif by == "clean":
                out = self.rm.held(clean, layer, sites).clone()
            elif not self.past_range:
                return None
            else:
                out = own.clone()
            for change, part in set_writes.pop(l, []):
                out.index_put_((change.row, change.position), part.to(out.dtype), accumulate=True)
            return out

        return write

    def _before(self, l: int, x: Tensor, clean: CleanRun, clean_acts: Tensor, change: _Changes) -> Tensor:
        """[n] activations from which changes count: the clean ones, or where the model answers, those of the moment."""
        if self.answer.mlps[self.rm.transcoder.layers[l]] != "model":
            return clean_acts[change.row if len(clean.tokens) > 1 else 0, change.position, change.feature]
        acts = self.rm.transcoder.encode_layer(x[change.row, change.position], l)
        return acts.gather(1, change.feature[:, None]).squeeze(1)


def intervene_many(
    rm: LocalModel,
    prompt: Prompt,
    groups: Sequence[Sequence[Intervention]],
    mode: Mode = "steer",
    layers: Collection[int] | None = None,
    past_range: bool = True,
    batch: int = 32,
    *,
    mlps: Mapping[int | range, Who] | None = None,
    freeze: Sequence[str] = (),
) -> list[InterventionResult]:
    """Each group of interventions by itself on one prompt, `batch` groups in one forward pass.

    `mode`, `layers`, `mlps` and `freeze` say who answers: see `who_answers`. `layers` is the frozen range of mode
    `constrained`, by default from the first layer to the group's last one.
    """
    tokens = rm.lm.tokenize(prompt)
    results: dict[int, InterventionResult] = {}
    for chosen in _batches(groups, batch, together=mode != "constrained" or layers is not None):
        some = [groups[number] for number in chosen]
        answer = _answer(rm, some, mode, layers, mlps, freeze)
        runs = _Runs(rm, some, answer, past_range, len(tokens))
        with memory_named(f"batch (now {batch}) or the prompt"):
            step = runs.step(tokens[None])
        clean_reads = {layer: step.clean.read[layer][0] for layer in rm.transcoder.layers}
        for row, number in enumerate(chosen):
            results[number] = InterventionResult(
                tokens=tokens,
                logits=step.logits[row],
                clean_logits=step.clean.logits[0],
                masked=step.clean.masked[0],
                reads={layer: read[row] for layer, read in step.reads.items()},
                clean_reads=clean_reads,
                fixed=step.fixed[row],
                transcoder=rm.transcoder,
                answer=answer,
            )
    return [results[number] for number in range(len(groups))]


def _answer(
    rm: LocalModel,
    groups: Sequence[Sequence[Intervention]],
    mode: Mode,
    layers: Collection[int] | None,
    mlps: Mapping[int | range, Who] | None,
    freeze: Sequence[str],
) -> Answer:
    """Who answers to these groups, whose interventions are checked first."""
    for it in (it for group in groups for it in group):
        check_intervention(rm, it)
    touched = {it.layer for group in groups for it in group}
    return who_answers(mode, rm.lm.n_layers, touched, layers, mlps, freeze)


def _batches(groups: Sequence[Sequence[Intervention]], batch: int, together: bool) -> list[list[int]]:
    """Numbers of the groups that run in one pass; unless all go `together`, those whose last layer is the same."""
    alike: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        alike.setdefault(0 if together else max((it.layer for it in group), default=-1), []).append(number)
    return [same[first : first + batch] for same in alike.values() for first in range(0, len(same), batch)]


@torch.no_grad()
def generate_many(
    rm: LocalModel,
    prompt: Prompt,
    groups: Sequence[Sequence[Intervention]],
    max_new_tokens: int = 20,
    mode: Mode = "steer",
    layers: Collection[int] | None = None,
    past_range: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    *,
    mlps: Mapping[int | range, Who] | None = None,
    freeze: Sequence[str] = (),
) -> list[Generation]:
    """Go on from a prompt under each group of interventions, `batch` groups together, with a KV cache, until all texts
    end or the context is full. Mode `steer`, the default, is the language model's own text under the changes.

    Temperature 0 takes the likeliest token; otherwise each group draws from a random state of its own. Clean
    activations, patterns and denominators at a new token are those of the unchanged model on the same tokens.
    """
    tokens = rm.lm.tokenize(prompt)
    found: dict[int, Generation] = {}
    for chosen in _batches(groups, batch, together=mode != "constrained" or layers is not None):
        some = [groups[number] for number in chosen]
        with memory_named(f"batch (now {batch}), max_new_tokens or the prompt"):
            answer = _answer(rm, some, mode, layers, mlps, freeze)
            runs = _Runs(rm, some, answer, past_range, len(tokens), cached=True)
            draw = _Draw(len(some), temperature, seed, tokens.device)
            found |= zip(chosen, _go_on(rm, tokens, runs, draw, max_new_tokens))
    return [found[number] for number in range(len(groups))]


class _Draw:
    """Next tokens, each row from random numbers of its own: what a row draws does not depend on those beside it."""

    def __init__(self, rows: int, temperature: float, seed: int, device: torch.device):
        self.temperature = temperature
        self.random = [torch.Generator(device=device).manual_seed(seed) for _ in range(rows)]

    def __call__(self, logits_RV: Tensor) -> Tensor:
        if self.temperature <= 0:
            return logits_RV.argmax(-1)
        p_RV = (logits_RV.float() / self.temperature).softmax(-1)
        return torch.cat([torch.multinomial(p, 1, generator=random) for p, random in zip(p_RV, self.random)])


def _go_on(rm: LocalModel, prompt: Tensor, runs: _Runs, draw: _Draw, max_new_tokens: int) -> list[Generation]:
    """Texts of the groups of one batch. A row that has ended goes on unseen until all have."""
    R, ends = len(runs.groups), torch.tensor(sorted(rm.lm.end_tokens), dtype=torch.long, device=prompt.device)
    step = first = runs.step(prompt[None])
    if R > 1 and runs.clean_cache is not None:
        runs.clean_cache.batch_repeat_interleave(R)
    new = prompt.new_zeros(R, 0)
    over = torch.zeros(R, dtype=torch.bool, device=prompt.device)
    for number in range(min(max_new_tokens, rm.lm.context_length - len(prompt))):
        next_R = draw(step.logits[:, -1])
        new = torch.cat([new, next_R[:, None]], 1)
        over |= torch.isin(next_R, ends)
        if bool(over.all()) or number + 1 == max_new_tokens:
            break
        step = runs.step(next_R[:, None])
    clean = first.clean.logits[0, -1].float().softmax(-1)
    return [
        _generation(rm, prompt, _until_end(row, ends), clean, first.logits[number, -1].float().softmax(-1), runs.answer)
        for number, row in enumerate(new)
    ]


def _until_end(new: Tensor, ends: Tensor) -> Tensor:
    """New tokens up to the first that ends a text, which is the last one kept."""
    end = torch.isin(new, ends).nonzero()
    return new[: int(end[0]) + 1] if len(end) else new


def _generation(
    rm: LocalModel, prompt: Tensor, new: Tensor, clean: Tensor, steered: Tensor, answer: Answer
) -> Generation:
    return Generation(torch.cat([prompt, new]), len(prompt), rm.lm.text(new), clean, steered, answer)
