"""Whole runs in one process: what they reach, write, resume from, and refuse."""

import gc
import json
import signal
import threading
import time
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from crosslace import Transcoder
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.store.store import in_memory_store
from crosslace.train.loss.state import RunningState
from crosslace.train.parallel.collectives import SingleProcess
from crosslace.train.run.checkpoint import Checkpoints, damage
from crosslace.train.settings import TrainerSettings, TranscoderSettings, changes
from crosslace.train.step import train_step
from crosslace.train.trainer import Trainer, train

RATES = {"lr_scale": 6.0, "lr_decay": 0.4}
QUICK = TrainerSettings(
    steps=60, batch=64, lr_scale=6.0, lr_decay=0.4, eval_every=30, checkpoint_every=20, log_every=10, dead_after=2000,
    keep_best=True,
)  # fmt: skip
SMALL = TranscoderSettings(features=48, k=3)


class Recorder:
    """Keeps what it is told."""

    def __init__(self):
        self.lines, self.histograms, self.resumed, self.summary = [], {}, None, {}

    def resume(self, state):
        self.resumed = state

    def log(self, step, values, histograms):
        self.lines.append((step, values))
        self.histograms |= histograms

    def state(self):
        return {"id": "run-7"}

    def close(self, summary):
        self.summary = summary


KINDS = [("batchtopk", "auto"), ("topk", "auto"), ("jumprelu", "auto"), ("jumprelu", "target"), ("jumprelu", "tanh"),
         ("jumprelu", "l1"), ("jumprelu", "l0"), ("relu", "tanh"), ("relu", "l1")]  # fmt: skip


def ended(folder, store, target):
    """The error per layer of the exported transcoder on held-out rows, where its L0 must be within 5% of the target;
    steering brought it near already: what calibration adds is the last correction. topk has k at each token, or as many
    as are positive there."""
    exported, batch = Transcoder.load(folder / "transcoder"), store.batch(0, 0, 1024)
    acts = exported.encode(batch.x)
    topk = exported.settings.activation == "topk"
    assert [float((a > 0).sum()) / 1024 for a in acts] == pytest.approx([target] * 2, rel=0.15 if topk else 0.05)
    assert not topk or all((a > 0).sum(1).max() <= target for a in acts)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reached = [line for line in records if "loss" in line][-1]
    assert [reached["l0/0"], reached["l0/1"]] == pytest.approx([target] * 2, rel=0.25)
    return (exported(batch.x) - batch.y).square().sum((0, 2)) / batch.y.square().sum((0, 2))


def test_topk_is_exported_as_it_was_trained(planted, tmp_path):
    """It chooses by token with the target as k; thresholds stand beside it for formats that know nothing else."""
    settings = replace(QUICK, target_l0_per_layer=[3.0, 5.0])
    result = train(settings, replace(SMALL, activation="topk", k=9), planted.train, planted.held_out, tmp_path)
    exported, batch = Transcoder.load(tmp_path / "transcoder"), planted.held_out.batch(0, 0, 1024)
    assert exported.settings.activation == "topk" and exported.settings.ks(2) == [3, 5]
    acts = exported.encode(batch.x)
    assert [int((acts_BF > 0).sum(1).max()) for acts_BF in acts] == [3, 5]
    error = (exported(batch.x) - batch.y).square().sum((0, 2)) / batch.y.square().sum((0, 2))
    assert [row["nmse"] for row in result.evaluation["layers"]] == pytest.approx(error.tolist(), rel=0.05)
    thresholded = exported.folded(torch.ones(2), torch.ones(2), exported.meta["thresholds"]).encode(batch.x)
    assert [float((a > 0).sum()) / 1024 for a in thresholded] == pytest.approx([3, 5], rel=0.05)


