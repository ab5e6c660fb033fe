"""What the two bundled models (`world/`, `stdlib.py`) share: where they are kept, and how they are trained.

A bundled model is a function of its settings, so it is kept in the user's cache folder under a hash of them, and
built once. It is built in a folder beside its place and renamed when whole: an interrupted build leaves nothing that
looks finished.

    settings -> questions (`world/`) or source files (`stdlib.py`) -> tokenizer -> batches, parts of tokens [B, T] and
    weights [B, T] -> `fit` -> a folder with model, tokenizer and a JSON record
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import Progress
from ..muon import Muon


def settings_hash(settings: Any, **more: Any) -> str:
    """Twelve characters that change with any setting, and with whatever else the result depends on."""
    text = json.dumps(asdict(settings) | more, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class LlamaShape:
    """A small Llama and the length of its training."""

    layers: int
    width: int
    heads: int
    mlp: int
    context: int
    steps: int
    batch: int
    lr: float


SPECIAL = ("bos", "eos", "pad")


def small_llama(shape: LlamaShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama, the same for the same seed."""
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **special,
        attention_dropout=0.0,
        dtype="float32",
    )
    with seeded(seed):
        return LlamaForCausalLM(config)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside; outside, nobody's are disturbed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


TrainingBatch = list[tuple[torch.Tensor, torch.Tensor]]
"""Parts of one batch, each of its own length: tokens [B, T], and the weight [B, T] of predicting each (0: padding)."""


def fit(
    model: LlamaForCausalLM,
    shape: LlamaShape,
    batch: Callable[[int], TrainingBatch],
    progress: Progress,
    label: str,
    device: torch.device,
) -> list[float]:
    """Train in place, and return the loss of every step: Muon on the matrices, AdamW on the rest, linearly to zero."""
    torch.nn.Module.to(model, device)
    model.train()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=shape.lr),
        torch.optim.AdamW(others, lr=shape.lr, betas=(0.9, 0.98), weight_decay=0.1),
    ]
    warmup = max(1, min(50, shape.steps // 20))
    rate = lambda step: min((step + 1) / warmup, (shape.steps - step) / (0.6 * shape.steps), 1.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    losses = []
    for step in range(shape.steps):
        parts = [(tokens.to(device), weight[:, 1:].to(device)) for tokens, weight in batch(step)]
        total = sum(weight.sum() for _, weight in parts)
        mean_loss = torch.zeros((), device=device)
        for tokens_BT, weight_BT in parts:
            logits = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
            loss_N = cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
            loss = (loss_N * weight_BT.flatten()).sum() / total
            loss.backward()
            mean_loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(float(mean_loss))
        if step % 10 == 9 or step + 1 == shape.steps:
            progress(label, step + 1, shape.steps, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one small file
    torch.nn.Module.cpu(model)
    model.save_pretrained(folder)
    if drawn:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def is_held_out(document: int, seed: int, share: float) -> bool:
    """Whether a document is held out: by a hash of its index, so that no list of documents is needed."""
    digest = hashlib.blake2b(f"{seed}/{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
