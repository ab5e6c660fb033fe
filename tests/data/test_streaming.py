"""A ring of windows gives training what a whole store would, in less room."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.harvest import Harvester, HarvestSettings, harvest
from crosslace.data.harvest.streaming import RingSource, open_streaming
from crosslace.data.layout.place import Place
from crosslace.data.models.language_model import LanguageModel
from crosslace.data.store.store import ActivationStore
from crosslace.data.text.corpus import TokenSequence
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = HarvestSettings(
    tokens="20000",
    shuffle_rows=2048,
    batch_tokens=1024,
    sample_tokens=2000,
    block_rows=64,
    shard_rows=1024,
    dtype="float32",
)
BATCH = 256


class RandomText:
    name = fingerprint = "random"

    def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        for document in range(1000 if split == "train" else 60):
            tokens = torch.randint(1, 200, (32,), generator=generator)
            yield TokenSequence(tokens, torch.full((32,), document))
            if limit_tokens and 32 * (document + 1) >= limit_tokens:
                return


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LanguageModel(LlamaForCausalLM(config), None, "tiny")


def streaming(lm, path: Path, budget: str = "3MB", index: int = 0, count: int = 1) -> ActivationStore:
    settings = replace(SETTINGS, path=str(path), mode="streaming", budget=budget)
    return open_streaming(Harvester(lm, RandomText(), settings), process_index=index, process_count=count)[0]


@pytest.fixture(scope="module")
def disk(lm, tmp_path_factory) -> ActivationStore:
    path = tmp_path_factory.mktemp("disk") / "s"
    harvest(lm, RandomText(), replace(SETTINGS, path=str(path)))
    return ActivationStore.open(path)


def ring(store: ActivationStore) -> RingSource:
    assert isinstance(store.source, RingSource)
    return store.source


def rows(batch) -> list[tuple[int, int]]:
    return list(zip(batch.document.tolist(), batch.position.tolist()))


def weight(path: Path) -> int:
    return sum(Place(str(path)).sizes("ring").values())  # files come and go meanwhile


def test_same_rows_as_a_full_store_none_twice(lm, disk, tmp_path):
    store = streaming(lm, tmp_path)
    assert len(store) == len(disk) and ring(store).capacity < ring(store).count
    expected = {row: x for b in disk.rows_in_order(1000) for row, x in zip(rows(b), b.resid.unbind())}
    steps = store.steps_per_epoch(BATCH)
    seen, heaviest = [], 0
    with store.loader(BATCH, steps=2 * steps) as loader:
        for batch in loader:
            seen.append(rows(batch))
            heaviest = max(heaviest, weight(tmp_path))
            assert torch.equal(batch.resid[0], expected[seen[-1][0]])
    tails = [rows(store.batch(epoch, steps, BATCH)) for epoch in (0, 1)]
    halves = seen[:steps], seen[steps:]
    epochs = [[row for batch in [*half, tail] for row in batch] for half, tail in zip(halves, tails)]
    for epoch in epochs:
        assert len(epoch) == len(expected) and set(epoch) == set(expected)
    assert epochs[0] != epochs[1]
    assert heaviest < 3_100_000  # the ring, and the notes beside it
    store.close()


def test_goes_on_with_the_very_next_row(lm, tmp_path):
    first = streaming(lm, tmp_path)
    with first.loader(BATCH, steps=60) as loader:
        uninterrupted = [(rows(batch), batch.mlp_out.clone()) for batch in loader]
    first.close()
    again = streaming(lm, tmp_path)
    with again.loader(BATCH, start_step=41, steps=19) as loader:
        for (expected, mlp_out), batch in zip(uninterrupted[41:], loader, strict=True):
            assert rows(batch) == expected and torch.equal(batch.mlp_out, mlp_out)
    again.close()


def test_processes_share_a_ring(lm, tmp_path):
    stores = []
    alone = streaming(lm, tmp_path / "alone")
    stores = [streaming(lm, tmp_path / "ring", "4MB", index, 2) for index in range(2)]
    loaders = [store.loader(BATCH, steps=40, rank=rank, world=2) for rank, store in enumerate(stores)]
    for step, (left, right) in enumerate(zip(*loaders, strict=True)):
        epoch, within = divmod(step, alone.steps_per_epoch(BATCH))
        assert rows(left) + rows(right) == rows(alone.batch(epoch, within, BATCH))
    for store in [alone, *stores]:
        store.close()


def test_refusals(lm, tmp_path):
    with pytest.raises(SettingsError, match=r"store.budget is too small: a window of \d+ rows weighs"):
        streaming(lm, tmp_path / "a", "1MB")
    held = streaming(lm, tmp_path / "b")
    with pytest.raises(UserError, match="another process is writing"):
        streaming(lm, tmp_path / "b")
    held.close()
    other = replace(SETTINGS, path=str(tmp_path / "b"), mode="streaming", budget="3MB", seed=5)
    with pytest.raises(UserError, match=r"seed=0 and this would be seed=5|ring of other settings"):
        open_streaming(Harvester(lm, RandomText(), other))


def test_failure_of_the_harvest_reaches_the_reader(lm, tmp_path, monkeypatch):
    store = streaming(lm, tmp_path)

    def fail(*args, **kwargs):
        raise UserError("the corpus is gone")

    monkeypatch.setattr(ring(store).harvester, "fill", fail)
    with pytest.raises(UserError, match="the corpus is gone"):
        for step in range(store.steps_per_epoch(BATCH)):
            store.batch(0, step, BATCH)
    store.close()
