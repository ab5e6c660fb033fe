"""The frontier of quality against sparsity: PLT and CLT, each activation, several L0, several seeds.

    python -m benchmarks.quality                       # the world, all activations, three seeds: hours on a CPU
    python -m benchmarks.quality --quick               # one seed, two activations, fewer steps
    python -m benchmarks.quality --json --model stdlib --activation batchtopk,jumprelu --l0 5,10,20 >> rows.jsonl
    python -m benchmarks.quality --activation batchtopk --l0 10 trainer.precision=bf16   # another recipe
    python -m benchmarks.quality --table rows.jsonl    # mean and spread over seeds of what was measured

One line a transcoder: `nmse`, `dead` and `l0` on held-out rows at the exported thresholds; `top1` and `kl` of the
language model with all its MLPs replaced, against the clean model on held-out text (position 0 and BOS keep the
model's own output). What `--transcoder` takes:

plt         a feature writes to its own layer
plt-wide    the same with as many weights as the CLT of `--features`
clt         a feature writes to all later layers; batchtopk shares its k out over the layers, as `transcoder=clt` does
clt-even    the same with k in every layer
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from crosslace.circuit.replacement.substitute import TranscoderOutput
from crosslace.data.harvest import HarvestSettings, harvest
from crosslace.data.models.language_model import LanguageModel, load_model
from crosslace.data.store.store import ActivationStore
from crosslace.data.text.corpus import Corpus, DatasetSettings, load_corpus
from crosslace.data.worlds.stdlib import StdlibSettings, build_stdlib
from crosslace.data.worlds.world.build import build_world
from crosslace.data.worlds.world.sizes import WorldSettings
from crosslace.launch.settings.compose import compose_config, preset
from crosslace.train.settings import TranscoderSettings
from crosslace.train.start.neurons import model_neurons
from crosslace.train.trainer import train
from crosslace.train.transcoder.transcoder import Transcoder
from torch.nn.functional import kl_div

PLT, CLT = (preset("transcoder", name)[1] for name in ("plt", "clt"))
KINDS: dict[str, dict[str, Any]] = {"plt": PLT, "plt-wide": PLT, "clt": CLT, "clt-even": CLT | {"k_scope": "layer"}}
ACTIVATIONS = ("batchtopk", "topk", "jumprelu", "relu")
SEQUENCES_AT_ONCE = 64


class Bench(NamedTuple):
    """A model, its text, and its activations."""

    name: str
    lm: LanguageModel
    corpus: Corpus
    train: ActivationStore
    held_out: ActivationStore


def prepare(name: str, size: str, rows: str, folder: Path) -> Bench:
    """Build the bundled model where it is missing, and cache its activations."""
    built = build_world(WorldSettings(size=size)) if name == "world" else build_stdlib(StdlibSettings(size=size))
    lm = load_model(str(built))
    corpus = load_corpus(DatasetSettings(name=str(built) if name == "world" else "stdlib"), lm.tokenizer)
    path = str(folder / f"{name}-{size}-{rows}")
    harvest(lm, corpus, HarvestSettings(path=path, tokens=rows, held_out="16K", dtype="float32"))
    return Bench(name, lm, corpus, ActivationStore.open(path), ActivationStore.open(path, split="held_out"))


def features_for(kind: str, features: int, n_layers: int) -> int:
    """plt-wide: as many weights as a CLT of `features`, whose layer l has n_layers - l decoders."""
    if kind != "plt-wide":
        return features
    clt = features * (n_layers + n_layers * (n_layers + 1) / 2)
    return round(clt / (2 * n_layers))


@torch.no_grad()
def behaviour(bench: Bench, transcoder: Transcoder, tokens: int) -> dict[str, float]:
    """top1 and KL(clean || replaced) over predictions of held-out text."""
    agree = divergence = count = 0.0
    for tokens_BT, real_BT in batches(bench, tokens):
        masked_BT = ~real_BT
        masked_BT[:, 0] = True
        clean = bench.lm(tokens_BT).log_softmax(-1)
        with bench.lm.overwrite(TranscoderOutput(transcoder, masked_BT)):
            replaced = bench.lm(tokens_BT).log_softmax(-1)
        chosen = ~masked_BT
        agree += float((clean.argmax(-1) == replaced.argmax(-1))[chosen].sum())
        divergence += float(kl_div(replaced[chosen], clean[chosen], log_target=True, reduction="sum"))
        count += float(chosen.sum())
    return {"top1": agree / count, "kl": divergence / count}


def batches(bench: Bench, tokens: int, at_once: int = SEQUENCES_AT_ONCE) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Held-out sequences side by side, and which of their positions are real."""
    sequences = (sequence.tokens for sequence in bench.corpus.sequences("held_out", limit_tokens=tokens))
    while group := list(itertools.islice(sequences, at_once)):
        real = [torch.ones(len(tokens), dtype=torch.bool) for tokens in group]
        yield (
            torch.nn.utils.rnn.pad_sequence(group, batch_first=True),
            torch.nn.utils.rnn.pad_sequence(real, batch_first=True),
        )


