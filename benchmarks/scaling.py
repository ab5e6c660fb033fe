"""How training scales from one process to two, and whether the plan foretells bytes and memory.

    python -m benchmarks.scaling                   # a table
    python -m benchmarks.scaling --json            # one JSON object a line
    python -m benchmarks.scaling --memory          # peak memory of three whole runs against the plan

Where features are shared, both exchanges are measured (`parallel.exchange`).

efficiency      seconds of a step on one process / (processes x seconds on a mesh), the same batch in all; a thread each
ceiling         the same where the processes of the mesh do their parts side by side and exchange nothing
sent, planned   bytes that a rank hands to collectives in a step, counted where they are sent, and by `train.plan`
peak, planned   memory of a run of three steps, checkpoint and export included, beyond what its process had before

With GPUs, as many as there are take part, and the meshes are of that many; one GPU alone has nothing to scale over.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from crosslace.data.device import find_device
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.writer import write_store
from crosslace.train.loss.state import Counters, RunningState
from crosslace.train.parallel.collectives import Collectives, SingleProcess
from crosslace.train.parallel.mesh import MeshCollectives, ParallelSettings, processes
from crosslace.train.planning.plan import MachineSettings, Shape, make_plan
from crosslace.train.run.optimizers import Optimizers
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.sparse.workspace import Workspace
from crosslace.train.step import StepParts, objective_of, train_step
from crosslace.train.trainer import Trainer
from crosslace.train.transcoder.partition import new_part

STEPS, WARM = 6, 2
SIZES = {
    "clt": (Shape(6, 256, 10**6, 4), TranscoderSettings(features=4096, k=16), 2048),
    "plt": (Shape(6, 256, 10**6, 4), TranscoderSettings(features=8192, k=16, reach="1"), 2048),
    "clt, four times the batch": (Shape(6, 256, 10**6, 4), TranscoderSettings(features=4096, k=16), 8192),
}
MEMORY = {
    "clt batchtopk 6 x 256 x 8192": (6, 256, TranscoderSettings(features=8192), 1024),
    "clt batchtopk 8 x 384 x 8192": (8, 384, TranscoderSettings(features=8192), 1024),
    "plt jumprelu 4 x 512 x 16384": (
        4,
        512,
        TranscoderSettings(features=16384, activation="jumprelu", reach="1"),
        2048,
    ),
}
NAMES = {
    "reconstructions": "all_reduce_features",
    "actives": "all_gather_features",
    "active_gradients": "reduce_scatter_features",
    "thresholds": "top_threshold",
    "token_thresholds": "row_threshold",
    "gradients": "reduce_gradients",
}
"""What the plan calls that which a collective counts."""


def step_parts(shape: Shape, transcoder: TranscoderSettings, trainer: TrainerSettings, comm: Collectives) -> StepParts:
    part = new_part(transcoder, shape.d_model, list(range(shape.n_layers)), 0, {}, comm).to(find_device("auto"))
    return StepParts(
        trainer, objective_of(trainer, part), part, Optimizers(part, trainer), RunningState(part, trainer),
        Counters(use_sparse=True), None, None, comm, Workspace(),
    )  # fmt: skip


class Unheard(SingleProcess):
    """A rank of a mesh that does its part and exchanges nothing: what is left is the processes' own work."""

    def __init__(self, comm: Collectives) -> None:
        self.data_rank, self.data_ranks = comm.data_rank, comm.data_ranks
        self.feature_rank, self.feature_ranks = comm.feature_rank, comm.feature_ranks

    def top_threshold(self, values: torch.Tensor, count: int) -> torch.Tensor:
        return super().top_threshold(values, count // (self.data_ranks * self.feature_ranks))


def measure_steps(size: str, mesh: ParallelSettings, exchanges: bool = True) -> None:
    """In each process: seconds of a step and bytes sent, printed by the first."""
    shape, transcoder, batch = SIZES[size]
    trainer = steady(batch)
    with processes(mesh, find_device("auto")) as comm:
        parts = step_parts(shape, transcoder, trainer, comm if exchanges else Unheard(comm))
        parts.counters.use_aux = False
        random = torch.Generator().manual_seed(comm.data_rank)
        x = torch.randn(batch // comm.data_ranks, shape.n_layers, shape.d_model, generator=random).to(
            find_device("auto")
        )
        seconds = []
        for number in range(STEPS + WARM):
            wait_for_all(comm)
            begun = time.perf_counter()
            train_step(parts, x, x.flip(-1))
            wait_for_all(comm)
            seconds.append(time.perf_counter() - begun)
            if number == WARM - 1 and isinstance(comm, MeshCollectives):
                comm.sent.clear()
        sent = {name: size / STEPS for name, size in getattr(comm, "sent", {}).items()}
        if comm.is_main:
            print(json.dumps({"seconds": sorted(seconds[WARM:])[STEPS // 2], "sent": sent}))


def wait_for_all(comm: Collectives) -> None:
    """The devices of all processes have done what they were given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    comm.barrier()


def steady(batch: int) -> TrainerSettings:
    """As in the last third of a run: k is final, nothing is dead."""
    return TrainerSettings(batch=batch, steps=100, lr_warmup=0.0, k_share=0.0, aux_weight=0.0, sparse="on")


def measure_memory(size: str) -> None:
    """Print how far the memory of this process rises in a run."""
    _, _, transcoder, batch = MEMORY[size]
    store, run = Path(os.environ["SCALING_STORE"]), tempfile.mkdtemp()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    rows, held_out = (ActivationStore.open(store, split=split) for split in ("train", "held_out"))
    Trainer(short_run(batch), transcoder, rows, held_out, run, device="cpu").run()
    print(json.dumps({"peak": status("VmHWM") - before}))


def status(field: str) -> int:
    """A field of this process's memory, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def short_run(batch: int) -> TrainerSettings:
    return TrainerSettings(
        steps=3, batch=batch, eval_every=0, checkpoint_every=0, eval_tokens=1024, calibrate_tokens=1024, device="cpu"
    )


def child(words: list[str], count: int = 1, **environment: str) -> dict[str, Any]:
    """This program again, in processes of their own with a thread each; what it printed last."""
    launcher = [] if count == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "benchmarks.scaling", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def scaling(count: int) -> list[dict[str, Any]]:
    """One line a size and mesh."""
    lines = []
    for size, (shape, transcoder, batch) in SIZES.items():
        one = child(["--steps-of", size, "1", "1", "auto"])["seconds"]
        machine = MachineSettings(device="cuda" if torch.cuda.is_available() else "cpu")
        trainer = steady(batch)
        for mesh in ((count, 1, "auto"), (1, count, "reconstructions"), (1, count, "actives")):
            found = child(["--steps-of", size, *map(str, mesh)], count)
            unheard = child(["--steps-of", size, *map(str, mesh[:2]), "none"], count)["seconds"]
            plan = make_plan(shape, transcoder, trainer, ParallelSettings(*mesh), machine)
            planned = {name: size for name, size in plan.sent.items() if name in NAMES}  # no rows are read here
            sent = {name: found["sent"].get(NAMES[name], 0.0) for name in planned}
            lines.append(
                {
                    "transcoder": size, "L": shape.n_layers, "D": shape.d_model, "F": transcoder.features, "B": batch,
                    "data": mesh[0], "features": mesh[1], **({"exchange": mesh[2]} if mesh[1] > 1 else {}),
                    "one_s": one, "mesh_s": found["seconds"], "efficiency": one / (count * found["seconds"]),
                    "ceiling": one / (count * unheard),
                    **{f"sent_{name}": value for name, value in sent.items()},
                    **{f"planned_{name}": value for name, value in planned.items()},
                    "sent_in_all": sum(found["sent"].values()), "planned_to_leave_a_rank": plan.moved,
                }
            )  # fmt: skip
    return lines


def memory() -> list[dict[str, Any]]:
    """One line a size."""
    lines = []
    for size, (layers, width, transcoder, batch) in MEMORY.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = write_random(Path(folder) / "store", layers, width)
            found = child(["--memory-of", size], SCALING_STORE=f"{folder}/store", MALLOC_MMAP_THRESHOLD_="65536")
        shape = Shape(layers, width, rows, itemsize=4)
        plan = make_plan(shape, transcoder, short_run(batch), ParallelSettings(), MachineSettings(device="cpu"))
        largest = max(plan.phases, key=lambda phase: plan.phases[phase])
        ratio = plan.device_peak / found["peak"]
        lines.append({"size": size, "peak": found["peak"], "planned": plan.device_peak, "ratio": ratio, "in": largest})
    return lines


def write_random(path: Path, layers: int, width: int, rows: int = 4096, held_out: int = 1024) -> int:
    random = torch.Generator().manual_seed(0)
    sites = {name: torch.randn(rows + held_out, layers, width, generator=random) for name in ("resid", "mlp_out")}
    number = torch.zeros(rows + held_out, dtype=torch.int32)
    layout = StoreLayout(("resid", "mlp_out"), tuple(range(layers)), width, "float32", 64)
    write_store(path, sites, token=number, position=number, document=number, layout=layout, held_out=held_out)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steps-of", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.steps_of:
        size, data, features, exchange = asked.steps_of
        exchanges = exchange != "none"
        measure_steps(size, ParallelSettings(int(data), int(features), exchange if exchanges else "auto"), exchanges)
    elif asked.memory_of:
        measure_memory(asked.memory_of)
    elif torch.cuda.device_count() == 1 and not asked.memory:
        print("one GPU: there is nothing to scale over", file=sys.stderr)
    else:
        lines = memory() if asked.memory else scaling(max(2, torch.cuda.device_count()))
        for line in lines:
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
            print(json.dumps(line) if asked.json else shown)


if __name__ == "__main__":
    main()
