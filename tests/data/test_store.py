"""The store: its layout, its batches, its dtypes, and what it says about damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import zarr
from crosslace.data.errors import UserError
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.layout.place import Place
from crosslace.data.store.batch import Batch
from crosslace.data.store.store import ActivationStore, in_memory_store
from crosslace.data.store.writer import StoreWriter, write_store

N, L, D = 3003, 3, 40
SITES = ("resid", "mlp_out")


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {site: torch.randn(N, L, D, generator=generator) for site in SITES}


def layout(dtype: str = "float32", **options) -> StoreLayout:
    return StoreLayout(SITES, (2, 5, 7), D, dtype, **{"block_rows": 32, "shard_rows": 512} | options)


def make(path, rows, dtype="float32", held_out=0, **options):
    number = torch.arange(N)
    write_store(
        path, rows, number, number % 30, number // 30, layout(dtype), held_out=held_out, shuffle_rows=1024, **options
    )
    return path


@pytest.fixture(scope="module")
def store_path(rows, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("store") / "s", rows, held_out=303)


@pytest.fixture
def copy(store_path, tmp_path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "s"))


@pytest.fixture(params=["disk", "memory"])
def store(request, store_path, rows) -> ActivationStore:
    if request.param == "disk":
        return ActivationStore.open(store_path)
    number = torch.arange(2700)
    return in_memory_store(
        rows["resid"][:2700], rows["mlp_out"][:2700], number, number % 30, number // 30, layers=[2, 5, 7]
    )


def test_is_an_ordinary_zarr_group(store_path, rows):
    group: Any = zarr.open_group(str(store_path), mode="r")
    token = np.asarray(group["train/token"][:])
    for site in SITES:
        assert group["train"][site].shape == (2700, L, D)
        np.testing.assert_array_equal(group["train"][site][:], rows[site].numpy()[token])
        np.testing.assert_array_equal(group["train"][site][100:900:7, 1], rows[site].numpy()[token[100:900:7], 1])
    assert sorted(token) == list(range(2700))
    assert group["held_out"]["resid"].shape == (303, L, D)
    assert group.attrs["complete"] and group.attrs["format"] == "crosslace-activations"


def test_zarrs_reads_it(store_path, rows):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group: Any = zarr.open_group(str(store_path), mode="r")
        np.testing.assert_array_equal(
            group["train/mlp_out"][:], rows["mlp_out"].numpy()[np.asarray(group["train/token"][:])]
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("place", ["disk", "memory://", "local://"])
def test_round_trip(rows, tmp_path, dtype, place):
    path = {"disk": str(tmp_path / "s"), "memory://": f"memory://{dtype}", "local://": f"local://{tmp_path}/s"}[place]
    make(path, rows, dtype, held_out=103)
    store = ActivationStore.open(path)
    assert (len(store), store.n_layers, store.d_model, store.layers) == (2900, L, D, [2, 5, 7])
    store.verify()
    allowed = {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-2}[dtype]
    for opened in (store, ActivationStore.open(path, "held_out")):
        for batch in opened.rows_in_order(500):
            for site in SITES:
                torch.testing.assert_close(
                    batch.sites[site].float(), rows[site][batch.token.long()], atol=allowed, rtol=allowed
                )
    if place == "memory://":
        fsspec.filesystem("memory").rm(f"/{dtype}", recursive=True)


def test_bfloat16_lies_as_its_bits(rows, tmp_path):
    make(tmp_path / "s", rows, "bfloat16")
    group: Any = zarr.open_group(str(tmp_path / "s"), mode="r")
    bits = torch.from_numpy(np.asarray(group["train/resid"][:])).view(torch.bfloat16)
    assert torch.equal(bits, rows["resid"].bfloat16()[torch.from_numpy(np.asarray(group["train/token"][:])).long()])


def test_int8_outlier_channel_costs_the_others_nothing(rows, tmp_path):
    def error(path: Path, content: dict[str, torch.Tensor]) -> float:
        make(path, content, "int8")
        total = count = 0.0
        for batch in ActivationStore.open(path).rows_in_order(1000):
            true = content["resid"][batch.token.long()]
            total += (batch.resid - true)[..., 1:].square().sum().item()
            count += true[..., 1:].square().sum().item()
        return total / count

    loud = {site: x.clone() for site, x in rows.items()}
    loud["resid"][..., 0] *= 40
    quiet_error = error(tmp_path / "a", rows)
    assert quiet_error < 1e-4
    assert error(tmp_path / "b", loud) == pytest.approx(quiet_error, rel=0.02)


def key(batch: Batch) -> list[int]:
    return (batch.document.long() * 30 + batch.position.long()).tolist()


def test_each_row_comes_once_an_epoch(store):
    for size in (64, 100, 999):
        steps = store.steps_per_epoch(size)
        batches = [store.batch(3, step, size) for step in range(steps)]
        assert all(len(batch) == size for batch in batches)
        seen = [row for batch in batches for row in key(batch)]
        if len(store) % size:
            seen += key(store.batch(3, steps, size))
        assert sorted(seen) == list(range(len(store)))


def test_batch_is_a_function_of_seed_epoch_step(store, rows):
    first = store.batch(1, 7, 64)
    again = store.batch(1, 7, 64)
    assert key(first) == key(again) != key(store.batch(2, 7, 64))
    assert torch.equal(first.resid, again.resid)
    torch.testing.assert_close(first.resid, rows["resid"][first.token.long()], rtol=0, atol=0)
    torch.testing.assert_close(first.y, rows["mlp_out"][first.token.long()], rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_a_batch(store, world):
    whole = store.batch(0, 5, 100)
    parts = [store.batch(0, 5, 100, rank=rank, world=world) for rank in range(world)]
    assert [row for part in parts for row in key(part)] == key(whole)
    assert torch.equal(torch.cat([part.resid for part in parts]), whole.resid)


def test_chosen_layers(store, store_path):
    whole = store.batch(0, 0, 50)
    some = store.batch(0, 0, 50, layers=[7, 2])
    assert torch.equal(some.resid, whole.resid[:, [2, 0]]) and torch.equal(some.mlp_out, whole.mlp_out[:, [2, 0]])
    with pytest.raises(UserError, match="no layer 3; it holds 2, 5, 7"):
        store.batch(0, 0, 50, layers=[3])
    narrow = ActivationStore.open(store_path, layers=[5])
    assert narrow.n_layers == 1 and narrow.batch(0, 0, 50).x.shape == (50, 1, D)
    assert torch.equal(narrow.statistics.mean["resid"], ActivationStore.open(store_path).statistics.mean["resid"][1:2])


def test_statistics(store, rows):
    statistics = store.statistics
    for site in SITES:
        torch.testing.assert_close(statistics.mean[site], rows[site][:2700].mean(0), atol=1e-5, rtol=1e-4)
        square = rows[site][:2700].square().sum(-1).mean(0)
        torch.testing.assert_close(statistics.mean_square[site], square, atol=1e-4, rtol=1e-4)
    assert statistics.rows == len(store)


def test_loader_goes_on_at_any_step(store):
    with store.loader(256, steps=25) as loader:
        all_batches = [(key(batch), batch.resid.clone()) for batch in loader]
        assert loader.stall_seconds > 0
    assert len(all_batches) == 25
    with store.loader(256, start_step=13, steps=12, dtype=torch.float64) as loader:
        for (rows_seen, resid), batch in zip(all_batches[13:], loader, strict=True):
            assert key(batch) == rows_seen
            assert torch.equal(batch.resid, resid.double())


def test_batches_do_not_share_memory_that_is_in_use(store_path):
    store = ActivationStore.open(store_path)
    with store.loader(256, steps=40, prefetch=8) as loader:
        held = [(batch, batch.resid.clone()) for batch in loader]
    assert all(torch.equal(batch.resid, resid) for batch, resid in held)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loader_on_a_device(store, rows):
    with store.loader(256, steps=30, device="cuda") as loader:
        for batch in loader:
            assert batch.resid.is_cuda
            assert torch.equal(batch.resid.cpu(), rows["resid"][batch.token.long().cpu()])


def test_rows_of_a_document_are_spread_as_by_chance(tmp_path):
    """How often two rows of one document meet in a batch, over several epochs, against chance."""
    n, per_document, size, epochs = 16384, 32, 128, 4
    number = torch.arange(n)
    one = torch.ones(n, 1, 1)
    small = StoreLayout(SITES, (0,), 1, "float32", block_rows=16, shard_rows=4096)
    write_store(tmp_path / "s", dict.fromkeys(SITES, one), number, number, number // per_document, small)
    store = ActivationStore.open(tmp_path / "s")
    meetings = 0
    for epoch in range(epochs):
        for step in range(n // size):
            document = store.batch(epoch, step, size).document
            meetings += int((document[:, None] == document).sum() - size) // 2
    expected = epochs * (n // size) * (size * (size - 1) / 2) * (per_document - 1) / (n - 1)
    # meetings inside a block come again in every epoch, so the count spreads more than that of independent pairs
    assert abs(meetings - expected) < 5 * np.sqrt(epochs * expected)


def test_damaged_chunk_is_named_and_never_handed_out(copy):
    shard = copy / "train/mlp_out/c/1/0/0"
    data = bytearray(shard.read_bytes())
    place = 5 * L * (32 * D * 4 + 4) + (32 * D * 4 + 4) + 77  # block 5 of the shard, second layer
    data[place] ^= 1
    shard.write_bytes(data)
    store = ActivationStore.open(copy)
    first = 512 + 5 * 32
    with pytest.raises(UserError, match=rf"shard train/mlp_out/c/1/0/0, rows {first} to {first + 31} of layer 5"):
        for step in range(store.steps_per_epoch(100) + 1):
            batch = store.batch(0, step, 100)
            assert not ((batch.token >= 10**9).any())
    with pytest.raises(UserError, match="are not what was written"):
        store.verify()
    ActivationStore.open(copy, layers=[2]).batch(0, 0, 2700, layers=[2])  # what is whole can still be read


@pytest.mark.parametrize("seed", range(6))
def test_any_flipped_byte_is_found(copy, seed):
    random = np.random.default_rng(seed)
    shards = sorted(path for path in copy.rglob("c/*") if path.is_file() and "held_out" not in path.parts)
    shards += sorted(copy.glob("*/c/*/0/0"))
    shard = shards[random.integers(len(shards))]
    data = bytearray(shard.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=str(shard.relative_to(copy)).split("/c/")[0]):
        ActivationStore.open(copy).verify()


def test_refusals(copy, tmp_path):
    with pytest.raises(UserError, match="there is no store"):
        ActivationStore.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="a batch of 5000 rows is more than"):
        ActivationStore.open(copy).steps_per_epoch(5000)
    with pytest.raises(UserError, match=r"holds activations of m \(weights abc\)"):
        store = ActivationStore.open(copy)
        store.attributes["model"] = {"name": "m", "fingerprint": "abc"}
        store.check_model("xyz", "n")
    (copy / "train/resid/c/2/0/0").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard train/resid/c/2/0/0 \(rows 1024 to 1535\) has 5 bytes"):
        ActivationStore.open(copy)
    (copy / "train/resid/c/2/0/0").unlink()
    with pytest.raises(UserError, match="is missing"):
        ActivationStore.open(copy)
    metadata = json.loads((copy / "zarr.json").read_text())
    metadata["attributes"]["complete"] = False
    (copy / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="is incomplete: run `crosslace cache`"):
        ActivationStore.open(copy)
    metadata["attributes"] |= {"version": 99, "complete": True}
    (copy / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="version 99"):
        ActivationStore.open(copy)
    (copy / "zarr.json").write_text("{")
    with pytest.raises(UserError, match=r"its zarr\.json is no JSON"):
        ActivationStore.open(copy)


def test_values_beyond_float16_are_refused(rows, tmp_path):
    large = {site: x * 1e5 for site, x in rows.items()}
    with pytest.raises(UserError, match=r"beyond float16: cache with store\.dtype=bfloat16"):
        make(tmp_path / "s", large, "float16")
    with pytest.raises(UserError, match="resid of layer 2 is not finite"):
        make(tmp_path / "t", {**rows, "resid": rows["resid"] / 0}, "float32")


def test_other_settings_do_not_go_on_with_a_store(rows, tmp_path):
    make(tmp_path / "s", rows)
    with pytest.raises(UserError, match="dtype=float32 and this would be dtype=float16"):
        make(tmp_path / "s", rows, "float16")
    with pytest.raises(UserError, match="seed=0 and this would be seed=1"):
        make(tmp_path / "s", rows, identity={"seed": 1})


def test_a_store_that_was_only_begun_may_become_another(rows, tmp_path):
    with StoreWriter(tmp_path / "s", layout("float16"), {"seed": 3}, {"train": 9}):
        pass
    make(tmp_path / "s", rows)
    assert ActivationStore.open(tmp_path / "s").dtype == torch.float32


def test_two_processes_may_begin_a_store_at_once(rows, tmp_path, monkeypatch):
    """The second comes between the first one's questions whether there is a store and what else lies in the folder."""
    read, sizes, others = Place.read, {"train": 9}, []

    def read_late(place, name):
        found = read(place, name)
        if name == "zarr.json" and not others:
            others.append(StoreWriter(tmp_path / "s", layout(), {"seed": 3}, sizes, process_index=1, process_count=2))
            others[0].__enter__()
        return found

    monkeypatch.setattr(Place, "read", read_late)
    with StoreWriter(tmp_path / "s", layout(), {"seed": 3}, sizes, process_index=0, process_count=2):
        assert len(others) == 1 and read(others[0].place, "zarr.json")
    others[0].__exit__(None)


