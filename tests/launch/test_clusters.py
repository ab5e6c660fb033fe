"""Verbs on several real processes: torchrun, accelerate, two machines, a killed rank, and submitit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crosslace import Transcoder
from crosslace.data.errors import UserError
from crosslace.launch.workspace import runs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WORKER = Path(__file__).with_name("processes_worker.py")
TRAIN = [
    "transcoder.features=32", "transcoder.k=3", "trainer.steps=40", "trainer.batch=64", "trainer.eval_tokens=128",
    "trainer.calibrate_tokens=256", "trainer.eval_every=0", "trainer.checkpoint_every=10", "trainer.log_every=10",
    "trainer.lr=1e-3", "wandb.mode=disabled",
]  # fmt: skip
EVAL = ["eval.tokens=2000", "eval.calibration_tokens=1000", "eval.prompts=3", "eval.pairs=40", "eval.layers=false"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finished(command: Sequence[object], code: int = 0, **options) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which must have this exit code."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=200, **options
    )
    assert done.returncode == code, done.stdout + done.stderr[-5000:]
    return done


def of_workers(notes: Path, *words: object, plan: dict[str, Any] | None = None) -> list[object]:
    """A command of crosslace in workers that leave notes of whom they met; `plan` has mishaps for some of them."""
    notes.mkdir(exist_ok=True)
    return [WORKER, notes, json.dumps(plan or {}), *words]


def torchrun(count: int, notes: Path, *words: object, code: int = 0, **mishaps) -> subprocess.CompletedProcess[str]:
    """The command on so many processes: all met."""
    done = finished(
        [*TORCHRUN, "--standalone", f"--nproc-per-node={count}", *of_workers(notes, *words, **mishaps)], code
    )
    assert met(notes) == [count] * count, done.stdout + done.stderr[-3000:]
    return done


def met(notes: Path) -> list[int]:
    """How many processes each process met."""
    return [json.loads(path.read_text())["met"] for path in notes.iterdir()]


def same_transcoder(one: Path, other: Path, tolerance: float = 3e-5) -> None:
    """Equal up to what 40 steps make of float32's rounding; the exact comparison, in float64, is in tests/train."""
    ours, theirs = Transcoder.load(one / "transcoder"), Transcoder.load(other / "transcoder")
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name).detach()
        off = float((parameter.detach() - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
        assert off <= tolerance, f"{name} differs by {off:.1e}"


@pytest.fixture(scope="module")
def store(demo: Path) -> Path:
    return demo / "store"


@pytest.fixture(scope="module")
def one(store: Path, tmp_path_factory) -> Path:
    """The run of a single process."""
    from crosslace.launch.cli.main import main

    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", f"store={store}", f"run={folder}", *TRAIN]) == 0
    return folder


def test_a_killed_rank_ends_the_job_and_torchrun_starts_it_again(store: Path, one: Path, tmp_path: Path) -> None:
    """SIGKILL to one of two processes in mid-training: with --max-restarts=1 the run goes on from its checkpoint."""
    folder = tmp_path / "killed"
    words = ["train", f"store={store}", f"run={folder}", "parallel.data=2", *TRAIN]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", *of_workers(tmp_path / "n", *words)]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as job:
        while not list(folder.glob("checkpoints/step-*")) and job.poll() is None:
            time.sleep(0.05)
        victim = next(pid for pid in children(job.pid) if int(process_environment(pid).get("RANK", "0")) == 1)
        os.kill(victim, signal.SIGKILL)
        out, _ = job.communicate(timeout=150)
    assert job.returncode == 0, out[-5000:]
    assert "SIGKILL" in out or "exitcode: -9" in out, out[-3000:]
    assert met(tmp_path / "n") == [2, 2]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40]
    same_transcoder(folder, one)


def children(pid: int) -> list[int]:
    """The processes that a process started (Linux)."""
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def process_environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(pair.decode().split("=", 1) for pair in pairs if b"=" in pair)


def test_two_machines_find_each_other_and_start_again_together(store: Path, one: Path, tmp_path: Path) -> None:
    """Two torchrun agents, as on two machines, with one rendezvous on loopback; features are shared between them. One
    of the processes is killed: its agent and the other one start anew, though only the first counts a restart."""
    # The rendezvous' store lives here: in one of the agents, it would go when that one is done, and trip the other.
    meeting = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = tmp_path / "two"
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=crosslace",
               f"--rdzv-endpoint=127.0.0.1:{meeting.port}", "--rdzv-conf=is_host=0", "--local-addr=127.0.0.1",
               "--max-restarts=1", *of_workers(tmp_path / "notes", "train", f"store={store}", f"run={folder}",
               "parallel.features=2", *TRAIN)]  # fmt: skip
    env = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        for _ in range(2)
    ]
    while not list(folder.glob("checkpoints/step-*")) and agents[0].poll() is None:
        time.sleep(0.05)
    os.kill(children(agents[0].pid)[0], signal.SIGKILL)
    outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)[-5000:]
    assert "exitcode: -9" in outputs[0] or "SIGKILL" in outputs[0], outputs[0][-3000:]
    assert sum("crosslace eval run=" in out for out in outputs) == 1, "only the first process speaks"
    assert met(tmp_path / "notes") == [2, 2]
    same_transcoder(folder, one)


