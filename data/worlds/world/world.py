"""Reading a built world: its questions, the ground truth of every token, how well a model answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ...errors import UserError, check_choice
from .questions import Question

if TYPE_CHECKING:
    from datasets import DatasetDict

FACTS_FILE = "world.json"


class World:
    """A world's facts and tokenizer; its model lies in `folder` and loads like any other."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], questions: list[Question]
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.record = record
        """The rest of world.json: settings, splits, accuracy, seconds."""
        self.all_questions = questions

    @classmethod
    def load(cls, folder: str | Path) -> "World":
        folder = Path(folder)
        if not (folder / FACTS_FILE).is_file():
            raise UserError(f"{folder} is not a world: it has no {FACTS_FILE}; build one with model=world")
        record = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        questions = [Question(**question) for question in record.pop("questions")]
        return cls(folder, PreTrainedTokenizerFast.from_pretrained(folder), record, questions)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(question.family for question in self.all_questions))

    def questions(
        self, family: str | None = None, split: str = "held_out", kind: str = "combination"
    ) -> list[Question]:
        """Questions of a family (or all), of `split` train or held_out; `kind="fact"` for single facts (train only)."""
        check_choice("split", split, ("train", "held_out"))
        if family is not None:
            check_choice("family", family, self.families)
        return [
            q
            for q in self.all_questions
            if q.held_out == (split == "held_out") and q.kind == kind and family in (None, q.family)
        ]

    def question(self, prompt: str) -> Question | None:
        """The question with this prompt, if the world has it."""
        return next((q for q in self.all_questions if q.prompt == prompt.strip()), None)

    def corpus(self, seed: int = 0) -> "DatasetDict":
        """All sentences in an order drawn from `seed`: `train`, and the `held_out` ones, which training never saw."""
        from datasets import Dataset, DatasetDict  # they take pandas and pyarrow, which tracing does without

        splits = {}
        for split in ("train", "held_out"):
            chosen = [q for q in self.all_questions if q.held_out == (split == "held_out")]
            columns = {"text": [q.text for q in chosen], "family": [q.family for q in chosen]}
            splits[split] = Dataset.from_dict(columns).shuffle(seed=seed)
        return DatasetDict(splits)

    def tokens(self, question: Question) -> list[int]:
        """The prompt's tokens, <bos> first."""
        return self.tokenizer(question.prompt)["input_ids"]

    def answer_tokens(self, question: Question) -> list[int]:
        return self.tokenizer(question.answer, add_special_tokens=False)["input_ids"]

    def labels(self, question: Question) -> list[tuple[str, ...]]:
        """For each token of the prompt, the concepts that hold there, each from the last token of the words that tell.

        For a two_hop question `state: Texas` holds from the last token of `Dallas` to the end of the prompt; the last
        position also has `answer: Austin`.
        """
        encoding = self.tokenizer(question.prompt, return_offsets_mapping=True)
        ends = [end for _, end in encoding["offset_mapping"]]
        labels: list[list[str]] = [[] for _ in ends]
        for concept, mention in question.concepts.items():
            known_at = question.prompt.index(f" {mention} ") + len(mention) + 1
            for position, end in enumerate(ends):
                if end >= known_at:
                    labels[position].append(concept)
        labels[-1].append(f"answer: {question.answer}")
        return [tuple(concepts) for concepts in labels]

    def correct(
        self,
        model: Callable[[Tensor], Tensor],
        questions: Sequence[Question],
        device: torch.device | str = "cpu",
        batch: int = 512,
    ) -> list[bool]:
        """Whether `model` (tokens [B, T] to logits [B, T, V]) gives each answer whole, every token its first choice."""
        right: list[bool] = []
        for start in range(0, len(questions), batch):
            prompts = [self.tokens(q) for q in questions[start : start + batch]]
            answers = [self.answer_tokens(q) for q in questions[start : start + batch]]
            length = max(len(p) + len(a) for p, a in zip(prompts, answers))
            tokens_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
            for row, (p, a) in enumerate(zip(prompts, answers)):
                tokens_BT[row, : len(p) + len(a)] = torch.tensor(p + a)
            with torch.inference_mode():
                choice_BT = model(tokens_BT.to(device)).argmax(-1).cpu()
            for row, (p, a) in enumerate(zip(prompts, answers)):
                right.append(choice_BT[row, len(p) - 1 : len(p) + len(a) - 1].tolist() == a)
        return right

    def accuracy(
        self, model: Callable[[Tensor], Tensor], split: str = "held_out", device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Share of each family's combinations of `split` that `model` answers in full."""
        result = {}
        for family in self.families:
            right = self.correct(model, self.questions(family, split), device)
            result[family] = sum(right) / len(right) if right else float("nan")
        return result
