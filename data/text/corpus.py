"""Text as sequences of tokens: any dataset, packed, with document boundaries and a held-out split by document.

    settings (`dataset.py`) -> documents (`sources.py`) -> token ids of a split's documents -> sequences [T]

    corpus = load_corpus(DatasetSettings(name="stdlib"), tokenizer)
    for sequence in corpus.sequences("train", limit_tokens=1_000_000):
        sequence.tokens, sequence.document, sequence.position

The sequences are a function of the documents, the settings and the tokenizer; `fingerprint` changes when one of them
does. Each sequence starts with BOS where the tokenizer has one, and so does each document; a tokenizer without BOS
gets EOS after each document instead. Documents without a token are left out; a long one goes on in the next sequence.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError, check_choice
from .dataset import DatasetSettings, Document, TextSource

AT_ONCE = 64
"""Documents tokenized together."""
LONGEST_TEXT = 1_000_000
"""Characters tokenized together: a longer document is tokenized in parts, cut at a line or word."""


class TokenSequence(NamedTuple):
    """One sequence, at most `sequence_length` tokens; pad on the right to batch several."""

    tokens: Tensor
    """[T] int64"""
    document: Tensor
    """[T] int64: index of the document that each token belongs to"""
    position: Tensor
    """[T] int64: position in the document's part of this sequence; 0 is its BOS, where there is one"""


class Corpus:
    def __init__(self, source: TextSource, settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.source = source
        self.settings = settings
        self.tokenizer = tokenizer
        self.packed = settings.packing == "packed" or (settings.packing == "auto" and not source.short)
        kept = {key: value for key, value in asdict(settings).items() if key not in ("name", "revision", "streaming")}
        parts = [source.identity, json.dumps(kept, sort_keys=True), tokenizer_fingerprint(tokenizer)]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The dataset's, a local one's without its folder."""
        return Path(self.settings.name).name if Path(self.settings.name).exists() else self.settings.name

    def documents(self, split: str) -> Iterator[Document]:
        check_choice("split", split, ("train", "held_out"))
        for document in self.source.documents():
            if document.held_out == (split == "held_out"):
                yield document

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        """The split's sequences in their fixed order, until it ends or would pass `limit_tokens` tokens.

        A dataset that ends earlier ends the iteration; one with nothing in this split is refused.
        """
        given = 0
        for sequence in self._pack(split):
            left = None if limit_tokens is None else limit_tokens - given
            if left is not None and left <= 0:
                return
            if left is not None and len(sequence.tokens) > left:
                sequence = TokenSequence(*(part[:left] for part in sequence))
            given += len(sequence.tokens)
            yield sequence
        if not given:
            way_out = (
                "; raise dataset.held_out, take smaller documents (dataset.text_unit) or do without: store.held_out=0"
            )
            raise UserError(
                f"dataset.name={self.settings.name} has no {split.replace('_', '-')} document with text in column "
                f"{self.settings.column} (dataset.held_out={self.settings.held_out:g})"
                + (way_out if split == "held_out" else "")
            )

    def _pack(self, split: str) -> Iterator[TokenSequence]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        length = self.settings.sequence_length
        first = [] if bos is None else [bos]
        last = [eos] if bos is None and eos is not None and self.packed else []
        tokens: list[int] = []
        documents: list[int] = []
        positions: list[int] = []

        def flush() -> Iterator[TokenSequence]:
            if len(tokens) > 1:  # a lone token predicts nothing
                yield TokenSequence(torch.tensor(tokens), torch.tensor(documents), torch.tensor(positions))
            tokens.clear()
            documents.clear()
            positions.clear()

        for index, ids in self._tokenized(split):
            ids = [*ids, *last]
            if not self.packed or length - len(tokens) < len(first) + 2:
                yield from flush()
            start = 0
            while start < len(ids):
                room = length - len(tokens) - len(first)
                part = [*first, *ids[start : start + room]]
                tokens += part
                documents += [index] * len(part)
                positions += range(len(part))
                start += room
                if len(tokens) == length:
                    yield from flush()
        yield from flush()

    def _tokenized(self, split: str) -> Iterator[tuple[int, list[int]]]:
        """Documents that have tokens, without special ones."""
        stream = self.documents(split)
        while group := list(islice(stream, AT_ONCE)):
            parts = [(d.index, text) for d in group if isinstance(d.content, str) for text in cut(d.content)]
            ids: dict[int, list[int]] = {d.index: list(d.content) for d in group if not isinstance(d.content, str)}
            if parts:
                encoded = self.tokenizer([text for _, text in parts], add_special_tokens=False, verbose=False)[
                    "input_ids"
                ]
                for (index, _), part in zip(parts, encoded):
                    ids.setdefault(index, []).extend(part)
            for document in group:
                # a chat template, or a column of tokens, may have begun with the BOS that every document gets
                own = ids.get(document.index, [])
                if own and own[0] == self.tokenizer.bos_token_id:
                    own = own[1:]
                if own:
                    yield document.index, own


def cut(text: str, longest: int = LONGEST_TEXT) -> list[str]:
    """A text in parts of at most `longest` characters, cut after a line or a word where there is one."""
    parts = []
    while len(text) > longest:
        head = text[:longest]
        end = max(head.rfind("\n"), head.rfind(" ")) + 1 or longest
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text] if text else parts


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Changes when a text could become other tokens."""
    if tokenizer is None:
        return "none"
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    whole = tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((whole, tokenizer.bos_token, tokenizer.eos_token)).encode()).hexdigest()[:16]


def load_corpus(settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Open a dataset; a wrong name, column or split is refused here, before any work starts."""
    from .sources import open_source  # it takes pandas and pyarrow, which commands that read no text do without

    return Corpus(open_source(settings, tokenizer), settings, tokenizer)