def slow(name: str, *values: object):
    return pytest.param(*values, marks=pytest.mark.slow, id=name)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence about what was wrong (from several processes, where the launcher was slow to end the others)."""
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("crosslace:")}
    return line


@pytest.mark.parametrize(
    ("words", "plan", "sentence"),
    [
        slow("mesh", ["parallel.features=2", "transcoder.features=33"], {}, "does not divide into parallel.features=2"),
        slow("count", ["parallel.data=3"], {}, "makes 3 processes, and 2 were started"),
        pytest.param(
            ["parallel.data=2"],
            {"1": {"words": ["trainer.lr=2e-3"]}},
            "process 1 has trainer.lr=0.002 and process 0 0.001",
            id="settings",
        ),
        slow("disk", ["parallel.data=2"], {"1": {"full": "checkpoints/"}}, "No space left on device); make room"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], plan: dict, sentence: str, store: Path, tmp_path: Path) -> None:
    command = ("train", f"store={store}", f"run={tmp_path / 'r'}", *TRAIN, *words)
    assert sentence in said(torchrun(2, tmp_path / "notes", *command, code=1, plan=plan))
    assert not (tmp_path / "r" / "transcoder").exists()


def test_processes_of_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from crosslace.launch.workspace.processes import agree

    def gather(everybody: list, told: dict) -> None:
        everybody[:] = [told, {**told, "trainer.device": "cuda:1"}, {**told, "torch": "2.8.0"}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"process 2 has torch=2\.8\.0 and process 0 2\.13\.0"):
        agree({"torch": "2.13.0", "trainer.device": "cuda:0"})


@pytest.mark.slow
def test_a_sigterm_to_one_process_while_it_saves(store: Path, one: Path, tmp_path: Path) -> None:
    """The checkpoint that is being written is finished, all stop with 75, and the same command goes on from it."""
    folder = tmp_path / "stopped"
    words = ["train", f"store={store}", f"run={folder}", "parallel.data=2", *TRAIN]
    torchrun(2, tmp_path / "first", *words, code=1, plan={"1": {"term": str(folder / "checkpoints")}})
    assert {json.loads(path.read_text())["code"] for path in (tmp_path / "first").iterdir()} == {75}
    assert {path.name for path in (folder / "checkpoints").iterdir()} <= {"step-10", "step-20"}
    assert not (folder / "transcoder").exists()
    torchrun(2, tmp_path / "second", *words)
    same_transcoder(folder, one)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.yaml"
    }


def different(ours, theirs, at: str = "") -> list[str]:
    """The places where two results differ by more than rounding."""
    if isinstance(theirs, dict):
        return [found for key in theirs for found in different(ours[key], theirs[key], f"{at}/{key}")]
    if isinstance(theirs, list):
        return [
            found for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) for found in different(a, b, f"{at}/{i}")
        ]
    close = ours == pytest.approx(theirs, rel=1e-4, abs=1e-5) if isinstance(theirs, float) else ours == theirs
    return [] if close else [f"{at}: {ours} and {theirs}"]


@pytest.mark.slow
def test_submitit_gives_a_job_of_two_tasks_one_training(store: Path, one: Path, tmp_path: Path) -> None:
    """The launcher's own path for several processes a job, on submitit's local executor."""
    from crosslace.launch.cli.main import main

    folder = tmp_path / "sweep"
    words = ["sweep", f"run={folder}", f"store={store}", *TRAIN, "transcoder.skip=false,true", "jobs=1",
             "launcher=submitit_local", "launcher.options.tasks_per_node=2", "parallel.data=2", "eval.tokens=2000",
             "eval.calibration_tokens=1000", "eval.prompts=0", "eval.pairs=0", "eval.layers=false",
             "eval.controls=false"]  # fmt: skip
    assert main(words) == 0
    assert json.loads((folder / "skip-False" / "eval.json").read_text())["overall"]["l0"] > 0
    same_transcoder(folder / "skip-False", one)
    assert runs.saved_settings(folder / "skip-False")["parallel"]["data"] == 2
    made = json.loads((folder / "skip-False" / "transcoder" / "transcoder.json").read_text())["meta"]["made_with"]
    assert made["processes"] == 2
    assert torch.isfinite(Transcoder.load(folder / "skip-False" / "transcoder").W_dec[0]).all()
