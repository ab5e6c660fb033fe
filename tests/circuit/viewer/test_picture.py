"""The picture: one SVG of what matters in a graph; and what the page gets of it."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from crosslace.circuit.features.labels import Label, Labels
from crosslace.circuit.graph.graph import Graph
from crosslace.circuit.graph.text import summary_text
from crosslace.circuit.viewer.drawing import Box, Line, draw
from crosslace.circuit.viewer.payload import graph_payload, node_keys
from crosslace.circuit.viewer.picture import Group, _feature_box, boxes_of, group_scores, render_graph_svg


@pytest.mark.parametrize("theme", ["light", "dark", "auto"])
def test_the_picture_is_one_whole_svg(view_run, theme):
    graph, labels = Graph.load(view_run / "graphs" / "dallas"), Labels.load(view_run)
    picture = render_graph_svg(graph, labels, theme=theme)
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")
    assert ("prefers-color-scheme" in picture) == (theme == "auto")
    texts = "".join(root.itertext())
    assert "state: <img src=x" in texts and "<img" not in picture  # shown as text, never as markup
    assert "F1" not in texts
    for line in summary_text(graph).splitlines():  # scores and accounting, wherever a graph is shown
        assert line in texts
    assert not re.search(r"(href|src|url)\s*[=(]", re.sub(r">[^<]*<", "><", picture))


def test_tokens_that_are_left_to_the_model_are_marked(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    graph.metadata["kept"] = {"0": "first", "2": "sink"}
    root = ElementTree.fromstring(render_graph_svg(graph))
    chips = [g for g in root.findall(".//{*}g") if g.find("{*}title") is not None]
    assert [g.findtext("{*}title", "").rpartition(": ")[2] for g in chips] == ["first", "sink"]
    boxes = [g.find("{*}rect") for g in chips]
    assert all(box is not None and box.get("class") == "kept" for box in boxes)
    assert sum(rect.get("class") == "kept" for rect in root.findall(".//{*}rect")) == 2


def test_groups_are_those_that_share_a_label_and_a_position(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    labels = Labels()
    chosen = [id for id in graph.nodes.ids("feature") if int(graph.nodes.position[id]) == 3][:3]
    for id in chosen:
        labels.set(int(graph.nodes.layer[id]), int(graph.nodes.index[id]), Label("state: Texas (F1 0.90)", "truth"))
    groups = boxes_of(graph, labels)
    assert sorted(id for group in groups for id in group.ids) == graph.nodes.ids("feature")
    assert [group.ids for group in groups if group.title == "state: Texas" and group.position == 3] == [chosen]
    graph.group("by hand", chosen[:2])
    assert boxes_of(graph, labels)[0].ids == chosen[:2]


def test_a_band_of_layers_is_called_by_what_its_strongest_feature_says(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    ids = graph.nodes.ids("feature")[:5]
    strongest = max(ids, key=lambda id: float(graph.influence()[id]))
    for id in ids[:4] + [strongest]:
        graph.nodes.labels[id] = f"L0:{id} says 'cold'" if id == strongest else f"L0:{id} says 'warm'"
    box = _feature_box(graph, Group("b", "layers 0-4", ids, 3), 0, 0.2)
    assert box.title == "'cold'" and box.note.startswith("5 features · 20%, most by L")
    graph.nodes.labels = {}
    assert _feature_box(graph, Group("b", "layers 0-4", ids, 3), 0, 0.2).title == "layers 0-4"


def test_edges_between_groups_are_sums_of_influence(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    groups = [group for group in boxes_of(graph) if group.ids][:6]
    scores, shares = group_scores(graph, groups)
    flow, row = graph.influence_per_input, {int(node): r for r, node in enumerate(graph.row_ids)}
    for t, target in enumerate(groups):
        total = sum(float((graph.rows[row[i]].abs() * flow[row[i]]).sum()) for i in target.ids)
        for s, source in enumerate(groups):
            expected = sum(float(graph.rows[row[i], j] * flow[row[i]]) for i in target.ids for j in source.ids)
            if s != t:
                assert float(scores[t, s]) == pytest.approx(expected, abs=1e-7)
                assert float(shares[t, s]) == pytest.approx(abs(expected) / max(total, 1e-30), abs=1e-5)


def test_a_silent_graph_and_a_lone_token_are_drawn(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas").subgraph([])
    ElementTree.fromstring(render_graph_svg(graph))
    assert graph_payload(graph)["size"]["features"] == 0
    ElementTree.fromstring(draw([], [], ["a"], ["output"], "", "auto"))
    strange = Box("b", "\x00\x1b<&>\"'", "", "feature", 0, 0)
    ElementTree.fromstring(draw([strange], [Line("token:0", "b", -1.0)], ["\n"], ["layer 0"], "\ud800", "light"))


def test_the_payload_keeps_to_its_limits(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    data = graph_payload(graph, node=1.0, edge=1.0, most_features=5, most_links=7)
    assert sum(node["kind"] == "feature" for node in data["nodes"]) == 5 and len(data["links"]["weight"]) <= 7
    assert torch.isfinite(torch.tensor(data["links"]["weight"])).all()


def test_keys_are_a_nodes_own_and_survive_pruning(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    keys = node_keys(graph.nodes)
    assert len(set(keys)) == len(keys)
    feature = graph.nodes[0]
    assert keys[0] == f"{feature.layer}/{feature.position}/{feature.index}"
    smaller = node_keys(graph.prune(0.5).nodes)
    assert set(smaller) < set(keys)


def test_influence_is_that_of_the_whole_graph(view_run):
    """However little is shown, what it carries is a share of all."""
    graph = Graph.load(view_run / "graphs" / "dallas")
    data = graph_payload(graph, most_features=4)
    whole = dict(zip(node_keys(graph.nodes), graph.influence().tolist(), strict=True))
    for node in data["nodes"]:
        assert node["influence"] == pytest.approx(whole[node["key"]], rel=1e-4)
    total = sum(whole[key] for key in node_keys([node for node in graph.nodes if node.kind == "feature"]))
    assert data["size"]["feature_influence"] == pytest.approx(total, rel=1e-4)
