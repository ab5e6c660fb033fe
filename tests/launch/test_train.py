"""What a training begins with, on the command line, and that it is a run like any other."""

import json
import shutil
import signal
from pathlib import Path

import torch
from crosslace import Transcoder
from crosslace.data.errors import UserError

QUICK = ["trainer.batch=256", "trainer.steps=40", "trainer.lr_scale=6", "trainer.lr_decay=0.4", "trainer.log_every=10",
         "trainer.eval_tokens=512"]  # fmt: skip
SHAPE = ["transcoder.features=96", "transcoder.reach=1", "trainer.target_l0=4", "wandb.mode=disabled"]


def nmse(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["nmse"] for line in lines if "nmse" in line]


def test_training_begins_with_the_mlps_own_neurons(crosslace, demo: Path, tmp_path: Path, monkeypatch) -> None:
    train = ["train", f"store={demo / 'store'}", *QUICK, *SHAPE]
    for name, words in (("random", ["init=random"]), ("mlp", ["init=mlp"]), ("auto", [])):
        ended = crosslace(*train, f"run={tmp_path / name}", *words)
        assert ended.code == 0 and "first_step_seconds" in ended.out, ended.err
    assert nmse(tmp_path / "mlp")[-1] < 0.9 * nmse(tmp_path / "random")[-1]
    assert nmse(tmp_path / "auto") == nmse(tmp_path / "mlp")
    ended = crosslace(*train, f"run={tmp_path / 'mlp'}", "init=auto")
    assert ended.code == 2 and "init was mlp, not auto" in ended.err
    ended = crosslace(*train, f"run={tmp_path / 'mlp'}", "init=mlp")
    assert ended.code == 0 and "trained already" in ended.out

    # A run that goes on has its weights in the checkpoint, and opens no language model.
    def unavailable(*_: object) -> None:
        raise UserError("no model here")

    monkeypatch.setattr("crosslace.launch.verbs.train.open_model", unavailable)
    (tmp_path / "mlp" / "transcoder").rename(tmp_path / "before")
    ended = crosslace(*train, f"run={tmp_path / 'mlp'}", "init=mlp")
    assert ended.code == 0, ended.err
    before, after = (Transcoder.load(folder) for folder in (tmp_path / "before", tmp_path / "mlp" / "transcoder"))
    assert all(torch.equal(old, new) for old, new in zip(before.W_enc, after.W_enc, strict=True))
    ended = crosslace(*train, f"run={tmp_path / 'new'}", "init=mlp")
    assert ended.code == 2 and "no model here (it is needed for its neurons" in ended.err


def test_training_begins_with_another_run(crosslace, demo: Path, tmp_path: Path) -> None:
    train = ["train", f"store={demo / 'store'}", *QUICK, "wandb.mode=disabled", f"init={demo / 'plt'}"]
    ended = crosslace(*train, f"run={tmp_path / 'clt'}", "transcoder=clt", "transcoder.features=32")
    assert ended.code == 2 and "fewer" in ended.err
    features = Transcoder.load(demo / "plt" / "transcoder").features[0]
    ended = crosslace(*train, f"run={tmp_path / 'wide'}", "transcoder=clt", f"transcoder.features={features + 8}")
    assert ended.code == 0, ended.err
    assert Transcoder.load(tmp_path / "wide" / "transcoder").kind == "clt"


def test_a_refused_start_may_be_mended(crosslace, demo: Path, tmp_path: Path) -> None:
    train = ["train", f"store={demo / 'store'}", *QUICK, *SHAPE, f"run={tmp_path / 'run'}"]
    for words, message in (
        (["trainer.batch=100000000"], "lower trainer.batch"),
        (["transcoder.layers=[9]"], "layer 9"),
        (["init=nowhere"], "init=nowhere is neither mlp, random nor"),
        (["trainer.precision=fp16", "trainer.device=cpu"], "fp16 needs a GPU"),
    ):
        ended = crosslace(*train, *words)
        assert ended.code == 2 and message in ended.err and not (tmp_path / "run").exists()
    ended = crosslace(*train, "init=random", "trainer.steps=2")
    assert ended.code == 0, ended.err


def test_the_run_alone_goes_on_and_changes_are_named(crosslace, demo: Path, tmp_path: Path, monkeypatch) -> None:
    run = f"run={tmp_path / 'run'}"
    full = ["train", f"store={demo / 'store'}", *QUICK, *SHAPE, "init=random", "seed=7", run]
    with monkeypatch.context() as patch:  # SIGTERM after the last step, while the result is measured
        patch.setattr("crosslace.train.trainer.Trainer._finish", lambda _: signal.raise_signal(signal.SIGTERM))
        ended = crosslace(*full)
    assert ended.code == 75 and "run the same command again" in ended.out
    assert not (tmp_path / "run" / "transcoder").exists()
    ended = crosslace("train", run, "trainer.steps=80", "seed=3")
    assert ended.code == 2 and "seed was 7, not 3; trainer.steps was 40, not 80" in ended.err
    # Another batch job found the store in its own scratch folder.
    shutil.copytree(demo / "store", tmp_path / "scratch")
    ended = crosslace("train", run, f"store={tmp_path / 'scratch'}", "trainer.log_every=5", "trainer.accumulate=2")
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "transcoder").exists() and "trained already" in crosslace(*full).out
