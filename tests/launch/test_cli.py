"""The command itself: verbs, exit codes, one sentence for what a user did wrong, no traceback unless asked for."""

import errno
import subprocess
import sys

import pytest
from crosslace.data.errors import UserError
from crosslace.launch.verbs import cache


def sentence(err: str) -> str:
    assert "Traceback" not in err
    (line,) = err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["traim"], "`traim` is not a verb; did you mean train?"),
        (["wibble"], "`wibble` is not a verb; the verbs are demo, cache"),
        (["train", "trainer.lrr=3"], "did you mean trainer.lr"),
        (["train"], "run is missing"),
        (["train", "run=r"], "store is missing; it takes a folder of cached activations"),
        (["eval", "run=nowhere"], "there is no run at nowhere"),
        (["trace", "run=nowhere", "prompt=x"], "there is no run at nowhere"),
        (["steer", "run=nowhere"], "prompt is missing"),
        (["view", "run=nowhere"], "there is no run at nowhere"),
        (["report"], "run is missing"),
        (["import", "path=nowhere", "run=r"], "there is nothing at nowhere"),
        (["trace", "run=r", "prompt=x", "slug=a/b"], "slug=a/b cannot be used"),
        (["train", "run=r", "store=nowhere"], "nowhere"),
        (["sweep", "run=r"], "no setting has several values"),
        (["train", "run=r", "store=s", "parallel.data=0"], "parallel.data=0 is too small"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, expected, crosslace, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = crosslace(*words)
    assert ended.code == 2
    assert expected in sentence(ended.err)
    assert not any(tmp_path.iterdir())


def test_debug_shows_the_traceback(crosslace) -> None:
    ended = crosslace("train", "trainer.lrr=3", "debug=true")
    assert ended.code == 2
    assert "Traceback" in ended.err and ended.err.strip().splitlines()[-1].startswith("crosslace: trainer.lrr")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("the text is empty"), 2, "the text is empty"),
        (OSError(errno.ENOSPC, "No space left", "stores/x"), 2, "no space is left on the disk (stores/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "stores/x"), 2, "cannot write there (stores/x)"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "read-only for you"),
        (KeyboardInterrupt(), 130, "the same command goes on from there"),
        (ZeroDivisionError("division by zero"), 1, "a defect of ours, ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_in_a_verb(error, code, expected, crosslace, monkeypatch) -> None:
    def fail(job):
        raise error

    monkeypatch.setattr(cache, "run", fail)
    ended = crosslace("cache", "store=s")
    assert ended.code == code
    assert expected in sentence(ended.err)


def test_both_ways_to_start_it() -> None:
    for command in ([sys.executable, "-m", "crosslace.launch"], [f"{sys.prefix}/bin/crosslace"]):
        ended = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        assert ended.returncode == 0
        assert ended.stdout.startswith("crosslace 0.")
