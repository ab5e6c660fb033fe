"""A small sandwich-norm model with attention sinks planted in its weights, and text that has their token in it."""

from collections.abc import Iterator

import torch
from crosslace.data.models.language_model import LanguageModel
from crosslace.data.text import TokenSequence

from .tiny_models import VOCABULARY, make_tiny

SINK = VOCABULARY - 2
"""The token at which the residual stream is huge."""


class RandomText:
    """Documents of 5 to 39 random tokens, one a sequence; the sinks' token is one in 150, from a document on."""

    name = fingerprint = "planted"

    def __init__(self, documents: int = 900, sinks_from: int = 0, share: float = 1 / 150):
        self.documents, self.sinks_from, self.share = documents, sinks_from, share

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        given = 0
        for document in range(self.documents if split == "train" else 200):
            length = int(torch.randint(5, 40, (1,), generator=generator))
            tokens = torch.randint(3, SINK, (length,), generator=generator)
            sinks = torch.rand(length, generator=generator) < self.share
            if document >= self.sinks_from:
                tokens[sinks] = SINK
            yield TokenSequence(tokens, torch.full((length,), document))
            given += length
            if limit_tokens and given >= limit_tokens:
                return


def sandwich_model(family: str = "gemma2", seed: int = 0, **changes) -> LanguageModel:
    """Norms before and after attention and MLP, gains of 1 + w."""
    return make_tiny(family, torch.float32, seed, max_position_embeddings=64, **changes)


def with_sinks(lm: LanguageModel, times: float) -> LanguageModel:
    """The model with one token's embedding so many times as long as the usual one, in a direction of its own."""
    weight = lm.model.get_input_embeddings().weight.data
    usual = weight.norm(dim=1).median()
    direction = torch.nn.functional.normalize(
        torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(5)), dim=0
    )
    weight[SINK] = direction * usual * times
    return lm
