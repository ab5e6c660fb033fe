"""A store that others read: every dtype by Zarr's readers and xarray, a copy that another program has cut anew; and
what a store does as it ages: growing, joining, moving, damage, disks without locks."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from crosslace.data import memory
from crosslace.data.errors import UserError
from crosslace.data.layout import lock as locks
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.window import Window
from crosslace.data.store.writer import StoreWriter, write_store
from zarr.codecs import ZstdCodec

N, L, D = 900, 2, 40
SITES = ("resid", "mlp_out")
DTYPES = ("float32", "float16", "bfloat16", "int8")


def rows(count: int = N, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(count, L, D, generator=generator) for site in SITES}


def layout(dtype: str = "float32") -> StoreLayout:
    return StoreLayout(SITES, (2, 5), D, dtype, block_rows=32, shard_rows=128)


def make(
    path: Any, dtype: str = "float32", content: dict[str, torch.Tensor] | None = None, held_out: int = 100, **more
):
    content = content or rows()
    number = torch.arange(len(content["resid"]))
    write_store(path, content, number, number, number, layout(dtype), held_out=held_out, shuffle_rows=256, **more)
    return path


def decoded(group: Any, site: str, dtype: str) -> torch.Tensor:
    """What the array's own attribute says that its numbers are."""
    stored = np.asarray(group[site][...])
    says = group[site].attrs["numbers"]
    assert says.startswith(dtype)
    if dtype == "bfloat16":
        return torch.from_numpy(stored).view(torch.bfloat16).float()
    if dtype == "int8":
        scale = np.repeat(np.asarray(group[f"{site}_scale"][...], np.float32), 32, -1)[..., :D]
        return torch.from_numpy(stored * scale * np.asarray(group[f"{site}_channel_scale"][...]))
    return torch.from_numpy(stored).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_foreign_readers_open_every_dtype(tmp_path, dtype):
    path, content = make(tmp_path / "s", dtype), rows()
    own = torch.cat([batch.resid.float() for batch in ActivationStore.open(path).rows_in_order(500)])
    for pipeline in ("zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"):
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            group: Any = zarr.open_group(str(path), mode="r")["train"]
            torch.testing.assert_close(decoded(group, "resid", dtype), own, rtol=1e-6, atol=1e-6)
    mean = torch.from_numpy(np.asarray(group["resid_mean"][...])).float()
    torch.testing.assert_close(mean, content["resid"][: N - 100].mean(0), atol=1e-5, rtol=1e-4)
    facts = json.loads((path / "zarr.json").read_text())["attributes"]
    assert facts["version"] == 2 and facts["complete"] and "statistics" not in facts


@pytest.mark.parametrize("dtype", DTYPES)
def test_xarray_opens_the_whole_tree(tmp_path, dtype):
    xarray = pytest.importorskip("xarray")
    path = make(tmp_path / "s", dtype)
    tree = xarray.open_datatree(path, engine="zarr", consolidated=False)
    for split, count in (("train", N - 100), ("held_out", 100)):
        assert tree[split]["resid"].sizes["row"] == count
        assert tree[split]["layer"].values.tolist() == [2, 5]
    token = tree["train"]["token"].values
    if dtype == "float32":
        np.testing.assert_array_equal(tree["train"]["mlp_out"].values, rows()["mlp_out"].numpy()[token])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensorstore_opens_it(tmp_path, dtype):
    tensorstore = pytest.importorskip("tensorstore")
    path = make(tmp_path / "s", dtype)
    kvstore = {"driver": "file", "path": str(path / "train" / "resid")}
    found = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    own = torch.cat([batch.resid for batch in ActivationStore.open(path).rows_in_order(500)])
    np.testing.assert_array_equal(np.asarray(found), own.numpy())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copy_that_was_compressed_gives_the_same_batches(tmp_path, dtype):
    path = make(tmp_path / "s", dtype)
    before = ActivationStore.open(path)
    expected = [before.batch(1, step, 200) for step in range(4)]
    group: Any = zarr.open_group(str(path / "train"), mode="a")
    values, attributes = np.asarray(group["resid"][...]), dict(group["resid"].attrs)
    options = {"shape": values.shape, "dtype": values.dtype, "chunks": (100, L, D), "attributes": attributes}
    group.create_array("resid", compressors=ZstdCodec(), overwrite=True, **options)[...] = values
    opened = ActivationStore.open(path)
    for step, batch in enumerate(expected):
        again = opened.batch(1, step, 200)
        assert torch.equal(again.resid, batch.resid) and torch.equal(again.mlp_out, batch.mlp_out)
        assert torch.equal(again.token, batch.token)


