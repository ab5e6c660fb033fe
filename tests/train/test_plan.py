"""The plan: the numbers of known dictionaries, what is refused, and its memory against a process that really trains."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.store.writer import write_store
from crosslace.train.parallel.mesh import ParallelSettings
from crosslace.train.planning.plan import MachineSettings, Shape, make_plan, what_fits
from crosslace.train.settings import TrainerSettings, TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

WORKER = Path(__file__).with_name("plan_worker.py")
TRAINER = TrainerSettings(batch=4096)
H100 = MachineSettings()


@pytest.mark.parametrize("reach", ["1", "2", "all"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_parameters_are_counted_exactly(reach: str, skip: bool, activation: str):
    settings = TranscoderSettings(features=12, reach=reach, skip=skip, activation=activation, k=2)
    plan = make_plan(Shape(4, 6, 1000), settings, TRAINER, ParallelSettings(), H100)
    assert plan.parameters == sum(p.numel() for p in Transcoder(settings, 6, 4).parameters())


def test_an_8b_model_has_94_billion_parameters():
    shape, settings = Shape(36, 4096, 10**7), TranscoderSettings(features=32768)
    plan = make_plan(shape, settings, TRAINER, ParallelSettings(features=8), H100)
    assert plan.parameters == pytest.approx(32768 * 4096 * (36 + 36 * 37 / 2), rel=1e-3)
    assert plan.parameters == pytest.approx(94.2e9, rel=1e-3)
    assert not plan.fits(H100)
    helps = what_fits(shape, settings, TRAINER, ParallelSettings(features=8), H100)
    assert helps == "parallel.features=32 (32 processes)"
    assert make_plan(shape, settings, TRAINER, ParallelSettings(features=32), H100).fits(H100)


def test_feature_ranks_share_and_data_ranks_do_not():
    shape, settings = Shape(12, 768, 10**7), TranscoderSettings(features=24576)
    one, data, features = (
        make_plan(shape, settings, TRAINER, ParallelSettings(*mesh), H100) for mesh in ((1, 1), (4, 1), (1, 4))
    )
    assert data.rank_parameters == one.rank_parameters
    assert features.rank_parameters == pytest.approx(one.rank_parameters / 4, rel=1e-3)
    assert one.sent == {} and set(data.sent) == {"thresholds", "gradients"}
    assert features.exchange == "actives"
    assert set(features.sent) == {"rows", "actives", "active_gradients", "thresholds", "token_thresholds"}


def test_the_exchange_that_moves_fewer_bytes_is_taken():
    """By hand: GPT-2 with k annealed from 160 and half its width of auxiliary entries, on four feature ranks."""
    shape, settings = Shape(12, 768, 10**7), TranscoderSettings(features=24576)
    forced = {
        exchange: make_plan(shape, settings, TRAINER, ParallelSettings(features=4, exchange=exchange), H100)
        for exchange in ("auto", "reconstructions", "actives")
    }
    written, entries = 4096 * 12 * 768 * 2, 4096 * 12 * (160 + 384)
    assert forced["reconstructions"].sent["reconstructions"] == 4 * written
    assert forced["actives"].sent["actives"] == 8 * entries / 4
    assert forced["actives"].sent["active_gradients"] == 4 * entries
    assert forced["auto"].exchanges == {"reconstructions": 2 * 4 * written * 3 / 4, "actives": 12 * entries * 3 / 4}
    assert forced["auto"].exchange == "actives" and forced["auto"].moved == forced["actives"].moved
    # A small dictionary with many active features, a dense step, a width that does not divide: reconstructions.
    for other in (
        (Shape(12, 96, 10**7), replace(settings, k=200), replace(TRAINER, aux_weight=0.0, sparse="on"), 4),
        (shape, replace(settings, activation="jumprelu"), TRAINER, 4),
        (shape, settings, replace(TRAINER, sparse="off"), 4),
        (Shape(12, 100, 10**7), settings, TRAINER, 8),
    ):
        assert make_plan(*other[:3], ParallelSettings(features=other[3]), H100).exchange == "reconstructions"


def test_too_many_tokens_at_once_are_cut_into_pieces():
    shape, settings = Shape(12, 768, 10**7), TranscoderSettings(features=24576, activation="jumprelu")
    trainer = replace(TRAINER, batch=2**16)
    helps = what_fits(shape, settings, trainer, ParallelSettings(), H100)
    assert helps is not None and helps.startswith("trainer.accumulate=")


def test_restarts_need_room_for_a_quarter_of_the_batch_in_features():
    """By hand: a layer's 16,384 features on 65,536 rows and the rows themselves, each three times."""
    shape, settings, trainer = Shape(12, 768, 10**7), TranscoderSettings(features=24576), replace(TRAINER, batch=2**16)
    with_them, without = (
        make_plan(shape, settings, replace(trainer, resample_every=every), ParallelSettings(), H100).phases["restart"]
        for every in (50, 0)
    )
    assert with_them - without == 4 * 2**16 * 3 * (16384 + 768)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("activation", ["batchtopk", pytest.param("jumprelu", marks=pytest.mark.slow)])
def test_memory_is_as_foretold(activation: str, tmp_path: Path):
    """A whole run of a few steps, checkpoint and export included, in a process that returns memory at once."""
    layers, width, rows, held_out = 4, 256, 4096, 1024
    random = torch.Generator().manual_seed(0)
    sites = {name: torch.randn(rows + held_out, layers, width, generator=random) for name in ("resid", "mlp_out")}
    number = torch.zeros(rows + held_out, dtype=torch.int32)
    layout = StoreLayout(("resid", "mlp_out"), tuple(range(layers)), width, "float32", 64)
    write_store(tmp_path / "store", sites, number, number, number, layout, held_out=held_out)
    settings = TranscoderSettings(features=6144, activation=activation)
    trainer = TrainerSettings(
        steps=3, batch=1024, eval_every=0, checkpoint_every=0, eval_tokens=1024, calibrate_tokens=1024, device="cpu"
    )
    shape = Shape(layers, width, rows, itemsize=4)
    plan = make_plan(shape, settings, trainer, ParallelSettings(), MachineSettings(device="cpu"))
    words = {"store": str(tmp_path / "store"), "run": str(tmp_path / "run"), "transcoder": asdict(settings),
             "trainer": asdict(trainer)}  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert plan.device_peak == pytest.approx(json.loads(done.stdout)["peak"], rel=0.15), plan.phases
