"""`dataset=sampled`: text that the language model writes itself, for models whose training text nobody has.

Each document begins with the token that begins texts and goes on by the model's own probabilities, at temperature 1,
until it ends the text or the sequence is full. Documents come in batches, each a function of the model, the seed and
its number, which are kept in the cache.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch

from ..cache import cache_root
from ..device import in_float64
from ..errors import UserError
from ..models import LanguageModel
from ..worlds import is_held_out
from .dataset import DatasetSettings, Document, TextSource
from .tokens import Chunk, kept

BATCH_TOKENS = 16384
"""Tokens that are written side by side, those of all documents of a batch."""


def open_sampled(settings: DatasetSettings, lm: LanguageModel | None) -> TextSource:
    """The documents, without end."""
    if lm is None:
        raise UserError("dataset.name=sampled is text that a language model writes, and here none is at hand")
    first = lm.bos if lm.bos is not None else min(lm.end_tokens, default=None)
    if first is None:
        raise UserError("dataset.name=sampled needs a token that begins texts, and this model's tokenizer has none")
    length = min(settings.sequence_length, lm.context_length)
    identity = f"sampled/{lm.fingerprint}/{str(lm.dtype)[6:]}/{first}/{length}/{settings.seed}"
    folder = cache_root() / identity.replace("/", "-")
    # its own modules over the same weights: text is written beside passes whose sites are read
    twin = lm.twin()

    def documents() -> Iterator[Document]:
        for number in count():
            batch = kept(folder, number, lambda n=number: sample(twin, first, length, settings.seed, n))
            for index, ids in batch.each():
                yield Document(index, ids.tolist(), is_held_out(index, settings.seed, settings.held_out))

    return TextSource(documents, identity, short=True)


@torch.inference_mode()
def sample(lm: LanguageModel, first: int, length: int, seed: int, number: int) -> Chunk:
    """One batch of documents, without their first token."""
    rows = max(1, BATCH_TOKENS // length)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    drawn = torch.rand(length - 1, rows, 1, generator=generator, dtype=torch.float64)
    ends = torch.tensor(sorted(lm.end_tokens), device=lm.device)
    last = torch.full((rows, 1), first, device=lm.device)
    ended = torch.zeros(rows, 1, dtype=torch.bool, device=lm.device)
    past: Any = None
    written, going = [], []
    for step in range(length - 1):
        out = lm.model(input_ids=last, past_key_values=past, use_cache=True)
        past = out.past_key_values
        chances = in_float64(out.logits[:, -1]).softmax(-1).cumsum(-1)
        spot = drawn[step].to(chances.device) * chances[:, -1:]
        last = torch.searchsorted(chances, spot).clamp(max=chances.shape[-1] - 1).to(lm.device)
        ended = ended | torch.isin(last, ends)
        written.append(last)
        going.append(~ended)
        if step % 16 == 15 and bool(ended.all()):
            break
    if not bool(out.logits.isfinite().all()):
        raise UserError(f"the model writes no text in {lm.dtype}: its logits are not finite; set model.dtype=float32")
    ids, alive = torch.cat(written, 1).cpu(), torch.cat(going, 1).cpu()
    return Chunk(
        ids[alive].numpy().astype(np.int32),
        number * rows + np.arange(rows),
        alive.sum(1).numpy(),
        np.array((number + 1) * rows),
    )