def fill(
    writer: StoreWriter, content: dict[str, torch.Tensor], wanted: int | None = None, split: str = "train"
) -> dict[str, int]:
    """A split of a store, window by window; the first window comes short where `wanted` says its rows."""
    begin = 0
    sizes = [size for stage in writer.sizes(split) for size in stage]
    for number, size in enumerate(sizes):
        if not writer.done(split, number):
            window = writer.window(split, number, size)
            count = size if wanted is None or number else wanted
            part = {site: x[begin : begin + count] for site, x in content.items()}
            where = torch.arange(begin, begin + count)
            window.append(part, dict.fromkeys(("token", "position", "document"), where))
            writer.write(split, number, window)
        begin += size
    return {split: len(sizes)}


def test_a_short_window_is_no_error(tmp_path):
    """Readers take its length from the store; the rows after it are no rows."""
    content = rows(700)
    with StoreWriter(tmp_path / "s", layout(), {"seed": 0}, {"train": 700}, 256) as writer:
        assert writer.finish(fill(writer, content, wanted=150), {})
    store = ActivationStore.open(tmp_path / "s")
    assert len(store) == 700 - 256 + 150
    seen = torch.cat([batch.token for batch in store.rows_in_order(100)]).tolist()
    assert sorted(seen) == [*range(150), *range(256, 700)]
    epoch = [store.batch(3, step, 100) for step in range(store.steps_per_epoch(100) + 1)]
    assert sorted(token for batch in epoch for token in batch.token.tolist()) == sorted(seen)
    for batch in epoch:
        assert torch.equal(batch.resid, content["resid"][batch.token.long()])
    torch.testing.assert_close(store.statistics.mean["resid"], content["resid"][sorted(seen)].mean(0))
    store.verify()
    group: Any = zarr.open_group(str(tmp_path / "s" / "train"), mode="r")
    assert (np.asarray(group["token"][150:256]) == -1).all()


