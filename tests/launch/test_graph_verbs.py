"""Verbs that work on graphs: steering a group, comparing two, writing for Neuronpedia."""

import json
import re
import shutil
from pathlib import Path

import pytest
from crosslace import Graph, ReplacementModel

PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture
def clt(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo's cross-layer run, to write to."""
    return Path(shutil.copytree(demo / "clt", tmp_path / "clt"))


def test_a_graphs_supernode_is_steered(clt: Path, crosslace, tmp_path: Path) -> None:
    """All of a group's features are multiplied, with the graph's own prompt: what Python says of the same."""
    graph = Graph.load(clt / "graphs" / "dallas")
    influence = graph.influence()
    group = max(graph.supernodes, key=lambda name: float(influence[graph.supernodes[name]].sum()))
    ended = crosslace("steer", f"run={clt}", "graph=dallas", f"supernode={group}", "times=-2", "top=3")
    assert ended.code == 0, ended.err
    assert f"{group} times -2" in ended.out and "mode steer" in ended.out
    model = ReplacementModel.load(clt)
    said = model.intervene(PROMPT, graph.interventions(group, times=-2)).probabilities()
    best = int(said.argmax())
    row = next(line for line in ended.out.splitlines() if repr(model.lm.token_strings([best])[0]) in line)
    assert float(row.split()[-1]) == pytest.approx(float(said[best]), rel=0.01)
    folder = clt / "graphs" / "dallas"
    by_folder = crosslace("steer", f"run={clt}", f"graph={folder}", f"supernode={group}", "times=-2", "top=3")
    assert row in by_folder.out
    for words, sentence in (([], "supernode is missing; the groups of"), (["supernode=x"], "no supernode 'x'")):
        ended = crosslace("steer", f"run={clt}", "graph=dallas", *words)
        assert ended.code == 2 and sentence in ended.err
    assert "holds no graph" in crosslace("steer", f"run={clt}", "graph=none", "supernode=x").err


def test_two_graphs_are_compared(clt: Path, crosslace) -> None:
    prompt = PROMPT.replace("Dallas", "Houston")
    assert crosslace("trace", f"run={clt}", f"prompt={prompt}", "slug=houston").code == 0
    for by in ("tokens", "position", "feature"):
        ended = crosslace("compare", f"run={clt}", "first=dallas", "second=houston", f"by={by}", "top=3")
        assert ended.code == 0, ended.err
        counts = re.findall(r"(\d+) features in both, (\d+) in the first alone, (\d+) in the second", ended.out)
        assert len(counts[0]) == 3 and "0" not in counts[0]
    same = crosslace("compare", f"first={clt / 'graphs' / 'dallas'}", f"second={clt / 'graphs' / 'dallas'}")
    assert "0 in the first alone, 0 in the second alone" in same.out
    ended = crosslace("compare", f"run={clt}", "first=dallas", "second=none")
    assert ended.code == 2 and "holds no graph" in ended.err


def test_what_neuronpedia_needs_is_a_setting(demo: Path, crosslace, tmp_path: Path) -> None:
    def exported(*words: str) -> dict:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        graph, settings = demo / "clt" / "graphs" / "dallas", [f"neuronpedia.{word}" for word in words]
        ended = crosslace("export", f"run={graph}", "to=neuronpedia", f"out={out}", *settings)
        assert ended.code == 0, ended.err
        return json.loads((out / "dallas.json").read_text())

    plain = exported()
    named = exported("scan=gemma-2-2b", "source_set=gemmascope-transcoder-16k", "node=0.5", "labels=false")
    assert named["metadata"]["scan"] == "gemma-2-2b"
    assert named["metadata"]["feature_details"] == {"neuronpedia_source_set": "gemmascope-transcoder-16k"}
    assert len(named["nodes"]) < len(plain["nodes"])
    features = [[n for n in data["nodes"] if n["feature_type"] == "cross layer transcoder"] for data in (plain, named)]
    assert any(node["clerp"] for node in features[0]) and not any(node["clerp"] for node in features[1])
    errors = exported("errors=true")
    count = [sum("error_mlp" in link["source"] for link in data["links"]) for data in (plain, errors)]
    assert count[0] < count[1] and len(plain["links"]) - count[0] == len(errors["links"]) - count[1]
