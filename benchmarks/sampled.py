"""What text that a language model writes itself is worth: a transcoder trained on it, measured on real text, and the
other way round.

    python -m benchmarks.sampled --size small --tokens 100K

One line for each pair of the text of training and the held-out text of measuring, on the bundled `stdlib` model.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from crosslace.data.harvest import HarvestSettings, harvest
from crosslace.data.models import ModelSettings, load_model
from crosslace.data.pages import keep_pages
from crosslace.data.store import ActivationStore
from crosslace.data.text import DatasetSettings, load_corpus
from crosslace.data.worlds import build_stdlib
from crosslace.data.worlds.stdlib import StdlibSettings
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.trainer import train
from crosslace.train.transcoder import Transcoder
from crosslace.train.transcoder.reading import Reading

TEXTS = ("stdlib", "sampled")


@torch.inference_mode()
def nmse(transcoder: Transcoder, held_out: ActivationStore) -> float:
    """Mean over layers of the squared error's share of the variance."""
    mean = held_out.statistics.mean["mlp_out"]
    parts, reading = [], Reading(held_out, transcoder.settings.read, held_out.layers)
    for batch in held_out.rows_in_order(2048):
        y = batch.y.float()
        error = (y - transcoder(reading.of(batch).float())).square().sum((0, 2))
        parts.append(torch.stack([error, (y - mean).square().sum((0, 2))]))
    error, variance = torch.stack(parts).sum(0)
    return (error / variance).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Sampled text against real text.")
    parser.add_argument("--size", default="small", help="of the stdlib model")
    parser.add_argument("--model-steps", type=int, default=None, help="steps of the stdlib model's training")
    parser.add_argument("--tokens", default="100K", help="rows of training")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_pages()
    lm = load_model(ModelSettings(name=str(build_stdlib(StdlibSettings(options.size, steps=options.model_steps)))))
    shape = TranscoderSettings(features=options.features, k=16, reach="1")
    trainer = TrainerSettings(
        steps=options.steps,
        seed=options.seed,
        eval_every=0,
        eval_tokens=2048,
        checkpoint_every=0,
        calibrate_tokens=4096,
    )
    with tempfile.TemporaryDirectory(prefix="crosslace-bench-") as folder:
        held_out, trained = {}, {}
        for name in TEXTS:
            path = Path(folder, name)
            text = DatasetSettings(name=name, sequence_length=min(256, lm.context_length))
            settings = HarvestSettings(path=str(path), tokens=options.tokens, held_out="10K", shuffle_rows=65536)
            harvest(lm, load_corpus(text, lm.tokenizer, lm, keep=True), settings)
            held_out[name] = ActivationStore.open(path, "held_out")
            train(trainer, shape, ActivationStore.open(path), held_out[name], Path(folder, f"run-{name}"))
            trained[name] = Transcoder.load(Path(folder, f"run-{name}", "transcoder"))
        for text in TEXTS:
            found = {f"nmse_on_{measured}": round(nmse(trained[text], held_out[measured]), 4) for measured in TEXTS}
            print(json.dumps({"trained_on": text, "model": options.size} | found), flush=True)


if __name__ == "__main__":
    main()
