"""One training by Crosslace: `python ours.py JOB.json`."""

import json
import sys
from pathlib import Path

import torch
from crosslace.data.models import load_model
from crosslace.data.store import ActivationStore
from crosslace.launch.settings import compose_config, preset
from crosslace.train.settings import TranscoderSettings
from crosslace.train.start import model_neurons
from crosslace.train.trainer import train
from crosslace.train.transcoder import read_chosen
from job import Clock, finish


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    recipe = dict(job["recipe"])
    kind, start = recipe.pop("kind"), recipe.pop("start")
    shape = preset("transcoder", kind)[1] | {"features": job["features"], "layers": job["layers"]}
    store, held_out = (ActivationStore.open(job["store"], split=split) for split in ("train", "held_out"))
    wanted = read_chosen(TranscoderSettings(**shape | {"read": recipe.pop("read", "auto")}), store)
    given = {
        "trainer.steps": job["steps"], "trainer.batch": job["batch"], "trainer.seed": job["seed"],
        "trainer.target_l0": job["k"], "trainer.eval_every": 0, "trainer.checkpoint_every": 0,
        "trainer.device": job["device"], **recipe,
    }  # fmt: skip
    settings = compose_config("train", [f"{name}={value}" for name, value in given.items()]).section("trainer")
    lm = load_model(job["model"]) if start == "mlp" else None  # no part of any program's training
    clock = Clock()
    begin = {} if lm is None else {"neurons": model_neurons(lm, store, wanted.layers, wanted.read)}
    train(settings, wanted, store, held_out, Path(job["out"]) / "run", **begin)
    finish(job["out"], clock.read())


if __name__ == "__main__":
    main(sys.argv[1])
