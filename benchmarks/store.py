"""How fast the store is, against the plainest thing that moves the same bytes on this machine in the same run.

    python -m benchmarks.store                     # a table
    python -m benchmarks.store --json              # one JSON object a line

read_gb_s       shuffled batches of 4,096 rows from the loader, out of the page cache, every checksum checked before;
                `first`: the first pass, in which they are checked; `cold`: a store that only the disk has
plain_gb_s      numpy copying the same bytes out of the page cache into memory that is there
harvest_share   the model's forward passes alone / the whole harvest, in turn, best of each
loader_stall    share of its time that the training of a small CLT waits for batches of 1,024 rows, as it logs it
tokens_s        tokens a second of the text that a harvest reads, made and kept; and read again

Timings are the best of `--repeats`. Freed memory stays with the process, as the command `crosslace` has it.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.pages import keep_pages
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


def write_store(folder: Path, content: dict[str, np.ndarray], rows: int, layout: StoreLayout) -> None:
    shutil.rmtree(folder / "store", ignore_errors=True)
    folder.mkdir(exist_ok=True)
    sites = {site: torch.from_numpy(values) for site, values in content.items()}
    where = torch.arange(PIECE_ROWS)
    options: dict[str, Any] = {"shuffle_rows": rows // WINDOWS, "memory": 1 << 40, "durable": False}
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


def bench_read(folder: Path, n_layers: int, d_model: int, rows: int, repeats: int) -> dict[str, float]:
    content = pieces(n_layers, d_model)
    layout = StoreLayout(SITES, tuple(range(n_layers)), d_model, "float16")
    drop(folder)
    for site, values in content.items():
        with open(folder / site, "wb") as out:
            for _ in range(rows // PIECE_ROWS):
                values.tofile(out)
    written = best(1, lambda: write_store(folder, content, rows, layout))
    store = ActivationStore.open(folder / "store")
    steps = store.steps_per_epoch(BATCH)
    size = steps * BATCH * n_layers * d_model * 2 * len(SITES)

    def copy_plain() -> None:
        into = np.zeros((BATCH, n_layers, d_model), np.float16)
        for site in SITES:
            array = np.memmap(folder / site, np.float16, "r", shape=(rows, n_layers, d_model))
            for step in range(steps):
                np.copyto(into, array[step * BATCH : (step + 1) * BATCH])

    def load(opened: ActivationStore, layers: list[int] | None = None) -> None:
        with opened.loader(BATCH, steps=steps, layers=layers) as loader:
            for _ in loader:
                pass

    def cold() -> float:
        forget(folder)
        return best(1, lambda: load(ActivationStore.open(folder / "store")))

    seconds = {
        "cold_read_gb_s": min(cold() for _ in range(repeats)),
        "plain_gb_s": best(repeats, copy_plain),
        "first_read_gb_s": best(repeats, lambda: load(ActivationStore.open(folder / "store"))),
        "read_gb_s": best(repeats, lambda: load(store)) if load(store) is None else 0.0,
        "write_gb_s": written,
        "one_layer_gb_s": best(repeats, lambda: load(store, [0])) * n_layers,
    }
    return {name: size / taken / 1e9 for name, taken in seconds.items()}


def bench_tokens(folder: Path, repeats: int) -> dict[str, float]:
    """The standard library's source in a tokenizer of 2,048 words."""
    from crosslace.data.text.corpus import Corpus
    from crosslace.data.text.dataset import DatasetSettings, Document, TextSource
    from crosslace.data.worlds import stdlib

    texts = list(stdlib.documents())
    tokenizer = stdlib.make_tokenizer(texts[:200], 2048, 256)
    source = TextSource(lambda: (Document(i, text, False) for i, text in enumerate(texts)), "stdlib")

    def read(keep: Path | None) -> int:
        return sum(len(s.tokens) for s in Corpus(source, DatasetSettings(), tokenizer, keep).sequences())

    count = read(None)
    drop(folder)
    made = best(1, lambda: read(folder / "tokens"))
    return {
        "tokens_s": count / min(made, best(repeats, lambda: read(None))),
        "tokens_s_kept": count / best(repeats, lambda: read(folder / "tokens")),
    }


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


