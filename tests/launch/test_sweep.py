"""Sweeps: all combinations, checked first; what is complete is left alone; one failure does not stop the rest."""

import json
from pathlib import Path

import pytest
from crosslace.data.errors import SettingsError
from crosslace.launch.settings import grid, single_values, tidy
from crosslace.launch.verbs import train

SMALL = [
    "transcoder.features=16",
    "trainer.steps=10",
    "trainer.batch=128",
    "trainer.eval_tokens=128",
    "trainer.calibrate_tokens=256",
    "wandb.mode=disabled",
    "eval.tokens=1200",
    "eval.calibration_tokens=1000",
    "eval.prompts=0",
    "eval.pairs=0",
    "eval.layers=false",
    "eval.controls=false",
]


def test_combinations_are_named_after_what_varies() -> None:
    words = tidy("sweep", ["run=s", "store=x", "transcoder=clt,plt", "trainer.target_l0=4,8", "eval.tokens=2000"])
    found = grid(words)
    assert [one.name for one in found] == [
        "transcoder-clt_target_l0-4",
        "transcoder-clt_target_l0-8",
        "transcoder-plt_target_l0-4",
        "transcoder-plt_target_l0-8",
    ]
    assert found[0].words == ["store.path='x'", "transcoder=clt", "trainer.target_l0=4"]
    assert "transcoder=clt" in single_values(words)


def test_a_sweep_over_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="no setting has several values"):
        grid(["run=s", "trainer.steps=5"])


def test_a_contradiction_is_refused_before_the_first_run(demo: Path, crosslace, tmp_path: Path) -> None:
    store = f"store={demo / 'store'}"
    ended = crosslace("sweep", f"run={tmp_path / 's'}", store, *SMALL, "trainer.lr_warmup=0.1,0.9")
    assert ended.code == 2 and "trainer.lr_warmup" in ended.err
    assert not (tmp_path / "s").exists()


def test_a_sweep_ends_in_a_table_and_goes_on(demo: Path, crosslace, tmp_path: Path, monkeypatch) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3,99"]
    ended = crosslace("sweep", *words)
    assert ended.code == 1
    assert "2 of 3 runs are complete" in ended.out
    assert "k-99 failed: transcoder.k=99 is more than the 16 features" in ended.out
    assert (tmp_path / "s" / "report.html").is_file() and list((tmp_path / "s" / "plots").glob("*.png"))
    trained = []
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda job, folder: trained.append(folder.name) or fit(job, folder))
    assert crosslace("sweep", *words).code == 1
    assert trained == ["k-99"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_a_launcher_runs_the_sweep_in_processes(launcher: str, demo: Path, crosslace, tmp_path: Path) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3", f"launcher={launcher}"]
    ended = crosslace("sweep", *words)
    assert ended.code == 0, ended.out + ended.err
    assert "2 of 2 runs are complete" in ended.out
    for name in ("k-2", "k-3"):
        assert json.loads((tmp_path / "s" / name / "eval.json").read_text())["overall"]["l0"] > 0


def test_slurm_settings_are_configuration() -> None:
    from crosslace.launch.settings.compose import compose_config

    words = ["run=s", "launcher=slurm", "launcher.options.partition=gpu", "launcher.options.nodes=4"]
    options = compose_config("sweep", words).section("launcher").options
    assert options["partition"] == "gpu" and options["nodes"] == 4 and options["max_num_timeout"] > 0


def test_a_launcher_with_a_wrong_option_says_so(demo: Path, crosslace, tmp_path: Path) -> None:
    words = [f"run={tmp_path / 's'}", f"store={demo / 'store'}", *SMALL, "transcoder.k=2,3"]
    ended = crosslace("sweep", *words, "launcher=submitit_local", "launcher.options.odd=1")
    assert ended.code == 2 and "launcher submitit_local could not run the sweep" in ended.err
