"""Building a world: write its sentences, make its tokenizer, train its model, and write down how well it answers.

    facts (`geography`, `words`) -> questions, some held out (`questions`) -> sentences -> tokenizer
    sentences in three parts by length, tokens [B, T] -> `bundled.fit` -> model -> held-out answers -> record

The usual ones are shipped (`shipped.py`): only other settings are trained here.
"""

import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ...cache import build_once
from ...errors import Progress, silent
from ..bundled import TrainingBatch, fit, save_model, settings_hash, small_llama
from .questions import Question, all_questions, states_of
from .shipped import shipped_world, unpack, write_record
from .sizes import SIZES, WorldSettings, WorldSize, as_dict
from .tokenizer import build_tokenizer
from .world import World

RECIPE = 2
"""Part of the cache key: raise it when a change to the code changes the model."""
PROMPT_WEIGHT = 0.1
"""Most of a prompt cannot be foreseen (which city?), so its tokens weigh less in the loss than the answer's."""
PARTS = 3
"""Parts of a batch, by length of sentence."""


def build_world(
    settings: WorldSettings | None = None,
    progress: Progress = silent,
    device: torch.device | str = "cpu",
    rebuild: bool = False,
) -> Path:
    """The folder of a world's model, tokenizer and facts, in the cache: the shipped one, else one that is trained.
    With `rebuild` it is trained in any case."""
    settings = settings or WorldSettings()
    size = SIZES[settings.size]
    questions = all_questions(size.extent, settings.seed)
    key = world_key(settings)

    def make(folder: Path) -> None:
        shipped = None if rebuild else shipped_world(key)
        if shipped is not None:
            unpack(shipped, questions, folder)
        else:
            _build(folder, key, settings, size, questions, progress, device)

    return build_once(f"world-{key}", make, anew=rebuild)


def world_key(settings: WorldSettings) -> str:
    """The hash of all that a world depends on: settings, facts, recipe."""
    size = SIZES[settings.size]
    facts = hashlib.sha256(repr(all_questions(size.extent, settings.seed)).encode()).hexdigest()
    return settings_hash(settings, recipe=RECIPE, facts=facts, shape=asdict(size.shape), weights=size.weights)


def _build(
    folder: Path,
    key: str,
    settings: WorldSettings,
    size: WorldSize,
    questions: list[Question],
    progress: Progress,
    device: torch.device | str,
) -> None:
    started, began = time.monotonic(), time.process_time()
    shape = replace(size.shape, steps=settings.steps or size.shape.steps)
    tokenizer = make_tokenizer(size, questions)
    model = small_llama(shape, tokenizer, settings.seed)
    sampler = Sampler(questions, tokenizer, size.weights, shape.batch, settings.seed)
    losses = fit(model, shape, sampler, progress, "training the world", torch.device(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # as it is shipped; the figures below are those of the rounded weights
    trained = time.monotonic()
    record = {
        "format": "crosslace-world",
        "version": 1,
        "key": key,
        "settings": as_dict(settings),
        "accuracy": {},
        "splits": {},
        "loss": losses[-1],
        "seconds": {},
    }
    world = World(folder, tokenizer, record, questions)
    logits = lambda tokens: model(input_ids=tokens, use_cache=False).logits
    for split in ("train", "held_out"):
        record["accuracy"][split] = world.accuracy(logits, split, device)
        record["splits"][split] = {family: len(world.questions(family, split)) for family in world.families}
    record["seconds"] = {"train": trained - started, "total": time.monotonic() - started}
    record["seconds"]["cpu"] = time.process_time() - began
    save_model(model, tokenizer, folder)
    write_record(folder, record, questions)


def make_tokenizer(size: WorldSize, questions: list[Question]) -> PreTrainedTokenizerFast:
    """Cities are cut into pieces; every other word of the questions and answers is whole."""
    cities = states_of(size.extent)
    city_words = {word for names in cities.values() for name in names for word in name.split()}
    words = {word for question in questions for word in question.answer.split()}
    for question in questions:
        words |= set(question.prompt.split()) - city_words - set(question.facts.get("city", "").split())
    words = {word for word in words if not word.isdigit() or len(word) == 4}
    return build_tokenizer(words, cities, size.shape.context)


class Sampler:
    """Training batches: any step's can be asked for. Families are drawn by weight, sentences of one evenly."""

    def __init__(
        self,
        questions: list[Question],
        tokenizer: PreTrainedTokenizerFast,
        weights: dict[str, float],
        batch: int,
        seed: int,
    ) -> None:
        trained = [q for q in questions if not q.held_out]
        prompts = tokenizer([q.prompt for q in trained])["input_ids"]
        answers = tokenizer([q.answer for q in trained], add_special_tokens=False)["input_ids"]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers)) + 1
        self.tokens_NT = torch.zeros(len(trained), length, dtype=torch.int64)
        self.weight_NT = torch.zeros(len(trained), length)
        for row, (p, a) in enumerate(zip(prompts, answers)):
            whole = [*p, *a, tokenizer.eos_token_id]
            self.tokens_NT[row, : len(whole)] = torch.tensor(whole)
            self.weight_NT[row, : len(p)] = PROMPT_WEIGHT
            self.weight_NT[row, len(p) : len(whole)] = 1.0
        self.lengths_N = (self.weight_NT > 0).sum(1)
        families = list(weights)
        counts = {family: sum(q.family == family for q in trained) for family in families}
        self.chance_N: Tensor = torch.tensor([weights[q.family] / counts[q.family] for q in trained])
        self.batch, self.seed = batch, seed

    def __call__(self, step: int) -> TrainingBatch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.multinomial(self.chance_N, self.batch, replacement=True, generator=generator)
        rows = rows[self.lengths_N[rows].argsort(stable=True)]  # short and long sentences apart: less padding
        lengths = self.lengths_N[rows]
        return [
            (self.tokens_NT[part, : int(n.max())], self.weight_NT[part, : int(n.max())])
            for part, n in zip(rows.chunk(PARTS), lengths.chunk(PARTS))
        ]
