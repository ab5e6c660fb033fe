"""What is printed: readable in a log file, and without control characters there."""

import io

import pytest
from crosslace.launch.terminal import Bars, Closing, Lines, Watched, duration, figure, rate, table
from crosslace.launch.terminal.progress import Pace, left
from rich.console import Console


def test_lines_tell_of_beginning_and_end_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for step in range(101):
        lines("training", step, 100)
    lines("training", 100, 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert "training: 100/100" in err and "done in" in err
    assert all(c.isprintable() or c == "\n" for c in err)


def test_lines_are_told_now_and_then_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    lines = Lines(every=10)
    for step in range(5):
        lines("caching", step * 10, 100, "window 1")
    err = capsys.readouterr().err
    assert "20/100" in err and "/s" in err and "left" in err and "window 1" in err


def test_time_left_is_of_the_recent_stretch() -> None:
    pace = Pace()
    for second in range(200):  # a slow start: one a second, then ten
        pace.at(second, min(second, 100) + 10 * max(0, second - 100))
    assert pace.at(200, 1100) == pytest.approx(10)
    assert left(1100, 2100, pace.at(200, 1100)) == "1:40 left"
    assert pace.at(201, 0) == 0.0  # it began anew


def test_bars_show_done_total_and_rate() -> None:
    bars = Bars()
    shown = io.StringIO()
    bars.bars.live.console = Console(file=shown, force_terminal=True, width=120)
    bars("training", 0, 10)
    bars("training", 10, 10, "loss 0.1")
    bars.close()
    assert "training" in shown.getvalue() and "10/10" in shown.getvalue()


def test_a_named_progress_says_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    with Watched() as watched:
        watched.named("clt")("training", 1, 1)
    assert "training (clt)" in capsys.readouterr().err


def test_the_closing_names_what_was_written_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("clt", 0.0123456, 12), ("plt", None, 3)]
    Closing(
        "done", wrote=[("runs/a", "the run")], next=["crosslace eval"], tables=[table("t", ("run", "nmse", "n"), rows)]
    ).show()
    out = capsys.readouterr().out
    assert "runs/a" in out and "crosslace eval" in out and "0.01235" in out
    assert "\x1b" not in out


def test_figures_for_reading() -> None:
    assert (duration(45), duration(3723)) == ("0:45", "1:02:03")
    assert (rate(12.34), rate(12_340), rate(3.2e6)) == ("12.3/s", "12.3k/s", "3.2M/s")
    assert (figure(0.123456), figure(None), figure(True), figure(123456.7)) == ("0.1235", "", "True", "123,457")
