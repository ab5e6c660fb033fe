"""What users of Hydra expect: presets of their own, --config-dir, --cfg, -m."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from crosslace.conf import VERBS
from crosslace.conf.describe import known_settings
from crosslace.launch.settings.compose import compose_config
from crosslace.launch.verbs import train

HEAD = "# @package _global_\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    """A folder with presets of a user's own: ./conf, and another that must be named."""
    for name, text in {
        "conf/experiment/base.yaml": HEAD + "defaults: [{override /transcoder: plt}]\ntrainer: {steps: 7}\n",
        "conf/experiment/mine.yaml": HEAD + "defaults: [base, _self_]\ntrainer: {batch: 64}\n",
        "other/transcoder/wide.yaml": "defaults: [clt]\nfeatures: 123\n",
        "conf/experiment/wrong.yaml": HEAD + "trainer: {lrr: 7}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(ended) -> dict:
    assert ended.code == 0, ended.err
    return yaml.safe_load(ended.out)


def test_own_presets_build_on_others(project: Path, crosslace) -> None:
    shown = settings_of(crosslace("train", "run=r", "store=s", "experiment=mine", "--cfg", "job"))
    assert shown["trainer"]["steps"] == 7 and shown["trainer"]["batch"] == 64 and shown["transcoder"]["reach"] == "1"
    given = compose_config("train", ["run=r", "experiment=mine"]).given
    assert {"trainer.steps", "trainer.batch", "transcoder"} <= set(given), "what a nested preset says counts as given"


@pytest.mark.parametrize("words", [["--config-dir", "other"], ["--config-dir=other"], ["hydra.searchpath=[other]"]])
def test_presets_from_a_folder_that_is_named(words: list[str], project: Path, crosslace) -> None:
    shown = settings_of(crosslace("train", "run=r", "store=s", "transcoder=wide", *words, "--cfg=job"))
    assert shown["transcoder"]["features"] == 123 and shown["transcoder"]["reach"] == "all"


def test_mistakes_stay_sentences(project: Path, crosslace) -> None:
    for words, said in (
        (["experiment=mien"], "did you mean experiment=mine"),
        (["transcoder=wide"], "transcoder=wide is not known"),
        (["--config-dir", "nowhere"], "nowhere is no folder"),
        (["--cfg", "hydra"], "it takes job"),
        (["--polan"], "--polan is not known"),
        (["experiment=wrong"], "did you mean trainer.lr (it takes a number or null)? (in experiment/wrong.yaml)"),
    ):
        ended = crosslace("train", "run=r", "store=s", *words)
        assert ended.code == 2 and said in ended.err and len(ended.err.splitlines()) == 1, words


def test_printed_settings_are_a_preset(project: Path, crosslace) -> None:
    words = ["run=r", "store=s", "trainer.steps=11", "transcoder.k=3"]
    text = crosslace("train", *words, "--cfg", "job").out
    (project / "conf" / "experiment" / "printed.yaml").write_text("# @package _global_\n" + text)
    again = crosslace("train", "experiment=printed", "--cfg", "job")
    assert again.code == 0 and yaml.safe_load(again.out) == yaml.safe_load(text)


def test_multirun_takes_a_verb_through_all_combinations(project: Path, crosslace, monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(train, "run", lambda job: taken.append((job.top.run, job.section("trainer").lr)))
    ended = crosslace("train", "-m", "run=r", "store=s", "trainer.lr=1e-3,1e-4", "transcoder=clt,plt")
    assert ended.code == 0, ended.err
    assert sorted({lr for _, lr in taken}) == [1e-4, 1e-3] and len({run for run, _ in taken}) == len(taken) == 4
    assert all(Path(run).parent == Path("r") for run, _ in taken)
    refused = crosslace("train", "run=r", "store=s", "trainer.lr=1e-3,1e-4")
    assert refused.code == 2 and "-m" in refused.err
    assert crosslace("train", "-m", "run=r", "store=s", "trainer.lr=1e-3,oops").code == 2


def test_a_verb_imports_the_rooms_of_its_own_sections_alone() -> None:
    code = (
        "import sys; from crosslace.launch.settings.compose import compose_config;"
        "compose_config('report', ['run=r']).check(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_shown_as_numbers() -> None:
    for verb in VERBS:
        for name, setting in known_settings(verb).items():
            assert not any(sign in setting.default for sign in ("<<", "**", " * ")), name