@pytest.mark.parametrize(("activation", "sparsity"), KINDS)
def test_asked_for_an_l0_it_ends_there_on_held_out_rows(planted, tmp_path, activation, sparsity):
    quick = {
        "steps": 250,
        "batch": 128,
        "lr_scale": 6.0,
        "lr_decay": 0.4,
        "dead_after": 10_000,
        "resample_until": 0.5,  # a feature that starts again fires more at first: steering has the other half for it
        "eval_every": 0,
        "checkpoint_every": 0,
    }
    settings = TrainerSettings(target_l0=4.0, sparsity=sparsity, **quick)
    shape = TranscoderSettings(features=64, activation=activation)
    result = train(settings, shape, planted.train, planted.held_out, tmp_path)
    error = ended(tmp_path, planted.held_out, 4.0)
    assert [row["nmse"] for row in result.evaluation["layers"]] == pytest.approx(error.tolist(), rel=0.02)
    assert result.evaluation["overall"]["nmse"] < 0.5


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_asked_for_sixteen_it_ends_there(wide, tmp_path, activation):
    settings = TrainerSettings(
        target_l0=16,
        steps=250,
        batch=128,
        lr_scale=6.0,
        lr_decay=0.4,
        dead_after=10_000,
        eval_every=0,
        checkpoint_every=0,
    )
    shape = TranscoderSettings(features=192, activation=activation)
    train(settings, shape, wide.train, wide.held_out, tmp_path)
    assert ended(tmp_path, wide.held_out, 16.0).max() < 0.4


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_half_precision_trains_as_well(planted, tmp_path, activation):
    settings = replace(QUICK, steps=150, eval_every=0, checkpoint_every=0, target_l0=4.0, log_every=50)
    shape = replace(SMALL, activation=activation)
    nmse = {}
    for precision in ("float32", "bf16"):
        chosen, folder = replace(settings, precision=precision), tmp_path / precision
        nmse[precision] = train(chosen, shape, planted.train, planted.held_out, folder).evaluation["overall"]["nmse"]
        assert all(W.dtype == torch.float32 for W in Transcoder.load(folder / "transcoder").parameters())
    assert nmse["bf16"] == pytest.approx(nmse["float32"], rel=0.1) and nmse["bf16"] != nmse["float32"]


def test_what_a_run_writes(planted, tmp_path):
    sink, notes = Recorder(), []

    def progress(label, done, total=None, note=""):
        notes.append(note)

    result = train(QUICK, SMALL, planted.train, planted.held_out, tmp_path, trackers=[sink], progress=progress)
    assert result.status == "finished" and result.step == 60
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == [10, 20, 30, 40, 50, 60]
    for name in ("nmse", "l0", "dead", "dense", "decoder_norm", "loss/reconstruction", "loss/auxiliary"):
        assert {name, f"{name}/0", f"{name}/1"} <= training[-1].keys()
    per_layer = [training[-1]["grad_norm/0"], training[-1]["grad_norm/1"]]
    assert max(per_layer) < training[-1]["grad_norm"] < sum(per_layer)
    assert {"lr", "tokens_per_second", "loader_stall", "memory", "bad_steps"} <= training[-1].keys()
    assert training[-1]["tokens"] == 60 * 64
    held_out = [r for r in records if "held_out/nmse" in r]
    assert [r["step"] for r in held_out] == [30, 60] and held_out[-1]["held_out/theta/1"] > 0
    assert notes[9] == "" and notes[10].startswith(f"nmse {training[0]['nmse']:.4f}  l0 {training[0]['l0']:.1f}")
    assert sink.resumed == {} and [step for step, _ in sink.lines][-1] == 60
    assert {"density/0", "density/1"} <= sink.histograms.keys() and sink.summary["held_out/nmse"] > 0
    for name in ("transcoder", "best"):
        meta = Transcoder.load(tmp_path / name).meta
        assert meta["model"]["fingerprint"] == "planted" and len(meta["normalisation"]["in_scale"]) == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-40", "step-60"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".metadata", ".bin")]


def test_a_finished_run_is_not_trained_again(planted, tmp_path):
    first = train(QUICK, SMALL, planted.train, planted.held_out, tmp_path)
    sink = Recorder()
    again = train(QUICK, SMALL, planted.train, planted.held_out, tmp_path, trackers=[sink])
    assert (again.evaluation == first.evaluation and sink.resumed == {}) or sink.resumed == {"id": "run-7"}


