"""Completion on the tab key, in the shells themselves where they are installed."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crosslace.launch.cli.completion import candidates

COMMAND = f'"{sys.executable}" -m crosslace.launch'
LINES = {
    "crosslace train experiment=gpt2_c": "crosslace train experiment=gpt2_clt",
    "crosslace train trainer.keep_c": "crosslace train trainer.keep_checkpoints=",
    "crosslace ca": "crosslace cache",
}
"""What is typed, and what stands there after the tab key."""


def test_completion_knows_verbs_settings_and_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {steps: 7}\n")
    assert candidates("crosslace tr") == ["train", "trace"]
    assert "trainer.lr_warmup=" in candidates("crosslace train run=r trainer.lr")
    assert candidates("crosslace train experiment=m") == ["experiment=mine"]
    assert candidates("crosslace train init=") == [] and candidates("crosslace nonsense ") == []
    assert candidates("crosslace help ev") == ["eval"]
    assert candidates("crosslace train plan=") == ["plan=true", "plan=false"]


def typed(shell: list[str], setup: str, line: str, expected: str) -> str:
    """A line and the tab key in an interactive shell; what the terminal shows then."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(shell[0], shell, {**os.environ, "TERM": "dumb", "PS1": "> "})

    def shown(until: str) -> str:
        found, end = "", time.monotonic() + 30
        while until not in found and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                found += os.read(terminal, 65536).decode(errors="replace")
        return found

    try:
        os.write(terminal, f"{setup}; echo rea''dy\n".encode())
        shown("ready\r\n")
        os.write(terminal, f"{line}\t".encode())
        return shown(expected)
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tab_key_completes(shell: str, line: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    start = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    before = "autoload -U compinit; compinit -u -D; " if shell == "zsh" else ""
    setup = f'{before}crosslace() {{ {COMMAND} "$@"; }}; eval "$(crosslace completion {shell})"'
    assert LINES[line] in typed(start, setup, line, LINES[line])


def test_fish_completes() -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    asked = "; ".join(f"complete -C '{line}'" for line in LINES)
    program = f"function crosslace; {COMMAND} $argv; end; crosslace completion fish | source; {asked}"
    ended = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [line.split()[-1] for line in LINES.values()]