def measure(
    bench: Bench, kind: str, activation: str, l0: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one transcoder and evaluate it."""
    features = features_for(kind, options.features, bench.train.n_layers)
    shape = TranscoderSettings(features=features, activation=activation, **KINDS[kind])
    settings = replace(
        compose_config("train", options.settings).section("trainer"),
        steps=options.steps,
        batch=options.batch,
        seed=seed,
        target_l0=l0,
        eval_every=0,
        checkpoint_every=0,
    )
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as run:
        begin = {"neurons": model_neurons(bench.lm, bench.train, None, shape.read)} if options.init == "mlp" else {}
        result = train(settings, shape, bench.train, bench.held_out, run, **begin)
        transcoder = Transcoder.load(Path(run) / "transcoder")
    overall = result.evaluation["overall"]
    return {
        "model": bench.name,
        "transcoder": kind,
        "init": options.init,
        "settings": options.settings,
        "activation": activation,
        "features": features,
        "parameters": sum(parameter.numel() for parameter in transcoder.parameters()),
        "target_l0": l0,
        "seed": seed,
        "steps": options.steps,
        **{name: overall[name] for name in ("nmse", "l0", "dead", "dense")},
        **behaviour(bench, transcoder, options.text),
        "nmse_by_layer": [row["nmse"] for row in result.evaluation["layers"]],
        "seconds": time.perf_counter() - begun,
    }


def spread(seeds: list[dict[str, Any]], name: str, digits: int) -> str:
    """Mean and (standard deviation)."""
    values = [row[name] for row in seeds]
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ({deviation:.{digits}f})"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for the seeds of one transcoder."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        recipe = ["init=mlp"] * (row["init"] == "mlp") + [word.removeprefix("trainer.") for word in row["settings"]]
        kind = ", ".join([row["transcoder"], *recipe])
        key = row["model"], row["steps"], row["activation"], row["target_l0"], kind
        groups.setdefault(key, []).append(row)
    lines = [
        "| model | steps | activation | L0 | transcoder | weights | seeds | NMSE | dead | top1 | KL |",
        "|---" * 11 + "|",
    ]
    for (model, steps, activation, l0, kind), seeds in sorted(groups.items()):
        measured = " | ".join(
            spread(seeds, name, digits) for name, digits in (("nmse", 4), ("dead", 3), ("top1", 3), ("kl", 3))
        )
        weights = f"{seeds[0]['parameters'] / 1e6:.2f}M"
        lines.append(f"| {model} | {steps} | {activation} | {l0:g} | {kind} | {weights} | {len(seeds)} | {measured} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="trainer.NAME=VALUE", help="as `crosslace train` takes them")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one seed, batchtopk and jumprelu, one L0, 400 steps")
    parser.add_argument("--model", default="world", choices=("world", "stdlib"))
    parser.add_argument("--size", default="small", help="of the bundled model")
    parser.add_argument("--transcoder", default="plt,clt,plt-wide")
    parser.add_argument("--init", choices=("mlp",), help="begin with the MLPs' neurons; random features if not given")
    parser.add_argument("--activation", default=",".join(ACTIVATIONS))
    parser.add_argument("--l0", default="5,10,20")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--stores", type=Path, help="folder where the store stays for the next run; none is kept if not given"
    )
    parser.add_argument(
        "--table", nargs="+", type=Path, help="print the table of these --json lines, and measure nothing"
    )
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rows", default="120K", help="of the store")
    parser.add_argument("--text", type=int, default=16384, help="held-out tokens for top1 and kl")
    options = parser.parse_args(arguments)
    if options.quick:
        options.transcoder, options.activation, options.l0 = "plt,clt", "batchtopk,jumprelu", "10"
        options.seeds, options.steps = "0", 400
    return options


def main() -> None:
    options = parse()
    if options.table:
        print(table([json.loads(line) for file in options.table for line in file.read_text().splitlines()]))
        return
    kinds, activations = options.transcoder.split(","), options.activation.split(",")
    levels = [float(level) for level in options.l0.split(",")]
    if not options.json:
        print(f"{'':9} {'activation':10} {'L0':>6} {'seed':>4} {'nmse':>7} {'dead':>6} {'top1':>6} {'kl':>7} {'s':>5}")
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(options.model, options.size, options.rows, options.stores or Path(folder))
        seeds = map(int, options.seeds.split(","))
        every = [(s, l0, a, k) for s in seeds for l0 in levels for a in activations for k in kinds]
        for seed, l0, activation, kind in every:
            row = measure(bench, kind, activation, l0, seed, options)
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            figures = f"{row['nmse']:7.4f} {row['dead']:6.3f} {row['top1']:6.3f} {row['kl']:7.4f} {row['seconds']:5.0f}"
            print(f"{kind:9} {activation:10} {row['l0']:6.2f} {seed:4d} {figures}", flush=True)


if __name__ == "__main__":
    main()