def test_a_whole_store_grows(tmp_path):
    content, path = rows(900), tmp_path / "s"

    def write(count: int) -> bool:
        with StoreWriter(path, layout(), {"seed": 0}, {"train": count}, 256) as writer:
            return writer.complete or writer.finish(fill(writer, content), {})

    assert write(300) and len(ActivationStore.open(path)) == 300
    first = {p.name: p.read_bytes() for p in (path / "train/resid/c/0/0").iterdir()}
    assert write(900) and write(900) and write(300)  # fewer rows than there are: nothing to do
    store = ActivationStore.open(path)
    assert len(store) == 900 and store.attributes["tokens"] == {"train": [300, 600]}
    assert first == {p.name: p.read_bytes() for p in (path / "train/resid/c/0/0").iterdir()}
    seen = torch.cat([batch.token for batch in store.rows_in_order(128)])
    assert sorted(seen.tolist()) == list(range(900))
    torch.testing.assert_close(store.statistics.mean["resid"], content["resid"].mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(store.statistics.mean_square["resid"], content["resid"].square().sum(-1).mean(0))


def test_held_out_rows_stay_as_they_are_when_a_store_grows(tmp_path):
    path, content = tmp_path / "s", rows(900)

    def write(held_out: int, train: int) -> None:
        asked = {"train": train, "held_out": held_out}
        with StoreWriter(path, layout(), {"seed": 0}, asked, 256) as writer:
            assert writer.finish(fill(writer, content) | fill(writer, content, split="held_out"), {})

    def files() -> list[tuple[int, int]]:
        found = (file.stat() for file in sorted((path / "held_out").rglob("*")) if file.is_file())
        return [(file.st_ino, file.st_mtime_ns) for file in found]

    write(100, 300)
    before = files()
    write(100, 900)
    assert before and files() == before and len(ActivationStore.open(path)) == 900
    write(400, 900)
    assert files() != before and len(ActivationStore.open(path, "held_out")) == 400


def test_a_growth_that_was_cut_off_goes_on(tmp_path):
    content = rows(900)
    for name, cut_off in (("whole", False), ("cut", True)):
        path = tmp_path / name
        with StoreWriter(path, layout(), {"seed": 0}, {"train": 300}, 256) as writer:
            writer.finish(fill(writer, content), {})
        if cut_off:
            with StoreWriter(path, layout(), {"seed": 0}, {"train": 900}, 256) as writer:
                fill(writer, content)
            with pytest.raises(UserError, match="is incomplete"):
                ActivationStore.open(path)
            with pytest.raises(UserError, match=r"not whole yet: finish it with store\.tokens=900"):
                StoreWriter(path, layout(), {"seed": 0}, {"train": 2000}, 256).__enter__()
        with StoreWriter(path, layout(), {"seed": 0}, {"train": 900}, 256) as writer:
            assert writer.finish(fill(writer, content), {})
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    assert files and all((tmp_path / "whole" / p).read_bytes() == (tmp_path / "cut" / p).read_bytes() for p in files)


def test_stores_of_one_model_are_read_as_one(tmp_path):
    a, b = rows(500), rows(300, seed=1)
    make(tmp_path / "a", "float16", a, held_out=0)
    make(tmp_path / "b", "int8", b, held_out=0)
    store = ActivationStore.open(f"{tmp_path}/a + {tmp_path}/b")
    assert len(store) == 800 and len(ActivationStore.open([tmp_path / "a", tmp_path / "b"])) == 800
    both = torch.cat([a["resid"], b["resid"]])
    batches = [store.batch(0, step, 128) for step in range(store.steps_per_epoch(128) + 1)]
    found = torch.cat([batch.resid.float() for batch in batches])
    distance = torch.cdist(found.flatten(1), both.flatten(1)).min(1)
    assert sorted(distance.indices.tolist()) == list(range(800)) and distance.values.max() < 0.2
    for batch in batches:  # columns stay beside their rows
        nearest = torch.cdist(batch.resid.float().flatten(1), both.flatten(1)).argmin(1)
        assert torch.equal(nearest % 500, batch.token.long())
    torch.testing.assert_close(store.statistics.mean["resid"], both.mean(0), atol=1e-5, rtol=1e-4)
    other = replace(layout(), layers=(1, 2))
    number = torch.arange(500)
    write_store(tmp_path / "d", a, number, number, number, other)
    with pytest.raises(UserError, match="cannot be read as one: their layers differ"):
        ActivationStore.open([tmp_path / "a", tmp_path / "d"])


def test_a_store_moves_and_an_old_one_is_refused(tmp_path):
    make(tmp_path / "s")
    expected = ActivationStore.open(tmp_path / "s").batch(0, 0, 100)
    (tmp_path / "s").rename(tmp_path / "moved")
    assert torch.equal(ActivationStore.open(tmp_path / "moved").batch(0, 0, 100).resid, expected.resid)
    facts = {"format": "crosslace-activations", "version": 1, "complete": True, "model": {"name": "gpt2"}}
    (tmp_path / "old").mkdir()
    old = {"zarr_format": 3, "node_type": "group", "attributes": facts}
    (tmp_path / "old" / "zarr.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"version 1 .* harvest it anew with `crosslace cache model=gpt2"):
        ActivationStore.open(tmp_path / "old")


def test_a_store_that_goes_away_while_it_is_read_is_said(tmp_path):
    store = ActivationStore.open(make(tmp_path / "s"))
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"shard .*train/resid/c/\d/0/0 is missing or cut short"):
        store.batch(0, 0, 100)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_disks_without_locks_or_links(tmp_path, monkeypatch, code):
    """A note stands for the lock: it keeps a second writer out, and one that is old was left by a dead writer."""

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    with StoreWriter(tmp_path / "s", layout(), {"seed": 0}, {"train": 9}) as writer:
        assert writer.agree("sample", lambda: 1) == 1 == writer.agree("sample", lambda: 2)
        with pytest.raises(UserError, match="another process is writing"):
            StoreWriter(tmp_path / "s", layout(), {"seed": 0}, {"train": 9}).__enter__()
    make(tmp_path / "s")
    assert len(ActivationStore.open(tmp_path / "s")) == N - 100
    note = tmp_path / "t" / ".progress" / "lock-0.note"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"id": "dead", "time": 0}))
    make(tmp_path / "t")


def test_a_disk_that_may_not_be_written_to(tmp_path, monkeypatch):
    def refuse(*args: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.StoreLock, "take", refuse)
    with pytest.raises(UserError, match=r"cannot be written to .*choose another store\.path"):
        make(tmp_path / "s")


def test_windows_wait_where_the_user_says(tmp_path, monkeypatch):
    waited: list[Path | None] = []
    room = Window._room

    def watched(self: Window, *args: Any) -> Any:
        waited.append(self.scratch)
        return room(self, *args)

    monkeypatch.setattr(Window, "_room", watched)
    make(tmp_path / "s", memory=1, scratch=str(tmp_path / "fast"))
    assert waited and all(path is not None and path.is_relative_to(tmp_path / "fast") for path in waited)
    assert not list((tmp_path / "fast").iterdir())
    make(tmp_path / "t", memory=1)
    assert waited[-1] is not None and waited[-1].is_relative_to(tmp_path / "t" / ".progress")


def test_memory_is_what_the_job_may_take(tmp_path, monkeypatch):
    whole = memory.host_memory()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert memory.host_memory() == min(whole, 2 << 30)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert memory.host_memory() == min(whole, 1 << 30)
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_groups", lambda: ["0::/job/step"])
    assert memory.host_memory() == 3 << 20
