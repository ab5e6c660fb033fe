"""The world's tokenizer: words of questions and answers are whole, names of cities are pieces.

A Unigram vocabulary (`tokenizers`) in which every word of a template or of an answer is one token, and a city is two
to four pieces such as `▁Dal las`. A piece is only kept when cities of at least two states use it, so no token of a
city tells the state: the model has to put the pieces together. That also holds for whole words: one that names cities
of a single state is cut like any other name. All pieces weigh about the same, so a word is cut into as few as
possible.
"""

from collections import defaultdict
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789áéíóúñüàâçèêëîïôùûœÁÉÍÓÚÑÀÂÇÈÊÔ.,;:!?'\"()-+=/"
)
SPACE = "▁"
LETTERS = frozenset(prefix + c for c in CHARACTERS for prefix in ("", SPACE)) | {SPACE}
LONGEST_PIECE = 7
MIN_OWNERS = 2


def _model(scores: dict[str, float]) -> Tokenizer:
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + sorted(scores.items())
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return tokenizer


def _is_spelt(word: str) -> bool:
    """Initials such as `TX` or `NWS` are letters, so that one rule spells them all."""
    return len(word) > 1 and word.isupper()


def build_scores(words: Iterable[str], names: dict[str, list[str]]) -> dict[str, float]:
    """Pieces and their scores: whole `words`, and parts of the `names` (owner -> its names) that several owners use."""
    owners: dict[str, set[str]] = defaultdict(set)
    name_words = sorted({(owner, SPACE + word) for owner in names for name in names[owner] for word in name.split()})
    for owner, word in name_words:
        for start in range(len(word)):
            for end in range(start + 2, min(start + LONGEST_PIECE, len(word)) + 1):
                owners[word[start:end]].add(owner)
    kept = {piece for piece, held_by in owners.items() if len(held_by) >= MIN_OWNERS}
    kept |= {SPACE + word for word in words if not _is_spelt(word)}
    kept -= {SPACE + name for owner in names for name in names[owner]}  # no city is a single token
    kept |= LETTERS
    while True:  # taking one piece away changes who uses the others
        scores = {piece: len(owners[piece]) / 100 - 10 for piece in kept}  # ties go to the piece that tells least
        tokenizer = _model(scores)
        used: dict[str, set[str]] = defaultdict(set)
        for owner, word in name_words:
            for piece in tokenizer.encode(word[1:], add_special_tokens=False).tokens:
                used[piece].add(owner)
        lone = {piece for piece, held_by in used.items() if len(held_by) < MIN_OWNERS} - LETTERS
        if not lone:
            break
        longest = sorted(lone, key=lambda piece: (-len(piece), piece))
        kept -= set(longest[: len(lone) // 3 + 1])
    spelling = {piece for word in words for piece in tokenizer.encode(word, add_special_tokens=False).tokens}
    return {piece: scores[piece] for piece in LETTERS | spelling | set(used)}


def build_tokenizer(words: Iterable[str], names: dict[str, list[str]], context_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` loads it; it puts <bos> first and never adds <eos>."""
    tokenizer = _model(build_scores(sorted(set(words)), names))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=context_length,
    )
