"""The command itself: verbs, exit codes, one sentence for what a user did wrong, no traceback unless asked for."""

import errno
import re
import subprocess
import sys

import pytest
import torch
from crosslace.conf import VERBS
from crosslace.conf.describe import known_settings
from crosslace.data.errors import UserError
from crosslace.launch.cli.failures import is_out_of_memory
from crosslace.launch.verbs import cache, train


def sentence(err: str) -> str:
    assert "Traceback" not in err
    (line,) = err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["traim"], "`traim` is not a verb; did you mean train?"),
        (["wibble"], "`wibble` is not a verb; the verbs are demo, world"),
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
        (["trace", "run=r", "prompt=x", "slug=é"], "slug=é cannot be used"),
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


@pytest.mark.parametrize("word", ["debug=true", "debug=1", "debug=yes"])
def test_debug_shows_the_traceback(word: str, crosslace) -> None:
    ended = crosslace("train", "trainer.lrr=3", word)
    assert ended.code == 2
    assert "Traceback" in ended.err and ended.err.strip().splitlines()[-1].startswith("crosslace: trainer.lrr")


@pytest.fixture
def failing(crosslace, monkeypatch, tmp_path):
    """Run `crosslace train` on a run's folder, with an error in the place of its work."""

    def run(error: BaseException):
        def fail(job):
            raise error

        monkeypatch.setattr(train, "run", fail)
        (tmp_path / "run").mkdir()
        return crosslace("train", "store=s", f"run={tmp_path / 'run'}")

    return run


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("the text is empty"), 2, "the text is empty"),
        (OSError(errno.ENOSPC, "No space left", "stores/x"), 2, "no space is left on the disk (stores/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "stores/x"), 2, "cannot write there (stores/x)"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "read-only for you"),
        (KeyboardInterrupt(), 130, "the same command goes on from there"),
    ],
)
def test_a_mistake_or_a_circumstance_is_a_sentence_without_a_trace(error, code, expected, failing, tmp_path) -> None:
    ended = failing(error)
    assert ended.code == code
    assert expected in sentence(ended.err)
    assert not (tmp_path / "run" / "error.log").exists()


def test_a_defect_leaves_its_traceback_in_the_run(failing, crosslace, tmp_path) -> None:
    ended = failing(ZeroDivisionError("division by zero"))
    log = tmp_path / "run" / "error.log"
    assert ended.code == 1
    assert f"a defect of ours, ZeroDivisionError: division by zero ({log} has the traceback)" in sentence(ended.err)
    assert "in fail" in log.read_text() and f"crosslace train store=s run={tmp_path / 'run'}" in log.read_text()
    crosslace("train", "store=s", f"run={tmp_path / 'run'}")
    assert log.read_text().count("Traceback") == 2  # appended, not written over


def test_a_defect_without_a_run_shows_its_traceback(crosslace, monkeypatch) -> None:
    monkeypatch.setattr(cache, "run", lambda job: 1 / 0)
    ended = crosslace("cache", "store=s")
    assert ended.code == 1 and "Traceback" in ended.err and "ZeroDivisionError" in ended.err.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_running_out_of_memory_names_what_helps(error, failing, tmp_path) -> None:
    ended = failing(error)
    assert ended.code == 2
    for word in ("out of memory", "trainer.accumulate", "trainer.batch", "--plan"):
        assert word in sentence(ended.err)
    assert "Traceback" in (tmp_path / "run" / "error.log").read_text()


def test_real_memory_that_runs_out_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_settings_named_for_memory_exist() -> None:
    for verb in VERBS:
        named = re.findall(r"\b(?:[a-z]+\.[a-z_]+)\b", VERBS[verb].smaller)
        assert set(named) <= set(known_settings(verb)), verb


def test_help_verb_is_verb_help(crosslace) -> None:
    assert crosslace("help", "eval").out == crosslace("eval", "--help").out
    assert crosslace("help").out == crosslace("--help").out


def test_both_ways_to_start_it() -> None:
    for command in ([sys.executable, "-m", "crosslace.launch"], [f"{sys.prefix}/bin/crosslace"]):
        ended = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        assert ended.returncode == 0
        assert ended.stdout.startswith("crosslace 0.")
