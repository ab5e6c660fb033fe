"""Identity 10: sharded equals whole, with real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from crosslace.data.errors import SettingsError
from crosslace.train.sharding import ParallelSettings, processes

WORKER = Path(__file__).with_name("sharding_worker.py")


def torchrun(count: int, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program on `count` processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, env=environment, timeout=240)
    assert not check or done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done


SLOW = [
    pytest.param(*mesh, marks=pytest.mark.slow)
    for mesh in (
        (2, 1, "auto"),
        (1, 4, "reconstructions"),
        (1, 4, "actives"),
        (2, 2, "reconstructions"),
        (4, 1, "auto"),
    )
]


@pytest.mark.parametrize(
    ("data", "features", "exchange"), [(1, 2, "reconstructions"), (1, 2, "actives"), (2, 2, "actives"), *SLOW]
)
def test_a_mesh_trains_as_one_process(data: int, features: int, exchange: str):
    """Loss, gradients, clip norm, weights after 20 steps, densities and metrics; PLT, CLT and windowed; every case."""
    done = torchrun(data * features, WORKER, data, features, exchange)
    assert done.stdout.count("agrees:") == 9


def test_a_mesh_that_does_not_fit_is_refused():
    with (
        pytest.raises(SettingsError, match=r"makes 4 processes, and 1 were started"),
        processes(ParallelSettings(data=2, features=2)),
    ):
        pass


def test_one_process_needs_no_group():
    with processes(ParallelSettings()) as comm:
        assert comm.is_main and comm.data_ranks == comm.feature_ranks == 1
