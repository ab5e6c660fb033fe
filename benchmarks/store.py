"""How fast the store is, against the plainest thing that moves the same bytes on this machine in the same run.

    python -m benchmarks.store                     # a table
    python -m benchmarks.store --json              # one JSON object a line
    python -m benchmarks.store --layouts           # what other block sizes would give, and other ways to read

write_ratio     a sequential `np.save`-style write of the same bytes / StoreWriter (shuffle, blocks, checksums, shards);
                both without fsync (`write_ratio`) and both with it (`write_ratio_synced`), each a ratio of medians of
                `--repeats` that take turns, and `_best` the ratio of the fastest ones
read_ratio      numpy copying the same bytes out of the page cache into memory that is there / shuffled batches of 4,096
                rows from the loader; `read_ratio_first` is the first pass, in which every checksum is checked, and
                `read_ratio_cold` that of a store which only the disk has, against numpy reading files from the disk
harvest_share   the model's forward passes alone / the whole harvest
loader_stall    share of its time that the training of a small CLT waits for batches of 1,024 rows, as it logs it

A ratio of 1 is as fast as the plain thing; more is faster. Timings of reading are the best of `--repeats`.

A plain write runs at the speed of memory while the page cache has pages to give that it had before (a file of that size
was removed shortly before), and many times slower where it must find fresh ones, above all on a virtual machine whose
host has to clear them as well: 6 and 0.2 GB/s on one machine within a minute. Large shards go past the page cache, at
the speed of the disk whatever its state is. So the plain write is what wanders; look at `*_gb_s` beside the ratio, and
at the synced ratio, in which both ways end with the bytes on the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.writer import StoreWriter

SHAPES = [(12, 256), (12, 768)]
SITES = ("resid", "mlp_out")
BATCH = 4096
PIECE_ROWS = 8192
WINDOWS = 8  # a store of more rows than its shuffle takes at once


def best(repeats: int, work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def pieces(n_layers: int, d_model: int) -> dict[str, np.ndarray]:
    """Rows [PIECE_ROWS, L, D] of each site that are written again and again."""
    random = np.random.default_rng(0)
    shape = (PIECE_ROWS, n_layers, d_model)
    return {site: random.standard_normal(shape, dtype=np.float32).astype(np.float16) for site in SITES}


def write_plain(folder: Path, content: dict[str, np.ndarray], rows: int, sync: bool) -> None:
    for site, values in content.items():
        with open(folder / f"{site}.npy", "wb") as out:
            header = {"descr": "<f2", "fortran_order": False, "shape": (rows, *values.shape[1:])}
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, rows, PIECE_ROWS):
                values[: rows - start].tofile(out)
            out.flush()
            if sync:
                os.fsync(out.fileno())


def write_store(folder: Path, content: dict[str, np.ndarray], rows: int, layout: StoreLayout, sync: bool) -> None:
    shutil.rmtree(folder / "store", ignore_errors=True)
    folder.mkdir(exist_ok=True)
    sites = {site: torch.from_numpy(values) for site, values in content.items()}
    where = torch.arange(PIECE_ROWS)
    options: dict[str, Any] = {"shuffle_rows": rows // WINDOWS, "memory": 1 << 40, "durable": sync}
    with StoreWriter(folder / "store", layout, {"seed": 0}, {"train": rows}, **options) as writer:
        sizes = writer.sizes("train")[0]
        for index, size in enumerate(sizes):
            window = writer.window("train", index, size)
            while window.filled < window.rows:
                window.append(sites, dict.fromkeys(("token", "position", "document"), where))
            writer.write("train", index, window)
        writer.finish({"train": len(sizes)}, {})


def drop(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    os.sync()


def forget(folder: Path) -> None:
    """Let the page cache drop all files: only the disk has them."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as held:
                os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_write(
    folder: Path, n_layers: int, d_model: int, rows: int, block_rows: int, repeats: int
) -> dict[str, float]:
    content = pieces(n_layers, d_model)
    layout = StoreLayout(SITES, tuple(range(n_layers)), d_model, "float16", block_rows)
    size = layout.row_bytes * rows
    ways: dict[str, Callable[[], None]] = {}
    for sync in (False, True):
        tail = "_synced" if sync else ""
        ways[f"plain{tail}"] = lambda sync=sync: write_plain(folder, content, rows, sync)
        ways[f"store{tail}"] = lambda sync=sync: write_store(folder, content, rows, layout, sync)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        # in turn, so that whatever else the machine does falls on all of them
        for name, work in ways.items():
            drop(folder)
            seconds[name].append(best(1, work))
    found: dict[str, float] = {}
    for suffix, choose in (("", statistics.median), ("_best", min)):
        for tail in ("", "_synced"):
            plain, store = choose(seconds[f"plain{tail}"]), choose(seconds[f"store{tail}"])
            found[f"write_ratio{tail}{suffix}"] = plain / store
            found[f"write_gb_s{tail}{suffix}"] = size / store / 1e9
            found[f"plain_write_gb_s{tail}{suffix}"] = size / plain / 1e9
    return found


