"""Crosslace and other trainers on the same rows in the same order, measured alike: a table, and NMSE over seconds.

    python -m benchmarks.peers                                  # the bundled world: about half an hour on one core
    python -m benchmarks.peers --quick                          # one seed, few steps: does everything run?
    python -m benchmarks.peers --model smollm2 --dataset general --layers 3,11,19,28 --store stores/peers-smollm2 \
        --rows 104K --steps 200 --features 1536 --k 32 --seeds 0 --text 2048
    python -m benchmarks.peers --gpu                            # SmolLM2, 16,384 features, a million rows
    python -m benchmarks.peers --table peers.jsonl              # the table and the chart of what was measured

Each program has an environment of its own, made on first use from the version pinned here, in the user's cache. One
that cannot be made, or a training that fails, is said and left out; the others go on. A program's recipes are its
default and a small grid; the best of the grid by held-out NMSE on the first seed stands beside the default.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from crosslace.data.cache import cache_root
from crosslace.data.errors import UserError

from .measure import figures, load
from .rows import Bench, prepare, write_rows

HERE = Path(__file__).parent
ENVIRONMENTS = {
    "sparsify": ["torch>=2.9", "eai-sparsify==1.3.3", "numpy"],
    "llamascopium": [
        "torch>=2.9",
        "llamascopium==2.0.0b34",
        "transformer-lens>=2.16.2,<4",
    ],  # 4 took away what it imports
}
OURS = "crosslace", "PLT default"
MOST_TIMES = 2
"""At equal seconds a program has at most so many times the steps."""
SCRIPTS = {"crosslace": "ours.py", "sparsify": "in_sparsify.py", "llamascopium": "in_llamascopium.py"}

# (program, name in the table, recipe). A name with "grid" takes part in the choice of its program's best.
# Llamascopium's warm-up of 5,000 steps is meant for some 73,000 (300M tokens): 7% of a training.
RECIPES: list[tuple[str, str, dict[str, Any]]] = [
    ("crosslace", "PLT default", {"kind": "plt", "start": "mlp"}),
    ("crosslace", "PLT default, random start", {"kind": "plt", "start": ""}),
    ("crosslace", "PLT default, read=resid", {"kind": "plt", "start": "mlp", "read": "resid"}),
    ("crosslace", "CLT default", {"kind": "clt", "start": "mlp"}),
    ("sparsify", "default (signum)", {"optimizer": "signum"}),
    ("sparsify", "grid: signum x.3", {"optimizer": "signum", "scale": 0.3}),
    ("sparsify", "grid: adam x3, warm-up 5%", {"optimizer": "adam", "scale": 3.0, "warmup": 0.05}),
    ("sparsify", "grid: adam x10, warm-up 5%", {"optimizer": "adam", "scale": 10.0, "warmup": 0.05}),
    ("sparsify", "grid: muon", {"optimizer": "muon", "warmup": 0.05}),
    ("llamascopium", "PLT default, warm-up 7%", {"kind": "plt", "warmup": 0.07}),
    ("llamascopium", "grid: PLT, rate x5", {"kind": "plt", "lr": 2e-3, "warmup": 0.07, "first_k": 2}),
    ("llamascopium", "grid: PLT, rate x12", {"kind": "plt", "lr": 5e-3, "warmup": 0.07, "first_k": 2}),
    ("llamascopium", "grid: PLT from the MLP, rate x5",
     {"kind": "plt", "lr": 2e-3, "warmup": 0.07, "first_k": 2, "start": "mlp"}),
    ("llamascopium", "grid: PLT from the MLP, rate x12",
     {"kind": "plt", "lr": 5e-3, "warmup": 0.07, "first_k": 2, "start": "mlp"}),
    ("llamascopium", "CLT default, warm-up 7%", {"kind": "clt", "warmup": 0.07}),
    ("llamascopium", "grid: CLT, rate x5", {"kind": "clt", "lr": 2e-3, "warmup": 0.07, "first_k": 2}),
    ("llamascopium", "grid: CLT, rate x12", {"kind": "clt", "lr": 5e-3, "warmup": 0.07, "first_k": 2}),
]  # fmt: skip


def environment(program: str) -> str:
    """The interpreter of a program's own environment, made where it is not there."""
    if program == "crosslace":
        return sys.executable
    home = Path(os.environ.get("CROSSLACE_PEERS") or cache_root() / "peers")
    folder = home / "-".join([program, ENVIRONMENTS[program][1].partition("==")[2]])
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True, clear=True)
        for package in ENVIRONMENTS[program]:
            done = subprocess.run(
                [python, "-m", "pip", "install", "-q", package], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise UserError(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1][:300]}")
        (folder / "ready").touch()
    return str(python)