def test_a_folder_of_other_files_is_left_alone(rows, tmp_path):
    (tmp_path / "thesis.part").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.part\) and no store"):
        make(tmp_path, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.part"]
    make(tmp_path / "s", rows)
    (tmp_path / "s" / "mine.part").write_text("x")
    (tmp_path / "s" / ".0.12-34.part").write_text("x")
    make(tmp_path / "s", rows)
    assert [path.name for path in (tmp_path / "s").rglob("*.part")] == ["mine.part"]


def test_weighs_what_its_shards_do(rows, tmp_path):
    for dtype in ("float32", "int8"):
        make(tmp_path / dtype, rows, dtype)
        shards = [path for spec in layout(dtype).arrays for path in (tmp_path / dtype / "train" / spec).rglob("c/**/*")]
        assert layout(dtype).total_bytes(N) == sum(path.stat().st_size for path in shards if path.is_file())
    assert layout().total_bytes(10**15) > 10**15  # at once


@pytest.mark.parametrize("path", ["disk", "memory://locked"])
def test_second_writer_is_refused(rows, tmp_path, path):
    path = str(tmp_path / "s") if path == "disk" else path
    with (
        StoreWriter(path, layout(), {"seed": 0}, {"train": 9}),
        pytest.raises(UserError, match="another process is writing"),
        StoreWriter(path, layout(), {"seed": 0}, {"train": 9}),
    ):
        pass
    with StoreWriter(path, layout(), {"seed": 0}, {"train": 9}):
        pass
