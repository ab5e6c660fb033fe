"""The second bundled model: the source files of the Python that is running, a tokenizer and a small Llama trained on
them.

Nothing of it is shipped: the files lie on every machine that runs Crosslace. They are real text with much structure,
for benchmarks and realistic evaluation without a download.
"""

import hashlib
import itertools
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..cache import build_once
from ..errors import Progress, UserError, check_choice, check_range, silent
from .bundled import LlamaShape, TrainingBatch, fit, is_held_out, save_model, settings_hash, small_llama

RECIPE = 1
"""Part of the cache key: raise it when a change to the code changes the model."""
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "turtledemo", "lib2to3"}
HELD_OUT_SHARE = 0.05
"""Share of the files that training never sees; `dataset=stdlib` holds out the same ones by default."""
RECORD_FILE = "stdlib.json"
AT_ONCE = 8192
"""Tokens of a training batch that go through the model together: what lies between its layers has to fit in memory."""
EVALUATED = 100_000
"""Held-out tokens on which the loss is measured, at most."""


@dataclass(frozen=True)
class StdlibSettings:
    size: str = "small"
    """`tiny` (seconds, for tests), `small` (a few minutes on 2 cores) or `large` (for a GPU)."""
    seed: int = 0
    """Decides the model's initial weights, which files are held out, and the order of training."""
    steps: int | None = None
    """Training steps; null takes the size's own number."""

    def __post_init__(self) -> None:
        check_choice("stdlib.size", self.size, SIZES)
        check_range("stdlib.seed", self.seed, low=0)
        if self.steps is not None:
            check_range("stdlib.steps", self.steps, low=1)


@dataclass(frozen=True)
class StdlibSize:
    shape: LlamaShape
    vocabulary: int
    files: int | None
    """Files to train on, None for all."""


SIZES: dict[str, StdlibSize] = {
    "tiny": StdlibSize(
        LlamaShape(layers=2, width=64, heads=4, mlp=128, context=128, steps=60, batch=8, lr=5e-3), 512, 40
    ),
    "small": StdlibSize(
        LlamaShape(layers=4, width=192, heads=6, mlp=512, context=256, steps=400, batch=16, lr=4e-3), 2048, None
    ),
    "large": StdlibSize(
        LlamaShape(layers=12, width=512, heads=8, mlp=1536, context=512, steps=4000, batch=64, lr=2e-3), 8192, None
    ),
}


def files() -> list[Path]:
    """The source files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    if not found:
        raise UserError(f"{root} holds no Python source, so there is no stdlib corpus; use another dataset")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def documents() -> Iterator[str]:
    for path in files():
        yield path.read_text(encoding="utf-8", errors="replace")


def identity() -> str:
    """Which files these are: the Python's version, and each file's name and length."""
    root = Path(sysconfig.get_path("stdlib"))
    listing = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files()]
    return hashlib.sha256(repr((sys.version_info[:3], listing)).encode()).hexdigest()[:16]


def build_stdlib(
    settings: StdlibSettings | None = None, progress: Progress = silent, device: torch.device | str = "cpu"
) -> Path:
    """The folder of the model and its tokenizer, in the cache; trained first when it is not there yet."""
    settings = settings or StdlibSettings()
    size = SIZES[settings.size]
    key = settings_hash(settings, recipe=RECIPE, files=identity(), sizes=asdict(size))
    return build_once(f"stdlib-{key}", lambda folder: _build(folder, settings, size, progress, torch.device(device)))


def _build(folder: Path, settings: StdlibSettings, size: StdlibSize, progress: Progress, device: torch.device) -> None:
    started = time.monotonic()
    shape = replace(size.shape, steps=settings.steps or size.shape.steps)
    texts: dict[bool, list[str]] = {False: [], True: []}
    for index, text in enumerate(itertools.islice(documents(), size.files)):
        texts[is_held_out(index, settings.seed, HELD_OUT_SHARE)].append(text)
    progress("making the stdlib tokenizer", 0, 1)
    tokenizer = make_tokenizer(texts[False], size.vocabulary, shape.context)
    train_N = stream(texts[False], tokenizer)
    model = small_llama(shape, tokenizer, settings.seed)
    losses = fit(model, shape, Windows(train_N, shape, settings.seed), progress, "training on stdlib", device)
    trained = time.monotonic()
    held_out_N = stream(texts[True], tokenizer)[:EVALUATED]
    loss = held_out_loss(model, held_out_N, shape.context, device)
    read = tokenizer.decode(held_out_N, skip_special_tokens=True)
    record = {
        "format": "crosslace-stdlib",
        "version": 1,
        "settings": {"size": settings.size, "seed": settings.seed, "steps": shape.steps},
        "python": sys.version.split()[0],
        "tokens": {
            "train": len(train_N),
            "held_out": len(held_out_N),
            "seen": shape.steps * shape.batch * shape.context,
        },
        "train_loss": sum(losses[-10:]) / len(losses[-10:]),
        "held_out": {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) * len(held_out_N) / len(str(read).encode()),
        },
        "seconds": {"train": trained - started, "total": time.monotonic() - started},
    }
    save_model(model, tokenizer, folder)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def make_tokenizer(texts: list[str], vocabulary: int, context_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts <bos> first and never adds <eos>."""
    special = ["<pad>", "<bos>", "<eos>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    trained.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=context_length,
    )


def stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts end to end, <bos> before each."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


class Windows:
    """Training batches: windows at random places of the stream, <bos> first; any step's can be asked for."""

    def __init__(self, stream_N: Tensor, shape: LlamaShape, seed: int) -> None:
        self.stream_N, self.shape, self.seed = stream_N, shape, seed
        self.bos = int(stream_N[0])

    def __call__(self, step: int) -> TrainingBatch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.stream_N) - self.shape.context, (self.shape.batch, 1), generator=generator)
        tokens_BT = self.stream_N[starts + torch.arange(self.shape.context)]
        tokens_BT[:, 0] = self.bos
        parts = tokens_BT.split(max(1, AT_ONCE // self.shape.context))
        return [(part, torch.ones(part.shape)) for part in parts]


def held_out_loss(model: LlamaForCausalLM, stream_N: Tensor, context: int, device: torch.device) -> float:
    """Mean loss per token, in nats, over windows that each start with <bos> and follow one another."""
    bos, step = stream_N[0], context - 1
    rows = [torch.cat([bos[None], stream_N[i : i + step]]) for i in range(1, len(stream_N) - step, step)]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for part in torch.stack(rows).split(32):
            part = part.to(device)
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            total += float(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
            tokens += part[:, 1:].numel()
    return total / tokens