def bench_read(folder: Path, n_layers: int, d_model: int, rows: int, block_rows: int, repeats: int) -> dict[str, float]:
    content = pieces(n_layers, d_model)
    layout = StoreLayout(SITES, tuple(range(n_layers)), d_model, "float16", block_rows)
    drop(folder)
    write_plain(folder, content, rows, False)
    write_store(folder, content, rows, layout, False)
    store = ActivationStore.open(folder / "store")
    steps = store.steps_per_epoch(BATCH)
    size = steps * BATCH * n_layers * d_model * 2 * len(SITES)

    def copy_plain() -> None:
        arrays = [np.load(folder / f"{site}.npy", mmap_mode="r") for site in SITES]
        into = [np.zeros((BATCH, n_layers, d_model), np.float16) for _ in SITES]
        for step in range(steps):
            for array, target in zip(arrays, into):
                np.copyto(target, array[step * BATCH : (step + 1) * BATCH])

    def load(opened: ActivationStore, layers: list[int] | None = None) -> None:
        with opened.loader(BATCH, steps=steps, layers=layers) as loader:
            for _ in loader:
                pass

    cold: dict[str, list[float]] = {"plain": [], "store": []}
    for _ in range(repeats):
        forget(folder)
        cold["plain"].append(best(1, copy_plain))
        forget(folder)
        cold["store"].append(best(1, lambda: load(ActivationStore.open(folder / "store"))))
    copy_plain()
    plain = best(repeats, copy_plain)
    load(store)
    again = best(repeats, lambda: load(store))
    first = best(repeats, lambda: load(ActivationStore.open(folder / "store")))
    alone = best(repeats, lambda: [len(store.batch(0, step, BATCH)) for step in range(steps)])
    one = best(repeats, lambda: [load(store, [layer]) for layer in range(0, n_layers, 4)]) * 4
    return {
        "read_ratio": plain / again,
        "read_ratio_first": plain / first,
        "read_ratio_one_thread": plain / alone,
        "read_ratio_one_layer": plain / one,
        "read_ratio_cold": statistics.median(cold["plain"]) / statistics.median(cold["store"]),
        "read_gb_s": size / again / 1e9,
        "read_gb_s_cold": size / statistics.median(cold["store"]) / 1e9,
        "plain_read_gb_s": size / plain / 1e9,
    }


