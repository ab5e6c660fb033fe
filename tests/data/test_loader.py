"""The loader's way to a GPU, with stand-ins for CUDA that note who did what on which stream."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from crosslace.data.layout.codecs import Int8Rows, channel_scale, quantise
from crosslace.data.store.batch import Batch
from crosslace.data.store.loader import Loader


class Rows(torch.Tensor):
    """Numbers that note where they are taken, and which streams they are kept for."""

    notes: ClassVar[list] = []

    def to(self, *where, **how):
        if not isinstance(where[0], torch.device):
            return super().to(*where, **how)
        self.notes.append(("copy", str(self.dtype), str(where[0]), how.get("non_blocking", False), cuda.current))
        return self.clone()

    def record_stream(self, stream):
        self.notes.append(("keep", stream))


cuda = SimpleNamespace(current="main", streams=[])


@pytest.fixture
def notes(monkeypatch) -> list:
    seen = Rows.notes = []

    def stream(device):
        cuda.streams.append(name := f"copy {len(cuda.streams)}")
        return name

    @contextmanager
    def on(name):
        before, cuda.current = cuda.current, name
        yield
        cuda.current = before

    class Event:
        def record(self, name):
            seen.append(("event", name))

        def synchronize(self):
            seen.append(("over",))

    cuda.current, cuda.streams = "main", []
    fakes = {"Stream": stream, "stream": on, "device": lambda _: on(cuda.current), "Event": Event}
    fakes["current_stream"] = lambda device: "main"
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("crosslace.data.store.loader._THREADS", 1)
    return seen


def test_batches_go_over_one_copy_stream_and_are_kept_for_the_reader(notes):
    fetch = lambda step: Batch(
        {"resid": torch.full((2, 1, 3), float(step)).as_subclass(Rows)}, lambda name: torch.zeros(2)
    )
    with Loader(fetch, 0, 5, 2, torch.device("cuda", 1), None) as loader:
        found = [float(batch.resid[0, 0, 0]) for batch in loader]
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0]
    copies = [note for note in notes if note[0] == "copy"]
    assert copies == [("copy", "torch.float32", "cuda:1", True, "copy 0")] * 5 and cuda.streams == ["copy 0"]
    assert [note for note in notes if note[0] == "keep"] == [("keep", "main")] * 5
    notes = [note for note in notes if note[0] != "keep"]  # that is the reader's, at any time between
    for at in (i for i, note in enumerate(notes) if note[0] == "copy"):  # over before the batch is handed out
        assert notes[at + 1] == ("event", "copy 0") and ("over",) in notes[at + 1 : at + 4]


def test_int8_travels_as_it_is_and_becomes_numbers_there(notes):
    x = torch.randn(4, 2, 8)
    channel = channel_scale(x)
    stored = [torch.from_numpy(part) for part in quantise(x, channel)]
    rows = Int8Rows(*(part.as_subclass(Rows) for part in (*stored, channel)))
    with Loader(
        lambda step: Batch({"resid": rows}, lambda name: channel), 0, 1, 1, torch.device("cuda"), None
    ) as loader:
        (batch,) = loader
    assert [note[1] for note in notes if note[0] == "copy"] == ["torch.int8", "torch.float16", "torch.float32"]
    assert torch.equal(torch.Tensor(batch.resid), Int8Rows(*stored, channel_scale=channel).to("cpu"))


def test_rows_for_a_gpu_are_read_into_pinned_memory(notes, monkeypatch):
    from crosslace.data.store import in_memory_store

    store = in_memory_store(torch.randn(64, 1, 4), torch.randn(64, 1, 4))
    asked = []
    read = store.source.read

    def noted(spans, sites, places, pin=False):
        asked.append(pin)
        batch = read(spans, sites, places)
        return Batch({site: x.as_subclass(Rows) for site, x in batch.sites.items()}, batch.column)

    monkeypatch.setattr(store.source, "read", noted)
    with store.loader(16, steps=2, device="cuda") as loader:
        assert len(list(loader)) == 2
    assert asked == [True, True]
