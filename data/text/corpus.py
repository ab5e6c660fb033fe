"""Text as sequences of tokens: any dataset, packed, with document boundaries and a held-out split by document.

    settings (`dataset.py`) -> documents (`sources.py`) -> token ids of a split's documents -> sequences [T]

    corpus = load_corpus(DatasetSettings(name="stdlib"), tokenizer)
    for sequence in corpus.sequences("train", limit_tokens=1_000_000):
        sequence.tokens, sequence.document

The sequences are a function of the documents, the settings and the tokenizer; `fingerprint` changes when one of them
does. Each sequence starts with BOS where the tokenizer has one, and so does each document; a tokenizer without BOS
gets EOS after each document instead. Documents without a token are left out; a long one goes on in the next sequence.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..cache import cache_root
from ..errors import UserError, check_choice
from ..models import LanguageModel
from .dataset import DatasetSettings, TextSource
from .sampled import open_sampled
from .tokens import chunks


class TokenSequence(NamedTuple):
    """One sequence, at most `sequence_length` tokens; pad on the right to batch several."""

    tokens: Tensor
    """[T] int64"""
    document: Tensor
    """[T] int64: index of the document that each token belongs to"""


class Corpus:
    def __init__(
        self,
        source: TextSource,
        settings: DatasetSettings,
        tokenizer: PreTrainedTokenizerBase,
        keep: Path | None = None,
    ) -> None:
        """`keep`: a folder where tokens are kept for other processes and for the next time."""
        self.source = source
        self.settings = settings
        self.tokenizer = tokenizer
        self.keep = keep
        self.packed = settings.packing == "packed" or (settings.packing == "auto" and not source.short)
        kept = {key: value for key, value in asdict(settings).items() if key not in ("name", "revision", "streaming")}
        parts = [source.identity, json.dumps(kept, sort_keys=True), tokenizer_fingerprint(tokenizer)]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The dataset's, a local one's without its folder."""
        return Path(self.settings.name).name if Path(self.settings.name).exists() else self.settings.name

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
        held: list[np.ndarray] = []
        documents: list[tuple[int, int]] = []  # and how many tokens each has here
        filled = 0

        def flush() -> Iterator[TokenSequence]:
            nonlocal filled
            if filled > 1:  # a lone token predicts nothing
                numbers, counts = np.array(documents).T
                tokens = np.concatenate(held).astype(np.int64)
                yield TokenSequence(torch.from_numpy(tokens), torch.from_numpy(np.repeat(numbers, counts)))
            held.clear()
            documents.clear()
            filled = 0

        for index, ids in self._tokenized(split):
            ids = np.concatenate([ids, last]) if last else ids
            if not self.packed or length - filled < len(first) + 2:
                yield from flush()
            start = 0
            while start < len(ids):
                part = ids[start : start + length - filled - len(first)]
                held += [np.array(first, np.int32), part]
                documents.append((index, len(first) + len(part)))
                filled += len(first) + len(part)
                start += len(part)
                if filled == length:
                    yield from flush()
        yield from flush()

    def _tokenized(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """Documents that have tokens, without special ones."""
        check_choice("split", split, ("train", "held_out"))
        folder = self.keep and self.keep / f"{self.fingerprint}-{split}"
        for chunk in chunks(self.source.documents, split == "held_out", self.tokenizer, folder or None):
            for index, ids in chunk.each():
                # a chat template, or a column of tokens, may have begun with the BOS that every document gets
                own = ids[1:] if len(ids) and ids[0] == self.tokenizer.bos_token_id else ids
                if len(own):
                    yield index, own


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Changes when a text could become other tokens."""
    if tokenizer is None:
        return "none"
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    whole = tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((whole, tokenizer.bos_token, tokenizer.eos_token)).encode()).hexdigest()[:16]


def load_corpus(
    settings: DatasetSettings,
    tokenizer: PreTrainedTokenizerBase,
    lm: LanguageModel | None = None,
    keep: bool = False,
) -> Corpus:
    """Open a dataset; a wrong name, column or split is refused here, before any work starts. `lm` writes the text of
    `dataset=sampled`; with `keep` the tokens stay in the cache."""
    if settings.name == "sampled":
        source = open_sampled(settings, lm)
    else:
        from .sources import open_source  # it takes pandas and pyarrow, which commands that read no text do without

        source = open_source(settings, tokenizer)
    return Corpus(source, settings, tokenizer, cache_root() / "tokens" if keep else None)
