"""Documents as token ids: many tokenized at once, and kept in files for whoever reads the same text again.

A chunk is some of a split's documents, in order; the first is small, since many readers want only the beginning. With a
folder to keep them in, each chunk is made once, by the process that comes to it first: the others wait and read it, and
so does a harvest that goes on. The files may be deleted at any time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .dataset import Document

FIRST, LARGEST = 64, 4096
"""Documents of the first chunk and of a late one."""
CHARACTERS = 1 << 22
"""A chunk of so much text takes no further document."""
LONGEST_TEXT = 1_000_000
"""Characters tokenized as one: a longer document is tokenized in parts, cut at a line or word."""


class Chunk(NamedTuple):
    """Tokens of some documents one after another, without special ones."""

    ids: np.ndarray
    documents: np.ndarray
    """[N] their numbers"""
    lengths: np.ndarray
    """[N] their tokens"""
    after: np.ndarray
    """[] documents of all splits that lie before the next chunk"""

    def each(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number and tokens of every document."""
        ends = np.cumsum(self.lengths)
        for document, end, length in zip(self.documents.tolist(), ends.tolist(), self.lengths.tolist()):
            yield document, self.ids[end - length : end]


def chunks(
    documents: Callable[[], Iterator[Document]], held_out: bool, tokenizer: PreTrainedTokenizerBase, folder: Path | None
) -> Iterator[Chunk]:
    """All chunks of a split."""
    stream: Iterator[Document] | None = None
    passed = 0  # of the stream

    def make(number: int, start: int) -> Chunk:
        nonlocal stream, passed
        stream = documents() if stream is None else stream
        group: list[Document] = []
        size = 0
        for document in stream:
            passed += 1
            if passed <= start or document.held_out != held_out:
                continue
            group.append(document)
            size += len(document.content)
            if size >= CHARACTERS or len(group) >= min(LARGEST, FIRST << min(number, 20)):
                break
        return tokenized(group, tokenizer, passed)

    after = 0
    for number in count():
        chunk = kept(folder, number, lambda number=number, after=after: make(number, after))
        if not len(chunk.documents):
            return
        yield chunk
        after = int(chunk.after)


def tokenized(group: list[Document], tokenizer: PreTrainedTokenizerBase, after: int) -> Chunk:
    parts = [(d.index, text) for d in group if isinstance(d.content, str) for text in cut(d.content)]
    pieces: dict[int, list[list[int]]] = {
        d.index: [] if isinstance(d.content, str) else [list(d.content)] for d in group
    }
    for (index, _), ids in zip(parts, encode(tokenizer, [text for _, text in parts])):
        pieces[index].append(ids)
    flat = [np.fromiter((i for part in of for i in part), np.int32) for of in pieces.values()]
    return Chunk(
        np.concatenate([np.zeros(0, np.int32), *flat]),
        np.fromiter(pieces, np.int64),
        np.array([len(ids) for ids in flat], np.int64),
        np.array(after),
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts without special ones; a fast tokenizer takes as many threads as the machine has."""
    if not texts:
        return []
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


def cut(text: str, longest: int = LONGEST_TEXT) -> list[str]:
    """A text in parts of at most `longest` characters, cut after a line or a word where there is one."""
    parts = []
    while len(text) > longest:
        head = text[:longest]
        end = max(head.rfind("\n"), head.rfind(" ")) + 1 or longest
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text] if text else parts


def kept(folder: Path | None, number: int, make: Callable[[], Chunk]) -> Chunk:
    """The chunk of this number in a folder; made and kept there where it is not. A folder that cannot be written to
    keeps nothing."""
    if folder is None:
        return make()
    path = folder / f"{number}.npz"
    with ExitStack() as stack:
        for waited in (False, True):
            if waited:
                with suppress(OSError):
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(folder / "lock"))
            with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(path, allow_pickle=False) as held:
                return Chunk(*(held[name] for name in Chunk._fields))
        chunk = make()
        with suppress(OSError):
            aside = path.with_name(f"{uuid4().hex}.npz")
            try:
                np.savez(aside, **chunk._asdict())
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        return chunk
