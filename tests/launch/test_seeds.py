"""Which edges hold over seeds, from runs to the file beside the graph."""

import json
import re
import shutil
import subprocess
import sys
from collections import UserList
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crosslace.circuit.features import Label, Labels
from crosslace.circuit.graph import GraphPath
from crosslace.launch.known_world.circuits import state_path


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


def test_a_feature_of_two_states_counts_for_both() -> None:
    """The strongest path is by a feature that detects Colorado best and Pennsylvania nearly as well; a weaker one says
    which of the two it is. A path from another word than the city counts for nothing."""
    labels = Labels(
        {
            (0, 1): Label("state: Colorado", "truth", 0.5, {"state: Pennsylvania": 0.45}),
            (0, 2): Label("state: Pennsylvania", "truth", 0.8),
            (0, 3): Label("state: Texas", "truth", 1.0),
        }
    )
    nodes: Any = UserList(SimpleNamespace(id=i, kind="feature", layer=0, index=i) for i in (1, 2, 3))
    paths = [GraphPath([5, 3, 9], 0.9), GraphPath([4, 1, 9], 0.2), GraphPath([4, 2, 9], 0.05), GraphPath([4, 9], 0.3)]
    graph = SimpleNamespace(nodes=nodes, top_paths=lambda source, target, count: paths)
    nodes.position = torch.tensor([0, 7, 7, 7, 7, 2])
    found = state_path(graph, labels, {7}, 9)
    assert found == ("state: Pennsylvania", 0.2, [4, 1, 9])
    labels.replace(0, 2, None)
    found = state_path(graph, labels, {7}, 9)
    assert found and found.state == "state: Colorado"


@pytest.mark.slow
def test_the_worlds_true_paths_hold_over_two_seeds(crosslace, tmp_path: Path) -> None:
    """What benchmarks/RESULTS.md says of five: the true path in each seed, four fifths of its edges found again."""
    store = f"store={tmp_path / 'store'}"
    assert crosslace("cache", "experiment=demo", store).code == 0
    runs = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    quick = ["transcoder=plt", "trainer.eval_every=0", "wandb.mode=disabled"]
    for seed, run in enumerate(runs):
        ended = crosslace("train", "experiment=demo", store, f"run={run}", *quick, f"seed={seed}")
        assert ended.code == 0, ended.err
    command = [sys.executable, "-m", "benchmarks.sweeps", "seeds", *map(str, runs), "--questions", "6", "--every", "32"]
    home = Path(__file__).resolve().parents[2]
    said = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True).stdout
    right, asked = map(int, re.findall(r"true path in all 2 seeds: (\d+) of (\d+)", said)[0])
    share = lambda words: int(re.findall(rf"{words}[^:]*: (\d+)%", said)[0])
    along, chance = share("edges of the true path found"), share("all edges, features paired")
    assert right >= asked - 1 and along >= 80 > 40 > chance, said
