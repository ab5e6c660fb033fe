"""The store's C++ kernels against the plain ways beside them: the same checksums, the same bytes, the same refusals."""

import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.store import kernels
from crosslace.data.store.codecs import CODECS
from crosslace.data.store.layout import StoreLayout
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.writer import write_store

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no C++ compiler")
SITES = ("resid", "mlp_out")


def plainly(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checksums_are_those_of_crc32c():
    data = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8)
    sizes = [*range(40), 255, 256, 767, 768, 1023, 1024, 1025, 1279, 1280, 4095, 12_287, 12_288, 12_289, 39_990]
    for size in sizes:
        for start in (0, 1, 7):
            part = data[start : start + size]
            assert kernels.crc32c(part) == google_crc32c.value(part.tobytes())


@pytest.mark.parametrize(("size", "room"), [(1030, 4096), (1030, 500), (700_000, 1 << 20), (700_000, 1 << 30)])
def test_chunks_are_packed_with_their_checksums(size, room):
    chunks = np.random.default_rng(0).integers(0, 256, (3, 2, -(-size // 64) * 64 + 64), dtype=np.uint8)
    expected = b""
    for chunk in chunks.reshape(6, -1):
        expected += chunk[:size].tobytes() + google_crc32c.value(chunk[:size].tobytes()).to_bytes(4, "little")
    into = np.empty(min(room, len(expected) + 64), np.uint8)
    got = b""
    while len(got) < len(expected):
        count = kernels.pack_chunks(chunks, size, len(got), into)
        assert count == min(len(into), len(expected) - len(got))
        got += into[:count].tobytes()
    assert got == expected


@pytest.mark.parametrize("width", [16, 33, 320])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_numbers_are_converted_as_torch_does(source, stored, width):
    rows, layers, block = 50, 3, 8
    generator = torch.Generator().manual_seed(0)
    # every size that float16 has, subnormal ones and those that become 0 included
    x = torch.randn(rows, layers, width, generator=generator) * 2.0 ** torch.randint(-30, 14, (width,))
    x[0, 0, :5] = torch.tensor([0.0, -0.0, float("nan"), 65504.0, 2.0**-24])
    x = x.to(source)
    codec = CODECS[stored]
    picked = torch.randperm(rows, generator=generator)[:40].numpy()
    places = torch.randperm(48, generator=generator)[:40].numpy()
    stride = block * width * codec.stored.itemsize
    image = np.zeros((6, layers, stride), np.uint8)
    total, square = np.zeros((layers, width)), np.zeros(layers)
    largest = kernels.put_rows(list(x.unbind(1)), picked, image, places, block, codec.read, total, square)
    got = codec.to_torch(image.view(codec.stored)).reshape(6, layers, block, width).transpose(1, 2).flatten(0, 1)
    expected = x[picked].to(codec.read)
    torch.testing.assert_close(got[places], expected, rtol=0, atol=0, equal_nan=True)
    assert (got[np.setdiff1d(np.arange(48), places)] == 0).all()
    sums = x[picked].double().sum(0).numpy()
    np.testing.assert_allclose(total, sums, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(square, x[picked].double().square().sum((0, 2)).numpy(), rtol=1e-12)
    if source == torch.float32 and stored != "float32":
        assert largest == x[picked].nan_to_num().abs().amax()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("memory", [None, 1])
def test_a_store_has_the_same_bytes_with_and_without(tmp_path, monkeypatch, dtype, memory):
    generator = torch.Generator().manual_seed(0)
    rows = {site: torch.randn(1500, 3, 40, generator=generator) for site in SITES}
    number = torch.arange(1500)
    layout = StoreLayout(SITES, (0, 1, 2), 40, dtype, block_rows=32, shard_rows=512)
    options = {"held_out": 203, "shuffle_rows": 512, "memory": memory}
    write_store(tmp_path / "native", rows, number, number, number, layout, **options)
    plainly(monkeypatch)
    write_store(tmp_path / "plain", rows, number, number, number, layout, **options)
    assert tree(tmp_path / "native") == tree(tmp_path / "plain")


@pytest.fixture(params=["native", "plain"])
def way(request, monkeypatch) -> str:
    if request.param == "plain":
        plainly(monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = {site: torch.randn(1000, 4, 24, generator=generator) for site in SITES}
    number = torch.arange(1000)
    layout = StoreLayout(SITES, (0, 1, 2, 3), 24, "float16", block_rows=32, shard_rows=256)
    path = tmp_path_factory.mktemp("store") / "s"
    write_store(path, rows, number, number, number, layout)
    return path


def test_batches_are_the_same_either_way(written, monkeypatch):
    sizes = [(100, None), (256, [2]), (77, [3, 0]), (1000, [0, 1, 3])]
    asked = [(size, step, layers) for size, layers in sizes for step in range(1000 // size)]
    fast = ActivationStore.open(written)
    batches = [fast.batch(1, step, size, layers) for size, step, layers in asked]
    plainly(monkeypatch)
    plain = ActivationStore.open(written)
    for batch, (size, step, layers) in zip(batches, asked):
        again = plain.batch(1, step, size, layers)
        assert torch.equal(batch.x, again.x) and torch.equal(batch.y, again.y)
        assert torch.equal(batch.token, again.token)


def test_a_flipped_byte_is_refused_until_it_is_mended(written, tmp_path, way):
    copy = Path(shutil.copytree(written, tmp_path / "s"))
    shard, chunk = copy / "resid/c/1/0/0", 32 * 24 * 2 + 4
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[(2 * 4 + 3) * chunk + 11] ^= 16  # the third block's last layer
    shard.write_bytes(data)
    store = ActivationStore.open(copy)
    everything = store.steps_per_epoch(1000)
    for _ in range(2):  # a refusal is no permission
        with pytest.raises(UserError, match=r"shard resid/c/1/0/0, rows 320 to 351 of layer 3 do not match"):
            [store.batch(0, step, 1000) for step in range(everything)]
    store.batch(0, 0, 1000, layers=[0, 1, 2])
    shard.write_bytes(whole)
    store.batch(0, 0, 1000)


def test_a_shard_that_vanishes_or_shrinks_ends_with_a_sentence(written, tmp_path, way):
    copy = Path(shutil.copytree(written, tmp_path / "s"))
    store, other = ActivationStore.open(copy), ActivationStore.open(copy)
    shard = copy / "mlp_out/c/2/0/0"
    store.batch(0, 0, 1000)
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"mlp_out/c/2/0/0 is missing or cut short"):
        store.batch(0, 0, 1000)
    shard.unlink()
    with pytest.raises(UserError, match=r"mlp_out/c/2/0/0 is missing or cut short"):
        other.batch(0, 0, 1000)


def test_without_a_compiler_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLACE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.load.__wrapped__() is None
