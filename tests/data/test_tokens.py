"""Tokens are made once for all processes and for the next time, and a model can write its own text."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.text import tokens
from crosslace.data.text.corpus import Corpus, load_corpus
from crosslace.data.text.dataset import DatasetSettings, Document, TextSource
from crosslace.data.text.sampled import BATCH_TOKENS, sample
from crosslace.data.worlds.stdlib import make_tokenizer

TEXTS = [f"document {i}: " + "the quick brown fox " * (i % 7) for i in range(700)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS, 400, 64)


class Counting:
    """A text source that counts how often a document is opened, and a tokenizer that is asked."""

    def __init__(self, monkeypatch):
        self.encoded, encode = 0, tokens.encode
        self.lock = threading.Lock()

        def counted(tokenizer, texts):
            with self.lock:
                self.encoded += len(texts)
            return encode(tokenizer, texts)

        monkeypatch.setattr(tokens, "encode", counted)

    def documents(self):
        for index, text in enumerate(TEXTS):
            yield Document(index, text, index % 10 == 0)


def corpus_of(source, tokenizer, folder) -> Corpus:
    return Corpus(TextSource(source.documents, "x"), DatasetSettings(name="x", sequence_length=32), tokenizer, folder)


def test_many_threads_give_what_one_text_at_a_time_does(tokenizer):
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert tokens.encode(tokenizer, TEXTS) == plain


def test_tokens_are_made_once_for_all_readers(tokenizer, tmp_path, monkeypatch):
    """Four readers at a time, one that was stopped, and one that comes later: each document is tokenized once."""
    source = Counting(monkeypatch)
    expected = [s.tokens for s in corpus_of(source, tokenizer, None).sequences()]
    source.encoded = 0
    list(islice(corpus_of(source, tokenizer, tmp_path).sequences(), 3))
    assert 0 < source.encoded < 200
    found: list[list[torch.Tensor]] = [[] for _ in range(4)]

    def read(place: int) -> None:
        found[place] += [s.tokens for s in corpus_of(source, tokenizer, tmp_path).sequences()]

    threads = [threading.Thread(target=read, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.encoded == 630
    for sequences in found:
        assert all(torch.equal(a, b) for a, b in zip(sequences, expected, strict=True))
    assert len(list(corpus_of(source, tokenizer, tmp_path).sequences("held_out"))) > 5 and source.encoded == 700


def test_kept_tokens_that_are_damaged_or_cannot_be_kept_are_made_again(tokenizer, tmp_path, monkeypatch):
    source = Counting(monkeypatch)
    expected = [s.tokens for s in corpus_of(source, tokenizer, tmp_path).sequences()]
    second = sorted(tmp_path.rglob("1.npz"))[0]
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    source.encoded = 0
    again = [s.tokens for s in corpus_of(source, tokenizer, tmp_path).sequences()]
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)) and 64 < source.encoded < 300
    (tmp_path / "file").write_text("")
    nowhere = [s.tokens for s in corpus_of(source, tokenizer, tmp_path / "file").sequences()]
    assert all(torch.equal(a, b) for a, b in zip(nowhere, expected, strict=True))


def test_a_sampled_text_is_what_the_model_would_say(make_tiny):
    """Its probabilities, counted over many draws of the first tokens; the same with and without a cache of keys."""
    lm = make_tiny("llama", torch.float32)
    chunk = sample(lm, 1, 8, 0, 0)
    rows = BATCH_TOKENS // 8
    assert len(chunk.documents) == rows and chunk.documents[0] == 0
    firsts = np.array([ids[0] if len(ids) else 2 for _, ids in chunk.each()])  # 2 ends texts
    with torch.inference_mode():
        chances = lm.model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1)
    counted = np.bincount(firsts, minlength=len(chances)) / rows
    spread = (chances * (1 - chances) / rows).sqrt().numpy()
    assert (np.abs(counted - chances.numpy()) < 5 * spread + 1e-9).all()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(7, rows, 1, generator=generator, dtype=torch.float64)
    for row in range(20):  # the plain way: the whole text again for each token
        text = [1]
        for step in range(7):
            with torch.inference_mode():
                steps = lm.model(torch.tensor([text])).logits[0, -1].double().softmax(-1).cumsum(-1)
            text.append(int(torch.searchsorted(steps, drawn[step, row] * steps[-1])))
            if text[-1] in lm.end_tokens:
                break
        ids = list(chunk.each())[row][1].tolist()
        assert ids == [token for token in text[1:] if token not in lm.end_tokens]


def test_sampled_text_is_kept_and_goes_on(make_tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path))
    lm = make_tiny("llama", torch.float32)
    lm.tokenizer = tokenizer
    settings = DatasetSettings(name="sampled", sequence_length=16, held_out=0.2)
    first = [s.tokens for s in load_corpus(settings, tokenizer, lm).sequences(limit_tokens=2000)]
    assert all(len(s) <= 16 and s[0] == tokenizer.bos_token_id for s in first)
    files = sorted(tmp_path.rglob("sampled*/*.npz"))
    assert len(files) == 1
    monkeypatch.setattr("crosslace.data.text.sampled.sample", lambda *args: 1 / 0)  # nothing is written again
    again = [s.tokens for s in load_corpus(settings, tokenizer, lm).sequences(limit_tokens=2000)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(UserError, match="a language model writes"):
        load_corpus(settings, tokenizer)
