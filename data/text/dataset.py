"""Which text is read: its settings, and what a source of documents is. No reader of files stands here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import check_choice, check_range

Content = str | list[int]


@dataclass(frozen=True)
class DatasetSettings:
    name: str = "world"
    """`world`, `stdlib`, `general` (English, code, French and Spanish), `sampled` (written by the model itself), a
    dataset of the Hugging Face hub, or a local file or folder (parquet, jsonl, text, arrow)."""
    config: str | None = None
    """Configuration of a hub dataset, such as `en`."""
    split: str = "train"
    """Split of a hub dataset to read; Crosslace makes its own held-out share of it."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; the newest if not given."""
    column: str = "text"
    """Column with a text, a list of chat messages, or a list of token ids."""
    text_unit: str = "document"
    """What is one document in a local text file: the whole file (`document`), a `paragraph` or a `line`."""
    streaming: bool = False
    """Read the dataset as a stream, without downloading or copying it whole."""
    sequence_length: int = 256
    """Tokens per sequence, at most."""
    packing: str = "auto"
    """`packed` (documents end to end), `document` (each starts a sequence), or `auto` (`document` for the world)."""
    held_out: float = 0.05
    """Share of the documents that is held out of training (the world holds out its own)."""
    seed: int = 0
    """Decides which documents are held out, and the order of the world's sentences."""

    def __post_init__(self) -> None:
        check_range("dataset.sequence_length", self.sequence_length, low=2)
        check_range("dataset.held_out", self.held_out, low=0.0, high=0.5)
        check_choice("dataset.packing", self.packing, ("auto", "packed", "document"))
        check_choice("dataset.text_unit", self.text_unit, ("document", "paragraph", "line"))


class Document(NamedTuple):
    index: int
    content: Content
    """Text, or token ids where the column holds those."""
    held_out: bool


@dataclass(frozen=True)
class TextSource:
    documents: Callable[[], Iterator[Document]]
    """Opens the source again: the same documents in the same order each time."""
    identity: str
    """Changes when the documents do."""
    short: bool = False
    """Documents are short and independent, and models of it saw each alone."""
