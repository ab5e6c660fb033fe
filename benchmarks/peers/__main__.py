"""Crosslace and other trainers on the same rows in the same order, measured alike: a table, and NMSE over seconds.

    python -m benchmarks.peers                                  # the bundled world: about 20 minutes on two cores
    python -m benchmarks.peers --quick                          # one seed, few steps: does everything run?
    python -m benchmarks.peers --model smollm2 --dataset general --store stores/smollm2 --rows 110K \
        --steps 200 --batch 512 --features 1536 --k 32 --seeds 0 --only crosslace,sparsify
    python -m benchmarks.peers --table peers.jsonl              # the table and the chart of what was measured

Each program has an environment of its own, made on first use from the version pinned here, in the user's cache. One
that cannot be made, or a training that fails, is said and left out; the others go on. A program's recipes are its
default and a small grid; the best of the grid by held-out NMSE on the first seed stands beside the default.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
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
SCRIPTS = {"crosslace": "ours.py", "sparsify": "in_sparsify.py", "llamascopium": "in_llamascopium.py"}

FAST = {"trainer.lr_scale": 24, "trainer.lr_decay": 0.4, "trainer.dead_after": 30_000}
X6 = {"trainer.lr_scale": 6}

# (program, name in the table, recipe). A name with "grid" takes part in the choice of its program's best.
RECIPES: list[tuple[str, str, dict[str, Any]]] = [
    ("crosslace", "PLT default, from neurons", {"kind": "plt", "start": "mlp"}),
    ("crosslace", "PLT default, random start", {"kind": "plt", "start": ""}),
    ("crosslace", "PLT default, mlp_in, from neurons", {"kind": "plt", "start": "mlp", "read": "mlp_in"}),
    ("crosslace", "grid: PLT, rate x24", {"kind": "plt", "start": "mlp", **FAST}),
    ("crosslace", "grid: PLT, mlp_in, rate x6", {"kind": "plt", "start": "mlp", "read": "mlp_in", **FAST, **X6}),
    ("crosslace", "grid: PLT, mlp_in, rate x24", {"kind": "plt", "start": "mlp", "read": "mlp_in", **FAST}),
    ("crosslace", "grid: PLT, mlp_in, rate x24, random start", {"kind": "plt", "start": "", "read": "mlp_in", **FAST}),
    ("crosslace", "CLT default, from neurons", {"kind": "clt", "start": "mlp"}),
    ("crosslace", "grid: CLT, rate x24", {"kind": "clt", "start": "mlp", **FAST}),
    ("crosslace", "grid: CLT, mlp_in, rate x24", {"kind": "clt", "start": "mlp", "read": "mlp_in", **FAST}),
    ("sparsify", "default (signum)", {"optimizer": "signum"}),
    ("sparsify", "grid: signum x.3", {"optimizer": "signum", "scale": 0.3}),
    ("sparsify", "grid: adam", {"optimizer": "adam"}),
    ("sparsify", "grid: adam x3, warm-up 5%", {"optimizer": "adam", "scale": 3.0, "warmup": 0.05}),
    ("sparsify", "grid: adam x10, warm-up 5%", {"optimizer": "adam", "scale": 10.0, "warmup": 0.05}),
    ("sparsify", "grid: muon", {"optimizer": "muon", "warmup": 0.05}),
    ("llamascopium", "PLT default", {"kind": "plt"}),
    ("llamascopium", "grid: PLT, warm-up 5%", {"kind": "plt", "warmup": 0.05, "first_k": 2}),
    ("llamascopium", "grid: PLT, rate x5, warm-up 5%", {"kind": "plt", "lr": 2e-3, "warmup": 0.05, "first_k": 2}),
    ("llamascopium", "grid: PLT from the MLP, rate x5, warm-up 5%",
     {"kind": "plt", "lr": 2e-3, "warmup": 0.05, "first_k": 2, "start": "mlp"}),
    ("llamascopium", "CLT default", {"kind": "clt"}),
    ("llamascopium", "grid: CLT, warm-up 5%", {"kind": "clt", "warmup": 0.05, "first_k": 2}),
    ("llamascopium", "grid: CLT, rate x5, warm-up 5%", {"kind": "clt", "lr": 2e-3, "warmup": 0.05, "first_k": 2}),
]  # fmt: skip


def environment(program: str) -> str:
    """The interpreter of a program's own environment, made where it is not there."""
    if program == "crosslace":
        return sys.executable
    home = Path(os.environ.get("CROSSLACE_PEERS", Path.home() / ".cache" / "crosslace" / "peers"))
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
    command = [environment(program), str(HERE / SCRIPTS[program]), str(out / "job.json")]
    with open(out / "log.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=variables, check=False).returncode
    if code:
        last = [line for line in (out / "log.txt").read_text().splitlines() if line.strip()][-1:]
        raise UserError(f"exit status {code}: {' '.join(last)[:300]}")
    return json.loads((out / "done.json").read_text())


def one(bench: Bench, rows: Path, program: str, name: str, recipe: dict, seed: int, steps: int, options) -> dict | None:
    """Train, import, measure; None, with the reason printed, where that fails."""
    job = {
        "rows": str(rows), "store": options.store, "model": bench.lm.name, "layers": list(bench.train.layers),
        "steps": steps, "batch": options.batch, "features": options.features, "k": options.k, "seed": seed,
        "threads": options.threads, "recipe": recipe,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            cost = train(program, job, Path(folder) / "out")
            row = figures(load(program, Path(folder) / "out", bench), bench, options.text)
        except UserError as error:
            print(f"{program:13} {name}: left out: {error}", flush=True)
            return None
    row |= {"program": program, "name": name, "seed": seed, "steps": steps, "batch": options.batch, **cost}
    row |= {"model": options.model, "features": options.features, "k": options.k, "processor": processor()}
    shown = "  ".join(f"{key} {row[key]:.4g}" for key in ("nmse", "fvu", "l0", "dead", "ce_recovered", "kl", "seconds"))
    print(f"{program:13} {name:45} seed {seed} steps {steps:5}  {shown}", flush=True)
    with open(options.out, "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def processor() -> str:
    """What the machine calls its processor, with what of its instructions matters here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def measure(options: argparse.Namespace) -> None:
    """Every recipe on the first seed at full length; then defaults and bests on the other seeds and lengths."""
    lengths = sorted(map(int, options.steps.split(",")))
    seeds = list(map(int, options.seeds.split(",")))
    bench = prepare(options.model, options.dataset, options.rows, Path(options.store))
    rows = Path(options.store + ".rows")
    write_rows(bench, rows, options.batch, lengths[-1])
    chosen = []
    for program in options.only.split(","):
        grids: dict[str, tuple[float, Any]] = {}
        try:
            environment(program)
        except UserError as error:
            print(f"{program}: left out: {error}", flush=True)
            continue
        for recipe in (recipe for recipe in RECIPES if recipe[0] == program):
            row = one(bench, rows, *recipe, seed=seeds[0], steps=lengths[-1], options=options)
            if row is None:
                continue
            if "grid" not in recipe[1]:
                chosen.append(recipe)
            kind = recipe[2].get("kind", "plt")
            if row["nmse"] < grids.get(kind, (float("inf"), None))[0]:
                grids[kind] = row["nmse"], recipe
        chosen += [recipe for _, recipe in grids.values() if recipe not in chosen]
    for recipe in chosen:
        for seed in seeds:
            for steps in lengths if seed == seeds[0] else lengths[-1:]:
                if (seed, steps) != (seeds[0], lengths[-1]):
                    one(bench, rows, *recipe, seed=seed, steps=steps, options=options)


def table(rows: list[dict]) -> str:
    """Markdown: one line a recipe at the longest training, mean over seeds and the range of NMSE."""
    longest = max(row["steps"] for row in rows)
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["steps"] == longest:
            groups.setdefault((row["program"], row["name"]), []).append(row)
    columns = "| program | recipe | seeds | NMSE | range | FVU | L0 | dead | CE recovered | KL | CPU s | peak GB |"
    lines = [columns, "|---" * 12 + "|"]

    def mean(group: list[dict], name: str) -> float:
        return sum(row[name] for row in group) / len(group)

    for (program, name), group in sorted(groups.items(), key=lambda item: mean(item[1], "nmse")):
        errors = [row["nmse"] for row in group]
        lines.append(
            f"| {program} | {name} | {len(group)} | {mean(group, 'nmse'):.4f} | {min(errors):.4f} to {max(errors):.4f} "
            f"| {mean(group, 'fvu'):.4f} | {mean(group, 'l0'):.1f} | {mean(group, 'dead'):.1%} "
            f"| {mean(group, 'ce_recovered'):.3f} | {mean(group, 'kl'):.3f} | {mean(group, 'cpu_seconds'):.0f} "
            f"| {mean(group, 'peak') / 1e9:.2f} |"
        )
    return "\n".join(lines)


def chart(rows: list[dict], path: Path) -> None:
    """NMSE over CPU seconds of the first seed, a line for each recipe that was trained at several lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    first = min(row["seed"] for row in rows)
    colours = {"crosslace": "#1f6f8b", "sparsify": "#c8553d", "llamascopium": "#6a4c93"}
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["seed"] == first:
            lines.setdefault((row["program"], row["name"]), []).append(row)
    styles = iter(["-", "--", ":", "-."] * len(lines))
    for (program, name), points in sorted(lines.items()):
        if len(points) < 2 and len({row["steps"] for row in rows}) > 1:
            continue
        points.sort(key=lambda row: row["steps"])
        axes.plot(
            [row["cpu_seconds"] for row in points], [row["nmse"] for row in points], next(styles), marker="o",
            color=colours[program], label=f"{program}: {name.removeprefix('grid: ')}",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds of the whole process", ylabel="held-out NMSE")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="world", help="world, stdlib, or a model as `crosslace` takes it")
    parser.add_argument("--dataset", default="", help="of a model that is not bundled")
    parser.add_argument("--store", default="stores/peers-world", help="made where it is missing, with resid and mlp_in")
    parser.add_argument("--rows", default="112K", help="of the store; read again where training is longer")
    parser.add_argument("--steps", default="100,200,400", help="lengths of training; the table shows the longest")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--features", type=int, default=768, help="a layer")
    parser.add_argument("--k", type=int, default=10, help="features a token and layer")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--text", type=int, default=8192, help="held-out tokens for KL and CE recovered")
    parser.add_argument("--only", default="crosslace,sparsify,llamascopium")
    parser.add_argument("--out", default="peers.jsonl", help="one line a training is added to it")
    parser.add_argument("--chart", type=Path, default=Path("peers.svg"))
    parser.add_argument("--table", type=Path, help="the table and the chart of such a file, and no training")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 and 40 steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.rows, options.text = "0", "20,40", "42K", 2048
    return options


def main() -> None:
    options = parse()
    if not options.table:
        measure(options)
    rows = [json.loads(line) for line in Path(options.table or options.out).read_text().splitlines()]
    print(table(rows))
    chart(rows, options.chart)
    print(f"\n{options.chart}: NMSE over seconds")


if __name__ == "__main__":
    main()
