"""Restarts of dead features, the auxiliary loss and what is read: measured on models with and without large rows.

    python -m benchmarks.large_rows restarts --model world,stdlib,sandwich,sandwich-sinks --seeds 3 --out rows.jsonl
    python -m benchmarks.large_rows reads --model world,stdlib,sandwich --out rows.jsonl
    python -m benchmarks.large_rows restarts --model smollm2 --store PATH --layers 3,11,19,28 --out rows.jsonl
    python -m benchmarks.large_rows table --out rows.jsonl
    python -m benchmarks.large_rows picture --model smollm2,sandwich-untrained --store PATH

One line a transcoder: `nmse`, `nmse_median`, `worst_share` and `dead` on held-out rows; `kl` of the language model with
all its MLPs replaced, against the clean one; for `reads` also the replacement score and the slope of faithfulness to
logits. What a file holds already is left out, so that a run that was cut off goes on.

world, stdlib   the bundled models: the small world, the tiny model of stdlib's text after 400 steps
sandwich        a Gemma 2 of 6 layers and width 128, norms before and after its MLPs, trained for 200 steps on the
                world's text, one token's embedding then made 40 times as long as usual: its rows are sinks, and masked
sandwich-sinks  the same with the sinks left in (store.sinks=first)
smollm2         SmolLM2-135M, from a store that was cached before, of some layers or all

All with the trainer's defaults.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from crosslace.circuit.judge import EvalSettings, evaluate
from crosslace.circuit.model import ReplacementModel
from crosslace.data.cache import cache_root
from crosslace.data.harvest.harvest import HarvestSettings, harvest
from crosslace.data.models.language_model import LanguageModel, load_model
from crosslace.data.store.store import ActivationStore
from crosslace.data.text.corpus import Corpus, DatasetSettings, load_corpus
from crosslace.data.worlds.stdlib import StdlibSettings, build_stdlib
from crosslace.data.worlds.world.build import build_world
from crosslace.data.worlds.world.sizes import WorldSettings
from crosslace.launch.verbs.evaluate import evaluation_text
from crosslace.train.parallel import SINGLE
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.start.neurons import model_neurons
from crosslace.train.trainer import train
from crosslace.train.transcoder.transcoder import Transcoder

RESTARTS = {
    "both": {},
    "restarts": {"aux_weight": 0.0},
    "auxiliary": {"resample_every": 0},
    "neither": {"resample_every": 0, "aux_weight": 0.0},
}
SHAPES = {
    "world": (TranscoderSettings(features=384, k=10), 300),
    "stdlib": (TranscoderSettings(features=256, k=10), 250),
    "sandwich": (TranscoderSettings(features=256, k=16, reach="1"), 250),
    "smollm2": (TranscoderSettings(features=768, k=32, reach="1"), 130),
}
TRAINER = TrainerSettings(batch=512, eval_every=0, checkpoint_every=0, calibrate_tokens=8192)
SINK_TIMES = 40.0
TITLES = {"smollm2": "SmolLM2-135M", "sandwich-untrained": "a sink planted"}
STDLIB = StdlibSettings(size="tiny", steps=400)


def sandwich(steps: int) -> tuple[LanguageModel, Corpus]:
    """Built once, and kept in the cache."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    world, folder = str(build_world(WorldSettings(size="small"))), cache_root() / f"sandwich-benchmark-{steps}"
    tokenizer = AutoTokenizer.from_pretrained(world)
    corpus = load_corpus(DatasetSettings(name=world), tokenizer)
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
            max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, pad_token_id=0,
        )  # fmt: skip
        model = Gemma2ForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        text = torch.cat([s.tokens for s in itertools.islice(corpus.sequences(), 20_000)])
        windows = itertools.cycle(text[: len(text) // 128 * 128].view(-1, 128))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20, (steps - step) / 60)
            tokens = torch.stack([next(windows) for _ in range(16)])
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        counts = torch.bincount(text, minlength=len(tokenizer))
        sink = int((counts - len(text) / 1000).abs().argmin())  # about one in a thousand
        weight = model.model.embed_tokens.weight.data
        weight[sink] = torch.nn.functional.normalize(torch.randn(128), dim=0) * weight.norm(dim=1).median() * SINK_TIMES
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return load_model(str(folder)), corpus


def prepare(name: str, store: str | None) -> tuple[LanguageModel, Corpus, list[ActivationStore]]:
    """A model, its text, and its rows: training and held-out."""
    if name.startswith("sandwich"):
        lm, corpus = sandwich(0 if name == "sandwich-untrained" else 200)
    else:
        built = {"world": lambda: build_world(WorldSettings(size="small")), "smollm2": lambda: "smollm2"}
        model = build_stdlib(STDLIB) if name == "stdlib" else built[name]()
        lm = load_model(str(model))
        text = {"world": str(model), "smollm2": "general"}.get(name, "stdlib")
        length = 128 if name == "stdlib" else 256
        corpus = load_corpus(DatasetSettings(name=text, sequence_length=length), lm.tokenizer)
    path = store or str(Path(tempfile.gettempdir()) / f"crosslace-large-rows-{name}")
    sinks = "first" if name.startswith("sandwich-") else "auto"
    if store is None:
        tokens = "8K" if name == "sandwich-untrained" else "120K"
        settings = HarvestSettings(path=path, tokens=tokens, held_out="8K", shuffle_rows=65536, sinks=sinks)
        harvest(lm, corpus, settings)
    return lm, corpus, [ActivationStore.open(path, split=split) for split in ("train", "held_out")]


def measure(
    name: str, bench: tuple[LanguageModel, Corpus, list[ActivationStore]], read: str, options: dict[str, Any],
    seed: int, graphs: bool, tokens: int, layers: list[int] | None,
) -> dict[str, Any]:  # fmt: skip
    """Train one transcoder and evaluate it."""
    lm, corpus, stores = bench
    shape, steps = SHAPES[name.removesuffix("-sinks")]
    shape, settings = replace(shape, read=read, layers=layers), replace(TRAINER, seed=seed, steps=steps, **options)
    with tempfile.TemporaryDirectory() as folder:
        neurons = model_neurons(lm, stores[0], layers, read)
        meta = {"masked": stores[0].attributes["masked"]}
        result = train(settings, shape, *stores, run_dir=folder, neurons=neurons, meta=meta)
        transcoder = Transcoder.load(Path(folder) / "transcoder")
    held = result.evaluation["overall"]
    model = ReplacementModel(lm, transcoder)
    asked = EvalSettings(
        tokens=tokens, calibration_tokens=2048, layers=False, controls=False, prompts=6 if graphs else 0,
        pairs=150 if graphs else 0, max_nodes=1024,
    )  # fmt: skip
    found = evaluate(model, evaluation_text(model, corpus, asked, SINGLE), asked)
    row = {name: held[name] for name in ("nmse", "nmse_median", "worst_share", "dead", "l0")}
    row["kl"] = found["behaviour"]["kl"]
    if graphs:
        row |= {
            "score": found["graph"]["replacement_score"],
            "slope": found["faithfulness"]["to_logits"]["graph"]["slope"],
        }
    return row


def table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, and the largest distance from them."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["model"], row["variant"]), []).append(row)
    for key, group in groups.items():
        words = []
        for figure in ("nmse", "nmse_median", "kl", "dead"):
            values = [row[figure] for row in group]
            mean = statistics.mean(values)
            words.append(f"{figure} {mean:.4f} ±{max(abs(v - mean) for v in values):.4f}")
        print(*key, f"{len(group)} seeds:", ", ".join(words))


def picture(names: list[str], store: str | None) -> None:
    """docs/images/sorted_norms.svg: the largest norms of the residual stream in two models, sorted, in medians."""
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "norms"
    figure, axes = plt.subplots(1, len(names), figsize=(8, 2.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        _, _, (_, rows) = prepare(name, store if name == "smollm2" else None)
        sample = rows.batch(0, 0, min(16_000, len(rows))).resid
        norms_NL = sample.float().norm(dim=2)
        layer = int((norms_NL.amax(0) / norms_NL.median(0).values).argmax())  # with the longest tail
        norms = norms_NL[:, layer].sort(descending=True).values
        shown = norms[: len(norms) // 20] / norms.median()
        axis.plot(range(1, len(shown) + 1), shown, ".", markersize=3)
        axis.set(
            xscale="log",
            yscale="log",
            title=f"{TITLES.get(name, name)}, layer {layer}",
            xlabel="row, the largest first",
        )
    axes[0].set_ylabel("norm, in medians")
    figure.savefig(Path(__file__).parents[1] / "docs/images/sorted_norms.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["restarts", "reads", "table", "picture"])
    parser.add_argument("--model", default="world,stdlib,sandwich,sandwich-sinks")
    parser.add_argument("--store", help="a store that was cached before")
    parser.add_argument("--layers", help="3,11,19, say; all of the store's where not given")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=6000, help="held-out tokens for KL")
    parser.add_argument("--out", default="rows.jsonl", help="a file of JSON lines, added to")
    options = parser.parse_args()
    out = Path(options.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    if options.what == "table":
        return table(rows)
    if options.what == "picture":
        return picture(options.model.split(","), options.store)
    done = {(row["what"], row["model"], row["variant"], row["seed"]) for row in rows}
    layers = [int(layer) for layer in options.layers.split(",")] if options.layers else None
    cases = RESTARTS if options.what == "restarts" else {"resid": {}, "mlp_in": {}}
    for name in options.model.split(","):
        bench = None
        for seed in range(options.seeds):
            for variant, changes in cases.items():
                if (options.what, name, variant, seed) in done:
                    continue
                bench = bench or prepare(name, options.store)
                read = variant if options.what == "reads" else "mlp_in"
                row = {"what": options.what, "model": name, "variant": variant, "seed": seed}
                row |= measure(name, bench, read, changes, seed, options.what == "reads", options.tokens, layers)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