def bench_harvest(folder: Path, lm: Any, tokens: int, repeats: int) -> dict[str, float]:
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
                yield TokenSequence(tokens_T, torch.full((256,), document))

    drop(folder)
    settings = HarvestSettings(
        path=str(folder / "harvest"),
        tokens=str(tokens),
        held_out="0",
        batch_tokens=8192,
        sample_tokens=8192,
    )
    groups = list(batches(list(enumerate(RandomText().sequences())), settings.batch_tokens, 0))
    groups += list(batches(list(enumerate(RandomText().sequences(limit_tokens=8192))), settings.batch_tokens, 0))

    @torch.inference_mode()
    def forward() -> None:
        for group in groups:
            lm.model.base_model(input_ids=torch.stack([s.tokens for _, s in group]).to(lm.device), use_cache=False)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()

    def whole() -> None:
        drop(folder)
        harvest(lm, RandomText(), settings)

    forward()
    seconds = [(best(1, whole), best(1, forward)) for _ in range(repeats)]
    whole_s, forward_s = (min(column) for column in zip(*seconds))
    return {"harvest_share": forward_s / whole_s, "harvest_tokens_s": tokens / whole_s}


def bench_train(folder: Path, n_layers: int, d_model: int, rows: int, steps: int) -> dict[str, float]:
    """A CLT trained from the store, every block of which is read for the first time: what its log says of waiting."""
    from crosslace.train.settings import TrainerSettings, TranscoderSettings
    from crosslace.train.trainer import train

    content = pieces(n_layers, d_model)
    layout = StoreLayout(SITES, tuple(range(n_layers)), d_model, "float16")
    drop(folder)
    write_store(folder / "held_out", content, PIECE_ROWS, layout)
    write_store(folder / "train", content, rows, layout)
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
    parser.add_argument("--folder", help="where to write, and remove, the files; the temporary folder if not given")
    parser.add_argument("--parts", default="tokens,read,train,harvest")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--tokens", type=int, default=1 << 17, help="of the harvest at width 256")
    parser.add_argument("--model", help="a harvest by this model alone, such as smollm2")
    parser.add_argument("--dtype", default="auto", help="of that model")
    options = parser.parse_args()
    keep_pages()
    if options.model:
        from crosslace.data.models import ModelSettings, load_model

        lm = load_model(ModelSettings(options.model, dtype=options.dtype))
        with tempfile.TemporaryDirectory(prefix="crosslace-bench-", dir=options.folder) as name:
            found = bench_harvest(Path(name), lm, 1 << 14, 1)
        print(json.dumps({"model": options.model, "dtype": str(lm.dtype), **found}))
        return
    with tempfile.TemporaryDirectory(prefix="crosslace-bench-", dir=options.folder) as name:
        folder = Path(name)
        if "tokens" in options.parts:
            show({"text": "stdlib"} | bench_tokens(folder, options.repeats), options.json)
        for n_layers, d_model in SHAPES:
            rows = round(options.gb * 1e9 / (n_layers * d_model * 2 * len(SITES)) / PIECE_ROWS) * PIECE_ROWS
            line: dict[str, Any] = {"L": n_layers, "D": d_model, "rows": rows, "dtype": "float16"}
            if "read" in options.parts:
                line |= bench_read(folder, n_layers, d_model, rows, options.repeats)
            if "train" in options.parts:
                line |= bench_train(folder, n_layers, d_model, rows, options.steps)
            if "harvest" in options.parts:
                tokens = options.tokens * 256 // d_model
                line |= bench_harvest(folder, random_llama(n_layers, d_model), tokens, options.repeats)
            show(line, options.json)


def show(line: dict[str, Any], as_json: bool) -> None:
    line = {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(line) if as_json else "\n".join(f"{key:>22} {value}" for key, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
