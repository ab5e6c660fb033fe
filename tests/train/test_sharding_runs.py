"""Whole runs on several real processes: the same folder as from one, saved on one mesh and resumed on another."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from crosslace import Transcoder
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.store.writer import write_store
from crosslace.train.settings import TrainerSettings, TranscoderSettings

WORKER = Path(__file__).with_name("runs_worker.py")
STOP = 10
TRAINER = TrainerSettings(
    steps=20, batch=64, lr=1e-3, log_every=5, eval_every=10, eval_tokens=256, calibrate_tokens=512, checkpoint_every=0,
    dead_after=300, accumulate=2, resample_every=6, keep_best=True, lr_decay=0.4,
)  # fmt: skip
CASES = {
    "batchtopk": (TRAINER, TranscoderSettings(features=16, k=3, k_scope="all", skip=True)),
    "jumprelu": (
        replace(TRAINER, target_l0=3.0, sparse="on"),
        TranscoderSettings(features=16, activation="jumprelu", reach="1"),
    ),
}
TIMES = ("tokens_per_second", "loader_stall", "memory", "seconds", "first_step_seconds")


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory) -> Path:
    """The planted rows, written."""
    path = tmp_path_factory.mktemp("store") / "planted"
    rows = [next(split.rows_in_order(len(split))) for split in (planted.train, planted.held_out)]
    sites = {name: torch.cat([batch.sites[name] for batch in rows]) for name in ("resid", "mlp_out")}
    token, position, document = (
        torch.cat([getattr(b, name) for b in rows]) for name in ("token", "position", "document")
    )
    layout = StoreLayout(("resid", "mlp_out"), (0, 1), planted.train.d_model, "float32", 64)
    write_store(
        path,
        sites,
        token,
        position,
        document,
        layout,
        {"model": {"fingerprint": "planted"}},
        held_out=len(planted.held_out),
    )
    return path


def single(store: Path, folder: Path, case: str, stop: int | None = None) -> Path:
    """The same run in this one process."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("runs_worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = module_from_spec(spec)
    spec.loader.exec_module(worker)
    trainer, transcoder = CASES[case]
    worker.run(str(store), str(folder), asdict(trainer), asdict(transcoder), stop)
    return folder


def on_meshes(count: int, store: Path, folder: Path, runs: list[tuple[str, str, tuple, int | None]]) -> None:
    """Runs (folder, case, mesh (data, features, exchange), stop) on `count` processes, in order."""
    plan = []
    for name, case, mesh, stop in runs:
        trainer, transcoder = CASES[case]
        plan.append(
            {"mesh": mesh, "store": str(store), "folder": str(folder / name), "trainer": asdict(trainer),
             "transcoder": asdict(transcoder), "stop": stop}
        )  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(folder / "plan.json")], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for name, _, _, stop in runs:
        how = f"interrupted at {stop}" if stop else f"finished at {TRAINER.steps}"
        assert f"ended: {folder / name} {how}" in done.stdout


def same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The exported transcoders and the metrics, to a share of each tensor's largest entry."""
    for name in ("transcoder", "best"):
        ours, theirs = Transcoder.load(one / name), Transcoder.load(other / name)
        assert ours.settings == theirs.settings and ours.meta.keys() == theirs.meta.keys()
        for key, parameter in ours.named_parameters():
            expected = theirs.get_parameter(key)
            if tolerance == 0:
                assert torch.equal(parameter, expected), key
            off = float((parameter - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-9))
            assert off <= tolerance, f"{name}/{key} differs by {off:.1e}"
    ours, theirs = read_metrics(one), read_metrics(other)
    assert len(ours) == len(theirs) > TRAINER.steps // TRAINER.log_every
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, rel=tolerance, abs=tolerance)


def read_metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_runs_on_two_processes(store: Path, tmp_path: Path):
    """Equal to one process; stopped on one mesh and resumed on another, equal; on the same mesh, bit for bit."""
    for case in CASES:
        single(store, tmp_path / f"{case}-1", case)
    stopped = single(store, tmp_path / "1-to-2x1", "batchtopk", STOP)
    assert not (stopped / "transcoder").exists()
    on_meshes(2, store, tmp_path, [
        ("batchtopk-2x1", "batchtopk", (2, 1), None),
        ("batchtopk-1x2", "batchtopk", (1, 2), None),
        ("jumprelu-2x1", "jumprelu", (2, 1), None),
        ("jumprelu-1x2", "jumprelu", (1, 2), None),
        ("1-to-2x1", "batchtopk", (2, 1), None),
        ("2x1-to-1x2", "batchtopk", (2, 1), STOP),
        ("2x1-to-1x2", "batchtopk", (1, 2), None),
        ("1x2-to-1", "jumprelu", (1, 2), STOP),
        ("1x2-again", "batchtopk", (1, 2), STOP),
        ("1x2-again", "batchtopk", (1, 2), None),
        ("batchtopk-actives", "batchtopk", (1, 2, "actives"), None),
        ("jumprelu-actives", "jumprelu", (1, 2, "actives"), None),
        ("actives-to-2x1", "batchtopk", (1, 2, "actives"), STOP),
        ("actives-to-2x1", "batchtopk", (2, 1), None),
        ("1x2-to-actives", "jumprelu", (1, 2), STOP),
        ("1x2-to-actives", "jumprelu", (1, 2, "actives"), None),
    ])  # fmt: skip
    single(store, tmp_path / "1x2-to-1", "jumprelu")
    for case in CASES:
        for mesh in ("2x1", "1x2", "actives"):
            same(tmp_path / f"{case}-{mesh}", tmp_path / f"{case}-1")
    same(tmp_path / "1-to-2x1", tmp_path / "batchtopk-1")
    same(tmp_path / "2x1-to-1x2", tmp_path / "batchtopk-1")
    same(tmp_path / "1x2-to-1", tmp_path / "jumprelu-1")
    same(tmp_path / "actives-to-2x1", tmp_path / "batchtopk-1")
    same(tmp_path / "1x2-to-actives", tmp_path / "jumprelu-1")
    same(tmp_path / "1x2-again", tmp_path / "batchtopk-1x2", tolerance=0)


@pytest.mark.slow
def test_runs_on_four_processes(store: Path, tmp_path: Path):
    single(store, tmp_path / "one", "jumprelu")
    on_meshes(4, store, tmp_path, [
        ("2x2", "jumprelu", (2, 2), None),
        ("1x4", "jumprelu", (1, 4), None),
        ("2x2-actives", "jumprelu", (2, 2, "actives"), None),
        ("1x4-actives", "batchtopk", (1, 4, "actives"), None),
        ("2x2-to-4x1", "jumprelu", (2, 2, "actives"), STOP),
        ("2x2-to-4x1", "jumprelu", (4, 1), None),
    ])  # fmt: skip
    single(store, tmp_path / "other", "batchtopk")
    for name in ("2x2", "1x4", "2x2-actives", "2x2-to-4x1"):
        same(tmp_path / name, tmp_path / "one")
    same(tmp_path / "1x4-actives", tmp_path / "other")
