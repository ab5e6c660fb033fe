"""Run folders are claimed once, resumed with the same settings, and never overwritten."""

import errno
import json
from pathlib import Path

import crosslace
import pytest
from crosslace.data.errors import UserError
from crosslace.launch.workspace import recorded, runs

SETTINGS = {"seed": 0, "trainer": {"steps": 10, "log_every": 5}, "wandb": {"mode": "offline"}}


def test_a_new_folder_is_claimed_and_taken_up_again(tmp_path: Path) -> None:
    assert runs.claim(tmp_path / "a" / "b", SETTINGS) is False
    assert runs.saved_settings(tmp_path / "a" / "b") == SETTINGS
    assert runs.claim(tmp_path / "a" / "b", SETTINGS) is True


def test_what_changes_no_weight_may_differ(tmp_path: Path) -> None:
    runs.claim(tmp_path / "run", SETTINGS)
    changed = {**SETTINGS, "trainer": {"steps": 10, "log_every": 1}, "wandb": {"mode": "disabled"}}
    assert runs.claim(tmp_path / "run", changed) is True


def test_other_settings_are_refused_by_name_and_nothing_is_touched(tmp_path: Path) -> None:
    runs.claim(tmp_path / "run", SETTINGS)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"trainer.steps was 10, not 20.*name another run"):
        runs.claim(tmp_path / "run", {**SETTINGS, "trainer": {"steps": 20}})
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_claim_is_given_up_only_where_nothing_was_made(tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.claim(run, SETTINGS)
    runs.release(run)
    assert not run.exists()
    runs.claim(run, SETTINGS)
    (run / "wandb").mkdir()
    runs.release(run)
    assert runs.claim(run, {**SETTINGS, "seed": 1}) is False
    (run / "metrics.jsonl").touch()
    runs.release(run)
    assert runs.saved_settings(run)["seed"] == 1


def test_one_training_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another training is at work in")
    with runs.locked(tmp_path), refused, runs.locked(tmp_path):
        pass
    with runs.locked(tmp_path):
        pass


def test_a_store_may_move_and_settings_that_decide_no_weight_may_change(tmp_path: Path) -> None:
    settings = {**SETTINGS, "store": {"path": "a", "dtype": "int8"}}
    runs.claim(tmp_path / "run", settings)
    moved = {**settings, "store": {"path": "b", "dtype": "int8"}, "trainer": {"steps": 10, "device": "cuda:1"}}
    assert runs.claim(tmp_path / "run", moved) and runs.saved_settings(tmp_path / "run")["store"]["path"] == "b"
    with pytest.raises(UserError, match=r"store.dtype was int8, not float16"):
        runs.claim(tmp_path / "run", {**moved, "store": {"path": "b", "dtype": "float16"}})


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        runs.saved_settings(tmp_path)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files and no run"):
        runs.claim(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot write to"):
        runs.claim(tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        runs.writable(tmp_path / "file" / "run")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    runs.write_json(path, {"a": 1})

    def full(self: Path, *args: object, **more: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        runs.write_json(path, {"a": 2})
    assert runs.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.0], "b": float("inf")})
    assert runs.read_json(tmp_path / "x.json") == {"a": [None, 1.0], "b": None}


def test_slugs() -> None:
    assert runs.slug_of("the capital of the state containing Dallas is") == "of-the-state-containing-dallas-is"
    assert runs.slug_of("???") == "graph"
    assert "/" not in runs.slug_of("../../etc/passwd")


def test_every_command_on_a_run_is_noted_with_what_it_ran_with(tmp_path: Path) -> None:
    runs.write_yaml(tmp_path / "run" / "config.yaml", {"seed": 0})
    with recorded(str(tmp_path / "run"), ["eval", f"run={tmp_path / 'run'}", "prompt=a b"]):
        pass
    with pytest.raises(ZeroDivisionError), recorded(str(tmp_path / "run"), ["eval"]):
        _ = 1 / 0
    done, failed = map(json.loads, (tmp_path / "run" / "commands.jsonl").read_text().splitlines())
    assert done["command"] == f"crosslace eval run={tmp_path / 'run'} 'prompt=a b'"
    assert done["versions"]["crosslace"] == crosslace.__version__ and done["versions"]["torch"]
    assert done["started"] <= done["ended"] and done["host"] and done["devices"] and done["how"] == "done"
    assert failed["how"] == "ZeroDivisionError: division by zero"
    with recorded(str(tmp_path), ["view", f"run={tmp_path}"]):
        pass
    assert not (tmp_path / "commands.jsonl").exists(), "a folder of runs is no run"
