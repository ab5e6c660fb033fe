"""Stacked sweeps: one pass over the data, and every run the one that it would be alone."""

import json
import os
import signal
from pathlib import Path

import pytest
from crosslace.data.store import ActivationStore
from crosslace.launch.settings import grid
from crosslace.launch.sweeps.running import Combination
from crosslace.launch.sweeps.stack import groups, train_together
from crosslace.launch.sweeps.sweep import part_of
from crosslace.launch.verbs import train
from crosslace.launch.workspace import Job, device_hours, start
from crosslace.train.trainer import Trainer

from .test_sweep import QUICK
from .test_tracking import finished

SMALL = [
    *("transcoder.features=24", "trainer.steps=12", "trainer.log_every=3", "trainer.eval_every=4"),
    *("trainer.checkpoint_every=5", "trainer.resample_every=5", "trainer.dead_after=256", *QUICK),
]
VARIED = ["transcoder=clt,plt", "seed=0,1,2"]
OF_TIME = ("tokens_per_second", "loader_stall", "first_step_seconds", "seconds", "memory")


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_TIME} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "transcoder" / "transcoder.safetensors").read_bytes()


def planned(folder: Path, words: list[str]) -> dict[Path, Job]:
    """The trainings of a sweep, checked and not begun."""
    job = start("sweep", [f"run={folder}", *words])
    return {one.folder: part_of(job, one) for one in (Combination(folder / p.name, p.words) for p in grid(job.words))}


def test_each_run_is_bitwise_the_one_alone_and_batches_are_read_once(demo, tmp_path, monkeypatch) -> None:
    words = [f"store={demo / 'store'}", *SMALL, *VARIED]
    alone, stacked = planned(tmp_path / "alone", words), planned(tmp_path / "stacked", words)
    read = []
    batch = ActivationStore._batch
    monkeypatch.setattr(ActivationStore, "_batch", lambda self, *args: read.append(args[:3]) or batch(self, *args))
    for folder, part in alone.items():
        train.fit(part, folder)
    assert len([args for args in read if args[2] == 128]) == 6 * 12
    read.clear()
    (together,) = groups(stacked, list(stacked))
    assert len(together) == 6 and train_together(stacked, together) == {}
    assert len([args for args in read if args[2] == 128]) == 12
    for one, other in zip(alone, stacked, strict=True):
        assert weights(one) == weights(other), other.name
        assert metrics(one) == metrics(other), other.name
        saved = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
        assert saved[0] == saved[1]
    hours = [device_hours(run) or 0.0 for run in stacked]
    assert all(hours) and sum(hours) < 1.5 * 6 * max(hours)


def test_what_cannot_share_a_batch_is_kept_apart(demo, tmp_path) -> None:
    words = [f"store={demo / 'store'}", *SMALL, "trainer.batch=64,128", "transcoder.k=2,3"]
    parts = planned(tmp_path / "s", words)
    assert [len(group) for group in groups(parts, list(parts))] == [2, 2]


def test_stopped_in_the_middle_all_go_on_and_one_failure_leaves_the_others(
    demo, crosslace, tmp_path, monkeypatch
) -> None:
    words = [f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3", "stack=true"]
    assert crosslace("sweep", f"run={tmp_path / 'whole'}", *words).code == 0
    log = Trainer._log

    def stopped(self, *args):
        if self.parts.counters.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, *args)

    monkeypatch.setattr(Trainer, "_log", stopped)
    cut = tmp_path / "cut"
    assert crosslace("sweep", f"run={cut}", *words).code == 130
    assert {path.name for path in cut.glob("*/checkpoints/step-6")} == {"step-6"}

    def broken(self, *args):
        if self.parts.counters.step == 9 and self.folder.name == "k-2":
            raise RuntimeError("CUDA out of memory")
        log(self, *args)

    monkeypatch.setattr(Trainer, "_log", broken)
    ended = crosslace("sweep", f"run={cut}", *words)
    assert ended.code == 1 and "k-2 failed: RuntimeError: CUDA out of memory" in ended.out
    assert "out of memory" in (cut / "k-2" / "error.log").read_text()
    assert weights(cut / "k-3") == weights(tmp_path / "whole" / "k-3")
    monkeypatch.undo()
    assert crosslace("sweep", f"run={cut}", *words).code == 0
    assert weights(cut / "k-2") == weights(tmp_path / "whole" / "k-2")


def test_stacking_takes_one_process(demo, crosslace, tmp_path) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3", "stack=true"]
    ended = crosslace("sweep", *words, "launcher=processes")
    assert ended.code == 2 and "stack=true trains in one process" in ended.err


@pytest.mark.slow
def test_streaming_runs_the_language_model_once(demo, crosslace, tmp_path, monkeypatch) -> None:
    from crosslace.data.harvest.harvest import Harvester

    passes, forward = [], Harvester._forward
    monkeypatch.setattr(Harvester, "_forward", lambda self, *args: passes.append(1) or forward(self, *args))
    trained = [word for word in SMALL if not word.startswith("eval.")]
    source = ["model=world", "world=tiny", "store.mode=streaming", "tokens=8K", "store.held_out=1K"]
    for k in (2, 3):  # each with a ring of its own, so that neither finds what the other harvested
        words = [f"run={tmp_path / f'k-{k}'}", f"store={tmp_path / f'ring-{k}'}", *trained, *source]
        assert crosslace("train", *words, f"transcoder.k={k}").code == 0
    alone = len(passes)
    passes.clear()
    words = [f"run={tmp_path / 's'}", f"store={tmp_path / 'ring'}", *SMALL, *source, "transcoder.k=2,3", "stack=true"]
    assert crosslace("sweep", *words).code == 0
    assert 0 < len(passes) < 0.75 * alone
    for name in ("k-2", "k-3"):
        assert weights(tmp_path / "s" / name) == weights(tmp_path / name)


@pytest.mark.slow
def test_each_stacked_run_is_a_run_of_its_own_in_wandb(demo, crosslace, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3", "stack=true"]
    ended = crosslace("sweep", *words, "wandb.mode=offline")
    assert ended.code == 0, ended.err
    kept = [list((tmp_path / "s" / name / "wandb").glob("offline-run-*/run-*.wandb")) for name in ("k-2", "k-3")]
    assert [len(files) for files in kept] == [1, 1] and kept[0][0].name != kept[1][0].name
    metrics = [path.read_bytes().count(b"held_out/nmse") for (path,) in kept]
    assert metrics[0] == metrics[1] > 0
    for (path,), name in zip(kept, ("k-2", "k-3")):
        run = next(record.run for record in finished(path) if record.WhichOneof("record_type") == "run")
        assert (run.run_group, run.display_name, run.project) == ("s", name, "crosslace")
