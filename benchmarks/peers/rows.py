"""The rows that every program trains on: inputs and outputs of each MLP, from one store, as files that numpy maps."""

import json
from pathlib import Path

import numpy as np
import torch
from crosslace.data.harvest import HarvestSettings, harvest
from crosslace.data.models import load_model
from crosslace.data.store import ActivationStore, is_complete
from crosslace.data.text import DatasetSettings, load_corpus
from crosslace.data.worlds import StdlibSettings, WorldSettings, build_stdlib, build_world
from crosslace.train.transcoder import Reading
from safetensors.torch import save_file

from ..quality import Bench


def prepare(model: str, dataset: str, rows: str, path: Path, layers: list[int] | None = None) -> Bench:
    """The model by name, or one of the bundled ones; its store at `path`, harvested where it is not there yet."""
    if model == "world":
        name = dataset = str(build_world(WorldSettings(size="small")))
    elif model == "stdlib":
        name, dataset = str(build_stdlib(StdlibSettings(size="small"))), "stdlib"
    else:
        name = model
    lm = load_model(name)
    corpus = load_corpus(DatasetSettings(name=dataset), lm.tokenizer)
    if not is_complete(path):
        harvest(lm, corpus, HarvestSettings(path=str(path), tokens=rows, held_out="16K", layers=layers))
    train, held_out = (ActivationStore.open(path, split=split) for split in ("train", "held_out"))
    if layers:
        train, held_out = (store.select(layers, store.sites) for store in (train, held_out))
    return Bench(model, lm, corpus, train, held_out)


def write_rows(bench: Bench, folder: Path, batch: int, steps: int) -> None:
    """What `steps` steps of our training read, as x.npy and y.npy [L, N, D] float16; and the MLPs' weights."""
    reading = Reading(bench.train, "mlp_in", bench.train.layers)  # where other programs read
    folder.mkdir(parents=True, exist_ok=True)
    store, shape = bench.train, (bench.train.n_layers, steps * batch, bench.train.d_model)
    if (folder / "rows.json").is_file() and json.loads((folder / "rows.json").read_text()) == list(shape):
        return
    x, y = (np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape) for name in "xy")
    with store.loader(batch, 0, steps) as loader:
        for step, rows in enumerate(loader):
            part = slice(step * batch, (step + 1) * batch)
            x[:, part] = reading.of(rows).transpose(0, 1).half().numpy()
            y[:, part] = rows.mlp_out.transpose(0, 1).half().numpy()
    weights: dict[str, torch.Tensor] = {}
    for l, layer in enumerate(store.layers):
        parts = bench.lm.layers[layer].mlp_weights
        for name in ("gate", "up", "down") if parts is not None else ():
            affine = getattr(parts, name)
            if affine is not None:
                weights[f"{l}.{name}"] = affine.weight.detach().float().contiguous()
    save_file(weights, folder / "mlps.safetensors")
    (folder / "rows.json").write_text(json.dumps(list(shape)))
