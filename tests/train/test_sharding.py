"""Identity 10: sharded equals whole, with real processes."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from crosslace.data.errors import SettingsError
from crosslace.train.parallel.collectives import SingleProcess
from crosslace.train.parallel.kth_largest import kth_largest
from crosslace.train.parallel.mesh import ParallelSettings, faster_exchange, processes

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
        (2, 2, "actives"),
        (4, 1, "auto"),
    )
]


@pytest.mark.parametrize(("data", "features", "exchange"), [(1, 2, "reconstructions"), (1, 2, "actives"), *SLOW])
def test_a_mesh_trains_as_one_process(data: int, features: int, exchange: str):
    """Loss, gradients, clip norm, weights after 20 steps, densities and metrics; PLT, CLT and windowed; every case."""
    done = torchrun(data * features, WORKER, data, features, exchange)
    assert done.stdout.count("agrees:") == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kth_largest_over_ranks(dtype: torch.dtype, bits: int):
    """Three ranks' values in lockstep, with ties, zeros of both signs, huge and tiny ones, and empty places."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 30, generator=generator, dtype=dtype).mul(3).round() / 3
    whole[1] *= 1e-30
    whole[2, ::2] *= 1e30
    whole[3, 4:] = -torch.inf
    whole[4] = -torch.inf
    for k in (1, 7, 30, 50):
        finite = whole.isfinite().sum(1).clamp(1, k)
        expected = whole.sort(dim=1, descending=True).values.gather(1, finite[:, None] - 1)
        expected[4] = torch.inf
        found = in_lockstep([partial(kth_largest, own, k, bits=bits) for own in whole.chunk(3, dim=1)])
        assert all(torch.equal(kth, expected) for kth in found), k


def in_lockstep(programs: list[Callable]) -> list:
    """Run programs that add tensors over each other, each in a thread."""
    barrier, handed = threading.Barrier(len(programs)), {}

    def run(rank: int):
        def add(own: torch.Tensor) -> torch.Tensor:
            handed[rank] = own.clone()
            barrier.wait()
            total = torch.stack(list(handed.values())).sum(0, dtype=own.dtype)
            barrier.wait()
            return total

        return programs[rank](add)

    with ThreadPoolExecutor(len(programs)) as pool:
        return list(pool.map(run, range(len(programs))))


def test_a_mesh_that_does_not_fit_is_refused():
    with (
        pytest.raises(SettingsError, match=r"makes 4 processes, and 1 were started"),
        processes(ParallelSettings(data=2, features=2)),
    ):
        pass


def test_the_faster_exchange_is_taken():
    """By a clock that is made up; the second try of each counts."""
    asked = []

    class Ranks(SingleProcess):
        feature_ranks, device = 2, torch.device("cpu")

        def all_reduce_features(self, x):
            return asked.append(("reduced", len(x))) or x

        def all_gather_features(self, x):
            return asked.append(("gathered", len(x))) or x

        def reduce_scatter_features(self, x):
            return asked.append(("scattered", x.numel())) or x

    moved = {"reconstructions": {"reconstructions": 400.0}, "actives": {"actives": 80.0, "active_gradients": 160.0}}
    for ticks, expected in (((0, 9, 0, 2, 0, 0, 0, 3), "reconstructions"), ((0, 1, 0, 4, 0, 9, 0, 3), "actives")):
        assert faster_exchange(Ranks(), moved, partial(next, iter(ticks))) == expected
    assert asked[:2] == [("reduced", 100)] * 2 and set(asked[2:6]) == {("gathered", 20), ("scattered", 40)}


def test_one_process_needs_no_group():
    with processes(ParallelSettings()) as comm:
        assert comm.is_main and comm.data_ranks == comm.feature_ranks == 1
