"""Which edges hold over seeds, from runs to the file beside the graph."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def runs(demo: Path, tmp_path: Path) -> list[Path]:
    """The demo's CLT twice: as a training that came to the same features."""
    return [shutil.copytree(demo / "clt", tmp_path / name) for name in ("seed-0", "seed-1")]


def test_the_same_features_hold_every_edge(runs: list[Path], crosslace) -> None:
    ended = crosslace("seeds", *runs, "slug=dallas", "tokens=500")
    assert ended.code == 0, ended.err
    assert "100% of the edges are found in another training" in ended.out
    found = json.loads((runs[0] / "graphs" / "dallas" / "seeds.json").read_text())
    assert found["trainings"] == 2 and found["runs"] == [str(run) for run in runs]
    assert found["edges"] and {count for _, _, count in found["edges"]} == {2}
    assert found["paths"] and {path["in"] for path in found["paths"]} == {2}
    assert crosslace("report", *runs, f"out={runs[0].parent / 'page.html'}").code == 0
    assert "Graphs over seeds" in (runs[0].parent / "page.html").read_text()


def test_what_cannot_be_compared_is_refused(demo: Path, runs: list[Path], crosslace) -> None:
    ended = crosslace("seeds", runs[0], demo / "plt", "slug=dallas", "tokens=500")
    assert ended.code == 2 and "of one configuration" in ended.err
    ended = crosslace("seeds", runs[0], "slug=dallas")
    assert ended.code == 2 and "one run alone says nothing" in ended.err
    ended = crosslace("seeds", *runs, "slug=nowhere")
    assert ended.code == 2 and "has no graph nowhere" in ended.err
    ended = crosslace("seeds", f"run={demo}", "slug=dallas")
    assert ended.code == 2 and "holds 0 configurations with several seeds" in ended.err