def test_damaged_checkpoints_are_passed_over_with_a_warning(planted, tmp_path, caplog):
    def warned():
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    shape = replace(SMALL, read="resid")
    whole = train(QUICK, shape, planted.train, planted.held_out, tmp_path / "whole")
    train(QUICK, shape, planted.train, planted.held_out, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-60"
    victim = next(newest.glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    again = train(QUICK, shape, planted.train, planted.held_out, tmp_path / "run")
    assert len(warned()) == 1 and "step-60: shard" in warned()[0]
    assert again.evaluation == whole.evaluation
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    for name in ("step-latest", "step-70.bak"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()  # somebody's own
    assert train(QUICK, shape, planted.train, planted.held_out, tmp_path / "run").evaluation == whole.evaluation
    assert len(warned()) == 3 and "step-40: state.json" in warned()[2]


def test_a_flipped_digit_in_the_plain_numbers_is_damage(tmp_path):
    Checkpoints(tmp_path).save(60, {"weights/b_dec.0": torch.ones(3)}, {"counters": {"seconds": 4.25}})
    folder = tmp_path / "step-60"
    assert damage(folder) is None
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace("4.25", "4.26"))
    assert damage(folder) == "state.json is not what was written"


def test_saving_in_the_background_holds_up_for_a_copy_alone(tmp_path, monkeypatch):
    """What is written is what there was; the next save and `finish` wait, and say what went wrong."""
    saves, go, weight = Checkpoints(tmp_path, background=True), threading.Event(), torch.ones(3)
    write = saves._write
    monkeypatch.setattr(saves, "_write", lambda *given: (go.wait(20), write(*given)))
    saves.save(1, {"weights/b_dec.0": weight}, {"counters": {}})
    weight.zero_()
    saves.finish(wait=False)
    assert not saves.paths()
    go.set()
    saves.finish()
    held = torch.empty(3)
    saves.load(tmp_path / "step-1", {"weights/b_dec.0": held})
    assert held.tolist() == [1.0, 1.0, 1.0] and damage(tmp_path / "step-1") is None

    def full(*given, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    saves.save(2, {"weights/b_dec.0": weight}, {"counters": {}})
    with pytest.raises(UserError, match="the checkpoint of step 2 could not be written"):
        saves.finish()


def test_a_run_that_saves_in_the_background_ends_with_the_same_bits(planted, tmp_path):
    found = []
    for background in (False, True):
        folder = tmp_path / str(background)
        trainer = Trainer(replace(QUICK, checkpoint_every=7), SMALL, planted.train, planted.held_out, folder)
        trainer.checkpoints.background = background
        found.append(trainer.run().evaluation)
        assert [damage(path) for path in trainer.checkpoints.paths()] == [None, None]
    assert found[0] == found[1]


def test_a_request_to_stop_at_the_last_step_is_heard_and_metrics_are_never_half_written(planted, tmp_path, monkeypatch):
    def progress(label, done, total=None, note=""):
        if done == 60:
            signal.raise_signal(signal.SIGTERM)

    result = train(QUICK, SMALL, planted.train, planted.held_out, tmp_path, progress=progress)
    assert result.status == "interrupted" and result.step == 60
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def cut_off(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.write_text", cut_off)
        train(QUICK, SMALL, planted.train, planted.held_out, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert train(QUICK, SMALL, planted.train, planted.held_out, tmp_path).status == "finished"


def test_a_checkpoint_that_lacks_a_tensor_is_refused(planted, tmp_path, monkeypatch):
    settings, kept = replace(QUICK, target_l0=3.0, eval_every=0), RunningState.tensors

    def before(state):  # the controller had no memory of sides once
        return {name: tensor for name, tensor in kept(state).items() if name not in ("side", "boost")}

    with monkeypatch.context() as patch:
        patch.setattr(RunningState, "tensors", before)
        train(settings, SMALL, planted.train, planted.held_out, tmp_path)
    with pytest.raises(UserError, match=r"step-60 was written by another version, which kept no state/boost, state/si"):
        train(settings, SMALL, planted.train, planted.held_out, tmp_path)


def test_the_first_step_is_no_part_of_the_rate(planted, tmp_path, monkeypatch):
    def slow_at_first(parts, x, y):
        if parts.counters.step == 0:
            time.sleep(0.5)
        train_step(parts, x, y)

    monkeypatch.setattr("crosslace.train.trainer.train_step", slow_at_first)
    settings = replace(QUICK, steps=12, log_every=1, eval_every=0, resample_every=0)
    tracker = Recorder()
    result = train(settings, SMALL, planted.train, planted.held_out, tmp_path, trackers=[tracker])
    assert result.speed["first_step_seconds"] > 0.5
    assert result.speed["tokens_per_second"] > 12 * 64 / 0.5
    assert tracker.summary.items() >= result.speed.items()
    first, second, *_, last = [line for _, line in tracker.lines if "loss" in line]
    assert "tokens_per_second" not in first and second["tokens_per_second"] > 0
    assert first["first_step_seconds"] == last["first_step_seconds"] == result.speed["first_step_seconds"]


def test_changed_settings_are_refused_by_name(planted, tmp_path):
    train(QUICK, SMALL, planted.train, planted.held_out, tmp_path)
    for settings, shape, name in (
        (replace(QUICK, lr=1.0), SMALL, "trainer.lr was None and is 1.0"),
        (QUICK, replace(SMALL, k=4), "transcoder.k was 3 and is 4"),
    ):
        with pytest.raises(SettingsError, match=name):
            train(settings, shape, planted.train, planted.held_out, tmp_path)
    other = in_memory_store(torch.randn(600, 2, 16), torch.randn(600, 2, 16))
    with pytest.raises(SettingsError, match=r"store\.rows"):
        train(QUICK, SMALL, other, planted.held_out, tmp_path)
    free = replace(QUICK, log_every=7, keep_checkpoints=1, device="cpu", accumulate=2, calibrate_tokens=512)
    train(free, SMALL, planted.train, planted.held_out, tmp_path)


def test_settings_of_one_version_alone_are_passed_over_and_a_constant_rate_goes_on():
    plain = TrainerSettings()
    assert changes(TrainerSettings, asdict(plain) | {"gone": 1}, asdict(plain)) == []
    older = {name: value for name, value in asdict(plain).items() if name != "clip"}
    assert changes(TrainerSettings, older, asdict(plain)) == []
    assert changes(TrainerSettings, asdict(plain), asdict(replace(plain, steps=2000))) == ["steps"]
    constant = replace(plain, lr_schedule="constant")
    longer, shorter = (asdict(replace(constant, steps=steps)) for steps in (2000, 100))
    assert changes(TrainerSettings, asdict(constant), longer) == []
    assert changes(TrainerSettings, asdict(constant), shorter) == ["steps"]


def test_layers_may_be_a_subset(planted, tmp_path):
    result = train(QUICK, replace(SMALL, layers=[1]), planted.train, planted.held_out, tmp_path)
    assert Transcoder.load(tmp_path / "transcoder").layers == [1] and len(result.evaluation["layers"]) == 1


def test_a_warm_start_begins_where_the_other_ended(planted, tmp_path):
    shape = replace(SMALL, activation="jumprelu")
    settings = replace(QUICK, target_l0=3.0)
    plt = train(settings, replace(shape, reach="1"), planted.train, planted.held_out, tmp_path / "plt")
    source = Transcoder.load(tmp_path / "plt" / "transcoder")
    # equal features begin where the other ended; fresh ones write nothing yet, and fire rarely (seen: 1%, three seeds)
    for features, tolerance in ((shape.features, 0.01), (64, 0.02)):
        wider, folder = replace(shape, features=features), tmp_path / f"clt{features}"
        trainer = Trainer(settings, wider, planted.train, planted.held_out, folder, init=source)
        warm = trainer._evaluate(1024).report["overall"]["nmse"]
        assert warm == pytest.approx(plt.evaluation["overall"]["nmse"], rel=tolerance)


def test_values_that_stay_bad_stop_the_run(planted, tmp_path):
    batch = planted.train.batch(0, 0, 512)
    y = batch.y.clone()
    store = in_memory_store(batch.x, y)
    y[:] = float("nan")  # its statistics were taken before
    with pytest.raises(UserError, match=r"not finite for .* steps in a row"):
        train(QUICK, SMALL, store, planted.held_out, tmp_path)


def test_bad_input_is_refused_before_any_work(planted, tmp_path):
    empty = in_memory_store(torch.randn(1, 2, 16), torch.randn(1, 2, 16))
    narrow = in_memory_store(torch.randn(90, 2, 4), torch.randn(90, 2, 4))
    named = {"model": {"name": "other", "fingerprint": "other"}}
    foreign = in_memory_store(torch.randn(90, 2, 16), torch.randn(90, 2, 16), attributes=named)
    train_store, held_out = planted
    for settings, shape, stores, message in (
        (replace(QUICK, batch=10_000), SMALL, planted, "trainer.batch"),
        (QUICK, SMALL, (empty, held_out), "trainer.batch"),
        (QUICK, SMALL, (train_store, narrow), "4 wide"),
        (QUICK, SMALL, (train_store, foreign), "rows are of model planted and the held-out rows of other"),
        (QUICK, replace(SMALL, layers=[0, 5]), planted, "layer 5"),
        (QUICK, replace(SMALL, read="mlp_in"), planted, "transcoder.read"),
        (QUICK, replace(SMALL, k=49), planted, "transcoder.k=49"),
        (replace(QUICK, target_l0=60), SMALL, planted, "trainer.target_l0=60"),
        (replace(QUICK, target_l0=2.5), replace(SMALL, activation="topk"), planted, "whole number"),
        (replace(QUICK, sparsity="l0"), replace(SMALL, activation="relu"), planted, "relu takes"),
        (replace(QUICK, precision="fp16", device="cpu"), SMALL, planted, "fp16 needs a GPU"),
        (replace(QUICK, device="cuda:99"), SMALL, planted, "trainer.device"),
        (replace(QUICK, device="toaster"), SMALL, planted, "trainer.device"),
        (replace(QUICK, device="meta"), SMALL, planted, "trainer.device"),
        (replace(QUICK, target_l0_per_layer=[2.0, 4.0]), replace(SMALL, k_scope="all"), planted, "k_scope=layer"),
    ):
        with pytest.raises(UserError, match=message):
            train(settings, shape, stores[0], stores[1], tmp_path / "never")
    sharded = SingleProcess()
    sharded.feature_ranks = 2
    with pytest.raises(UserError, match="muon needs each matrix whole"):
        train(replace(QUICK, optimizer="muon"), SMALL, train_store, held_out, tmp_path / "never", comm=sharded)
    assert not (tmp_path / "never").exists()


def test_nothing_of_a_finished_training_stays_in_memory(planted, tmp_path):
    """The next one in the same process (a sweep) needs the room: no circle keeps weights until a collector comes by."""
    gc.collect()
    gc.disable()
    try:
        trainer = Trainer(replace(QUICK, steps=4), SMALL, planted.train, planted.held_out, tmp_path)
        weights = weakref.ref(trainer.parts.transcoder)
        trainer.run()
        del trainer
        assert weights() is None
    finally:
        gc.enable()


def test_checkpoints_of_chosen_steps_stay_for_good(planted, tmp_path):
    settings = replace(QUICK, checkpoint_every=10, keep_checkpoints=1, keep_every=20, keep_best=False)
    train(settings, SMALL, planted.train, planted.held_out, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-20", "step-40", "step-60"]
    assert not (tmp_path / "best").exists()