def train(program: str, job: dict[str, Any], out: Path) -> dict[str, float]:
    """One training in a process of its own: seconds and the peak of memory."""
    out.mkdir(parents=True)
    (out / "job.json").write_text(json.dumps(job | {"out": str(out)}))
    variables = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    if job["device"] == "cpu":
        variables["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels want a GPU wherever Triton is installed
    command = [environment(program), str(HERE / SCRIPTS[program]), str(out / "job.json")]
    with open(out / "log.txt", "w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=variables, check=False).returncode
        except OSError as error:
            raise UserError(f"its environment is broken ({error}); remove {Path(command[0]).parents[1]}") from error
    if code:
        last = [line for line in (out / "log.txt").read_text().splitlines() if line.strip()][-1:]
        raise UserError(f"exit status {code}: {' '.join(last)[:300]}")
    return json.loads((out / "done.json").read_text())


def one(
    bench: Bench, program: str, name: str, recipe: dict, seed: int, steps: int, options: argparse.Namespace,
    equal: str = "tokens",
) -> dict | None:  # fmt: skip
    """Train, import, measure, unless that was done before; None, with the reason printed, where it fails."""
    who = {"program": program, "name": name, "seed": seed, "equal": equal}
    for row in read_rows(options.out):
        if all(row[key] == value for key, value in who.items()) and (row["steps"] == steps or equal == "seconds"):
            return row
    job = {
        "rows": options.store + ".rows", "store": options.store, "model": bench.lm.name,
        "layers": list(bench.train.layers), "steps": steps, "batch": options.batch, "features": options.features,
        "k": options.k, "seed": seed, "threads": options.threads, "recipe": recipe, "device": options.device,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            cost = train(program, job, Path(folder) / "out")
            row = figures(load(program, Path(folder) / "out", bench), bench, options.text)
        except UserError as error:
            print(f"{program:13} {name}: left out: {error}", flush=True)
            return None
    row |= {**who, "steps": steps, "batch": options.batch, **cost, "model": options.model}
    row |= {"features": options.features, "k": options.k, "processor": processor()}
    shown = "  ".join(f"{key} {row[key]:.4g}" for key in ("nmse", "dead", "ce_recovered", "kl", "cpu_seconds"))
    print(f"{program:13} {name:35} seed {seed} steps {steps:5} of equal {equal:7} {shown}", flush=True)
    with open(options.out, "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def read_rows(path: str | Path) -> list[dict]:
    """What was measured before."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).is_file() else []


def processor() -> str:
    """What the machine calls its processor, with what of its instructions matters here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def measure(options: argparse.Namespace) -> None:
    """Every recipe on the first seed at full length; then defaults and bests on the other seeds and lengths, and with
    as many steps as take as long as our default does."""
    lengths = sorted(map(int, options.steps.split(",")))
    seeds = list(map(int, options.seeds.split(",")))
    layers = [int(layer) for layer in options.layers.split(",")] if options.layers else None
    bench = prepare(options.model, options.dataset, options.rows, Path(options.store), layers)
    write_rows(bench, Path(options.store + ".rows"), options.batch, MOST_TIMES * lengths[-1])
    clock = "cpu_seconds" if options.device == "cpu" else "seconds"
    for program in options.only.split(","):
        chosen, grids = [], {}
        try:
            environment(program)
        except UserError as error:
            print(f"{program}: left out: {error}", flush=True)
            continue
        for recipe in (each for each in RECIPES if each[0] == program and re.search(options.match, each[1])):
            row = one(bench, *recipe, seed=seeds[0], steps=lengths[-1], options=options)
            if row is None:
                continue
            if "grid" not in recipe[1]:
                chosen.append(recipe)
            kind = recipe[2].get("kind", "plt")
            grids[kind] = min(grids.get(kind, (row["nmse"], recipe)), (row["nmse"], recipe), key=lambda pair: pair[0])
        chosen += [recipe for _, recipe in grids.values() if recipe not in chosen]
        for seed, steps, recipe in itertools.product(seeds, lengths, chosen):
            one(bench, *recipe, seed=seed, steps=steps, options=options)
        for recipe in chosen:
            longest = [row for row in read_rows(options.out) if (row["equal"], row["steps"]) == ("tokens", lengths[-1])]
            took = {(row["program"], row["name"]): row[clock] for row in longest if row["seed"] == seeds[0]}
            if OURS in took and recipe[:2] in took:
                steps = round(min(took[OURS] / took[recipe[:2]], MOST_TIMES) * lengths[-1])
                one(bench, *recipe, seed=seeds[0], steps=steps, options=options, equal="seconds")


def mean(group: list[dict], name: str) -> float:
    """Over seeds."""
    return sum(row[name] for row in group) / len(group)


def least(group: list[dict]) -> float:
    """CPU seconds of the seed that other work on the machine disturbed least."""
    return min(row["cpu_seconds"] for row in group)


def table(rows: list[dict]) -> str:
    """Markdown: at equal tokens for each length, then at equal seconds; means over seeds, the range of NMSE, and the
    least CPU seconds of the seeds, to which other work adds."""
    columns = (
        "| program | recipe | seeds | steps | NMSE | range | FVU | L0 | dead | CE recovered | KL | CPU s | peak GB |"
    )
    lines = []

    for equal, steps in sorted({(row["equal"], row["steps"] if row["equal"] == "tokens" else 0) for row in rows}):
        what = f"equal tokens, {steps} steps" if steps else "equal seconds: those of our PLT default"
        lines += [f"\n**{what}**\n", columns, "|---" * 13 + "|"]
        groups: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            if row["equal"] == equal and (not steps or row["steps"] == steps):
                groups.setdefault((row["program"], row["name"]), []).append(row)
        for (program, name), group in sorted(groups.items(), key=lambda item: mean(item[1], "nmse")):
            errors = [row["nmse"] for row in group]
            lines.append(
                f"| {program} | {name} | {len(group)} | {mean(group, 'steps'):.0f} | {mean(group, 'nmse'):.4f} "
                f"| {min(errors):.4f} to {max(errors):.4f} | {mean(group, 'fvu'):.4f} | {mean(group, 'l0'):.1f} "
                f"| {mean(group, 'dead'):.1%} | {mean(group, 'ce_recovered'):.3f} | {mean(group, 'kl'):.3f} "
                f"| {least(group):.0f} | {mean(group, 'peak') / 1e9:.2f} |"
            )
    return "\n".join(lines)


def chart(rows: list[dict], path: Path) -> None:
    """NMSE (the mean over seeds) over CPU seconds, a line for each recipe that was trained at several lengths."""
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "peers"
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = {"crosslace": "#1f6f8b", "sparsify": "#c8553d", "llamascopium": "#6a4c93"}
    points: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for row in rows:
        if row["equal"] == "tokens":
            points.setdefault((row["program"], row["name"]), {}).setdefault(row["steps"], []).append(row)
    styles: dict[str, Any] = {program: iter(["-", "--", ":", "-.", (0, (1, 4))] * 9) for program in colours}
    longest = max(map(len, points.values()))
    for (program, name), by_steps in sorted(points.items()):
        if len(by_steps) < longest:
            continue
        groups = [group for _, group in sorted(by_steps.items())]
        seconds, nmse = [least(group) for group in groups], [mean(group, "nmse") for group in groups]
        label = f"{program}: {name.removeprefix('grid: ')}"
        axes.plot(seconds, nmse, ls=next(styles[program]), marker="o", color=colours[program], label=label)
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds of the training", ylabel="held-out NMSE")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:.2g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="world", help="world, stdlib, or a model as `crosslace` takes it")
    parser.add_argument("--dataset", default="", help="of a model that is not bundled")
    parser.add_argument("--store", default="stores/peers-world", help="made where it is missing")
    parser.add_argument("--layers", default="", help="3,11,19, say; all of the store's where not given")
    parser.add_argument("--rows", default="200K", help="of the store; read again where training is longer")
    parser.add_argument("--steps", default="200,800", help="lengths of training")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--features", type=int, default=512, help="a layer")
    parser.add_argument("--k", type=int, default=10, help="features a token and layer")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--text", type=int, default=8192, help="held-out tokens for KL and CE recovered")
    parser.add_argument("--only", default="crosslace,sparsify,llamascopium")
    parser.add_argument("--match", default="", help="recipes in whose names this regular expression is found")
    parser.add_argument(
        "--out", default="peers.jsonl", help="a line a training is added; what it holds is not repeated"
    )
    parser.add_argument("--chart", type=Path, default=Path("peers.svg"))
    parser.add_argument("--table", type=Path, help="the table and the chart of such a file, and no training")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 and 40 steps")
    parser.add_argument("--gpu", action="store_true", help="SmolLM2, four layers, 16,384 features, a million rows")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.rows, options.text = "0", "20,40", "42K", 2048
    if options.gpu:
        options.model, options.dataset, options.layers, options.store = (
            "smollm2",
            "general",
            "3,11,19,28",
            "stores/peers-gpu",
        )
        options.rows, options.steps, options.batch, options.features, options.k = "1M", "250,1000", 4096, 16384, 32
        options.device, options.seeds = "cuda", "0"
    return options


def main() -> None:
    options = parse()
    if not options.table:
        try:
            measure(options)
        except UserError as error:
            raise SystemExit(str(error)) from error
    rows = read_rows(options.table or options.out)
    if not rows:
        raise SystemExit("nothing was measured")
    print(table(rows))
    chart(rows, options.chart)
    print(f"\n{options.chart}: NMSE over seconds")


if __name__ == "__main__":
    main()