def bench_zarr(folder: Path, n_layers: int, d_model: int, pipeline: str) -> float:
    """GB/s of zarr-python over the same store, blocks in random order, with one of its codec pipelines."""
    import zarr

    pipelines = {
        "zarrs": "zarrs.ZarrsCodecPipeline",
        "zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    }
    with zarr.config.set({"codec_pipeline.path": pipelines[pipeline]}):
        group = zarr.open_group(str(folder / "store"), mode="r")
        arrays: list[Any] = [group[site] for site in SITES]
        starts = np.random.default_rng(0).permutation(arrays[0].shape[0] // BATCH)[:4] * BATCH
        begun = time.perf_counter()
        for start in starts:
            for array in arrays:
                array[start : start + BATCH]
        seconds = time.perf_counter() - begun
    return len(starts) * BATCH * n_layers * d_model * 2 * len(SITES) / seconds / 1e9


def random_llama(n_layers: int, d_model: int) -> Any:
    """A random Llama of this shape."""
    from crosslace.data.models.language_model import LanguageModel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 64,
        num_key_value_heads=d_model // 64,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return LanguageModel(model, None, "random")


def bench_harvest(folder: Path, lm: Any, tokens: int) -> dict[str, float]:
    """A model over random text."""
    from crosslace.data.harvest import HarvestSettings, harvest
    from crosslace.data.harvest.window_plan import batches
    from crosslace.data.text.corpus import TokenSequence

    class RandomText:
        name = fingerprint = "random"

        def sequences(self, split: str = "train", limit_tokens: int | None = None) -> Iterator[TokenSequence]:
            generator = torch.Generator().manual_seed(int(split == "train"))
            for document in range((limit_tokens or tokens) // 256):
                tokens_T = torch.randint(4096, (256,), generator=generator)
                yield TokenSequence(tokens_T, torch.full((256,), document), torch.arange(256))

    drop(folder)
    settings = HarvestSettings(
        path=str(folder / "harvest"),
        tokens=str(tokens),
        held_out="0",
        batch_tokens=8192,
        sample_tokens=8192,
    )
    begun = time.perf_counter()
    harvest(lm, RandomText(), settings)
    whole = time.perf_counter() - begun
    groups = list(batches(list(enumerate(RandomText().sequences())), settings.batch_tokens, 0))
    groups += list(batches(list(enumerate(RandomText().sequences(limit_tokens=8192))), settings.batch_tokens, 0))
    begun = time.perf_counter()
    with torch.inference_mode():
        for group in groups:
            lm.model.base_model(input_ids=torch.stack([s.tokens for _, s in group]).to(lm.device), use_cache=False)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
    forward = time.perf_counter() - begun
    return {"harvest_share": forward / whole, "harvest_tokens_s": tokens / whole}


def bench_train(folder: Path, n_layers: int, d_model: int, rows: int, block_rows: int, steps: int) -> dict[str, float]:
    """A CLT trained from the store, every block of which is read for the first time: what its log says of waiting."""
    from crosslace.train.settings import TrainerSettings, TranscoderSettings
    from crosslace.train.trainer import train

    content = pieces(n_layers, d_model)
    layout = StoreLayout(SITES, tuple(range(n_layers)), d_model, "float16", block_rows)
    drop(folder)
    write_store(folder / "held_out", content, PIECE_ROWS, layout, False)
    write_store(folder / "train", content, rows, layout, False)
    stores = [ActivationStore.open(folder / split / "store") for split in ("train", "held_out")]
    settings = TrainerSettings(
        steps=steps,
        batch=1024,
        log_every=steps // 4,
        eval_every=0,
        eval_tokens=1024,
        checkpoint_every=0,
        calibrate_tokens=1024,
    )
    train(settings, TranscoderSettings(features=256), stores[0], stores[1], folder / "run")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loader_stall" in line]
    # the first share of the run has the start in it, when nothing was read ahead yet
    return {
        "loader_stall": max(line["loader_stall"] for line in logged[1:]),
        "loader_stall_at_start": logged[0]["loader_stall"],
        "train_tokens_s": logged[-1]["tokens_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the store is, against numpy.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layouts", action="store_true", help="sweep block sizes and codec pipelines")
    parser.add_argument("--folder", help="where to write, and remove, the files; the temporary folder if not given")
    parser.add_argument("--parts", default="write,read,harvest,train")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--model", help="a harvest by this model alone, such as smollm2")
    parser.add_argument("--dtype", default="auto", help="of that model")
    options = parser.parse_args()
    if options.model:
        from crosslace.data.models import ModelSettings, load_model

        lm = load_model(ModelSettings(options.model, dtype=options.dtype))
        with tempfile.TemporaryDirectory(prefix="crosslace-bench-", dir=options.folder) as name:
            found = bench_harvest(Path(name), lm, 1 << 14)
        print(json.dumps({"model": options.model, "dtype": str(lm.dtype), **found}))
        return
    blocks = [64, 128, 256, 512, 1024] if options.layouts else [256]
    with tempfile.TemporaryDirectory(prefix="crosslace-bench-", dir=options.folder) as name:
        folder = Path(name)
        for n_layers, d_model in SHAPES:
            rows = round(options.gb * 1e9 / (n_layers * d_model * 2 * len(SITES)) / PIECE_ROWS) * PIECE_ROWS
            lines: list[dict[str, Any]] = []
            for block_rows in blocks:
                shape = n_layers, d_model, rows, block_rows, options.repeats
                line: dict[str, Any] = {
                    "L": n_layers,
                    "D": d_model,
                    "rows": rows,
                    "dtype": "float16",
                    "block": block_rows,
                }
                if "write" in options.parts:
                    line |= bench_write(folder, *shape)
                if "read" in options.parts:
                    line |= bench_read(folder, *shape)
                    if options.layouts:
                        line |= {
                            f"{p}_gb_s": bench_zarr(folder, n_layers, d_model, p) for p in ("zarrs", "zarr-python")
                        }
                if "train" in options.parts and not options.layouts:
                    line |= bench_train(folder, n_layers, d_model, rows, block_rows, options.steps)
                if "harvest" in options.parts and not options.layouts:
                    line |= bench_harvest(
                        folder, random_llama(n_layers, d_model), 2**26 // (d_model * n_layers // 12) // 2
                    )
                lines.append(
                    {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
                )
                if options.json:
                    print(json.dumps(lines[-1]), flush=True)
            if not options.json:
                show(lines)


def show(lines: list[dict[str, Any]]) -> None:
    """A row for each figure, block sizes beside each other."""
    for key in lines[0]:
        print(f"{key:30}" + "".join(f"{line[key]!s:>10}" for line in lines))
    print(flush=True)


if __name__ == "__main__":
    main()
