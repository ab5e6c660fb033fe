"""Runs that are killed and go on end with the same bits as runs that were left alone: real processes, real signals."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("resume_worker.py")
CASES = [
    ({"reach": "all", "activation": "batchtopk"}, {"accumulate": 2}),
    ({"reach": "1", "activation": "batchtopk"}, {"resample_every": 10, "optimizer": "muon"}),
    ({"reach": "all", "activation": "jumprelu"}, {"target_l0": 3.0, "sparsity": "target"}),
    (
        {"reach": "1", "activation": "jumprelu"},
        {"accumulate": 2, "sparsity": "tanh", "target_l0": 3.0, "sparse": "off"},
    ),
]


class Ended(NamedTuple):
    """How a run's process ended."""

    returncode: int
    said: str


@pytest.fixture(scope="module")
def work() -> Iterator[Callable[..., Ended]]:
    """Train in a process of its own, forked from one that has imported everything."""
    command = [sys.executable, str(WORKER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        assert server.stdin is not None and server.stdout is not None
        asked, told = server.stdin, server.stdout

        def run(folder: Path, transcoder: dict, trainer: dict, **more) -> Ended:
            asked.write(json.dumps([str(folder), transcoder | {"trainer": trainer} | more]) + "\n")
            return Ended(*json.loads(told.readline()))

        yield run
        asked.close()


def weights(folder: Path) -> dict:
    return load_file(folder / "transcoder" / "transcoder.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def lines(folder: Path) -> list[dict]:
    volatile = ("tokens_per_second", "loader_stall", "memory", "seconds", "first_step_seconds")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in volatile} for record in records]


@pytest.mark.parametrize(("transcoder", "trainer"), CASES, ids=["clt-batch", "plt-batch", "clt-jump", "plt-jump"])
def test_killed_at_random_steps_it_ends_with_the_same_bits(work, tmp_path, transcoder, trainer):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert work(whole, transcoder, trainer).returncode == 0
    steps = sorted(random.Random(str(transcoder)).sample(range(1, 40), 2))
    for step, name in zip(steps, ("SIGKILL", "SIGTERM")):
        killed = work(broken, transcoder, trainer, kill_at=step, signal=name)
        if name == "SIGTERM":
            assert killed.returncode == 0 and "run the same command again" in killed.said
        else:
            assert killed.returncode == -9
    last = work(broken, transcoder, trainer)
    assert last.returncode == 0 and "finished" in last.said, last.said
    assert same(weights(whole), weights(broken))
    assert lines(whole) == lines(broken)


def test_ctrl_c_and_a_full_disk(work, tmp_path):
    transcoder, trainer = CASES[0]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert work(whole, transcoder, trainer).returncode == 0
    stopped = work(broken, transcoder, trainer, kill_at=11, signal="SIGINT")
    assert stopped.returncode == 0 and "stopped at step 11" in stopped.said
    quiet = trainer | {"log_every": 40, "eval_every": 0}
    for settings, message in ((quiet, "the checkpoint of step 21 could not"), (trainer, "could not be written")):
        full = work(broken, transcoder, settings, kill_at=19, fill_disk=True)
        assert full.returncode == 1 and message in full.said and "goes on from " in full.said, full.said
        assert not list((broken / "checkpoints").glob(".step-*")) and list((broken / "checkpoints").glob("step-*"))
    full = work(tmp_path / "new", transcoder, quiet, kill_at=5, fill_disk=True)
    assert full.returncode == 1 and "begins anew: there is no earlier one" in full.said, full.said
    assert work(broken, transcoder, trainer).returncode == 0
    assert same(weights(whole), weights(broken))
