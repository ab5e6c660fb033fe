"""Text as sequences of tokens: any dataset, packed, with document boundaries and a held-out split by document."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DatasetSettings:
    name: str = "world"
    """`world`, `stdlib`, a dataset of the Hugging Face hub, or a local file or folder (parquet, jsonl, text, arrow)."""
    config: str | None = None
    """Configuration of a hub dataset, such as `en`."""
    split: str = "train"
    """Split of a hub dataset to read; Crosslace makes its own held-out share of it."""
    column: str = "text"
    """Column with a text, a list of chat messages, or a list of token ids."""
    streaming: bool = False
    """Read a hub dataset as a stream, without downloading it whole."""
    sequence_length: int = 256
    """Tokens per sequence, at most."""
    packing: str = "auto"
    """`packed` (documents end to end), `document` (one document a sequence), or `auto` (`document` for the world)."""
    held_out: float = 0.05
    """Share of the documents that is held out of training."""
    seed: int = 0
    """Decides which documents are held out."""


class TokenSequence(NamedTuple):
    tokens: Tensor
    """[T] int64"""
    document: Tensor
    """[T] int64: index of the document that each token belongs to"""
    position: Tensor
    """[T] int64: position in the document's part of this sequence, <bos> included"""


class Corpus:
    fingerprint: str

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        raise NotImplementedError


def load_corpus(settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    raise NotImplementedError
