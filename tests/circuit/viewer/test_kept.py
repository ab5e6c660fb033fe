"""What people add is kept beside the graph, survives a new trace, and two pages that edit at once lose nothing."""

import json
import threading

import pytest
from crosslace.circuit.features.labels import Labels
from crosslace.circuit.graph.graph import Graph
from crosslace.circuit.viewer.kept import FORMAT, edit_kept, read_kept
from crosslace.circuit.viewer.payload import node_keys
from crosslace.data.errors import UserError

DALLAS = {"run": "demo/clt", "slug": "dallas"}


@pytest.fixture
def graph(view_run):
    return view_run / "graphs" / "dallas"


def test_an_edit_is_kept_and_undone_by_its_inverse(graph):
    edit_kept(graph, None, {"pins": {"0/1/2": True}, "groups": {"g1": "Texas"}, "members": {"0/1/2": "g1"}})
    kept = edit_kept(graph, None, {"places": {"g1": [1.5, -2]}, "notes": {"0/1/2": "says <b>"}})
    assert kept["groups"] == {"g1": "Texas"} and kept["places"] == {"g1": [1.5, -2]} and kept["revision"] == 2
    assert read_kept(graph) == kept
    kept = edit_kept(graph, None, {"pins": {"0/1/2": None}, "groups": {"g1": None}})
    assert kept["pins"] == {} and kept["groups"] == {} and kept["notes"] == {"0/1/2": "says <b>"}
    header = json.loads((graph / "view.json").read_text())
    assert header["format"] == FORMAT and [path.name for path in graph.iterdir() if path.name.startswith(".")] == []


def test_the_graph_itself_is_never_touched(graph):
    before = {name: (graph / name).read_bytes() for name in ("graph.json", "graph.safetensors")}
    edit_kept(graph, None, {"pins": {"0/1/2": True}})
    assert before == {name: (graph / name).read_bytes() for name in before}


def test_two_pages_at_once_lose_nothing(graph):
    def work(page: int) -> None:
        for n in range(25):
            edit_kept(graph, None, {"pins": {f"{page}/0/{n}": True}, "members": {f"{page}/0/{n}": "g"}})

    pages = [threading.Thread(target=work, args=(page,)) for page in range(4)]
    for page in pages:
        page.start()
    for page in pages:
        page.join()
    kept = read_kept(graph)
    assert len(kept["pins"]) == len(kept["members"]) == 100 and kept["revision"] == 100


def test_what_a_page_begins_with_is_taken_once(graph):
    """Two pages take over the same suggestion at once: the second must not undo what the first did with it."""
    start = {"pins": {"a": True, "b": True}, "groups": {"s0": "Texas"}, "members": {"a": "s0"}}
    edit_kept(graph, None, {"groups": {"s0": None}, "members": {"a": None}}, start)
    kept = edit_kept(graph, None, {"pins": {"c": True}}, start)
    assert set(kept["pins"]) == {"a", "b", "c"} and kept["groups"] == kept["members"] == {}


def test_keys_survive_a_new_trace(graph, make_replacement):
    """A second trace of the prompt, with fewer nodes, has the same names for the same features."""
    first = Graph.load(graph)
    again = make_replacement("llama", reach="all", features=6).trace([3, 17, 9, 9, 28, 4], max_nodes=10)
    keys = node_keys(first.nodes)
    for id, key in enumerate(node_keys(again.nodes)):
        node = again.nodes[id]
        twin = first.nodes[keys.index(key)]
        assert (node.kind, node.layer, node.position, node.index) == (twin.kind, twin.layer, twin.position, twin.index)


def test_a_label_becomes_the_runs_and_gives_the_earlier_one_back(graph, view_run):
    (where, truth), *_ = Labels.load(view_run).items()
    key = f"{where[0]}/{where[1]}"
    edit_kept(graph, view_run, {"labels": {key: "Texas"}})
    edit_kept(graph, view_run, {"labels": {key: "the state of Texas"}})
    label = Labels.load(view_run).label(*where)
    assert label is not None and (label.text, label.source) == ("the state of Texas", "hand")
    edit_kept(graph, view_run, {"labels": {key: None}})
    assert Labels.load(view_run).label(*where) == truth
    edit_kept(graph, view_run, {"labels": {"0/5": "new"}})
    edit_kept(graph, view_run, {"labels": {"0/5": None}})
    assert Labels.load(view_run).label(0, 5) is None


WRONG = [
    ({}, "names entries"),
    ({"colour": {}}, "names entries"),
    ({"pins": {"0/1/2": "yes"}}, "cannot be kept"),
    ({"pins": {"../../x y": True}}, "names nothing"),
    ({"labels": {"0/1/2": "x"}}, "names nothing"),
    ({"labels": {"0/1": "x" * 5000}}, "cannot be kept"),
    ({"groups": {"g": "  "}}, "cannot be kept"),
    ({"places": {"g": [1]}}, "cannot be kept"),
    ({"places": {"g": [1, float("inf")]}}, "cannot be kept"),
    ({"notes": {"0/1/2": 7}}, "cannot be kept"),
    ("pins", "names entries"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_what_cannot_be_kept_is_refused(graph, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        edit_kept(graph, None, changes)
    assert not (graph / "view.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "crosslace-view", "version": 2}',
        '{"format": "crosslace-view", "version": 1, "pins": []}',
    ],
)
def test_a_damaged_file_is_never_written_over(graph, text):
    (graph / "view.json").write_text(text)
    with pytest.raises(UserError, match=r"view\.json"):
        edit_kept(graph, None, {"pins": {"0/1/2": True}})
    assert (graph / "view.json").read_text() == text


def test_qparams_go_both_ways(client, graph):
    loaded = Graph.load(graph)
    keys = [key for key in node_keys(loaded.nodes) if key.count("/") == 2 and key[0].isdigit()]
    data = client.get("/api/graph", params=DALLAS).json()
    there = [node["key"] for node in data["nodes"] if node["kind"] == "feature"][:3]
    assert set(there) <= set(keys)
    changes = {"pins": dict.fromkeys(there, True), "groups": {"g": "Texas"}, "members": dict.fromkeys(there[:2], "g")}
    client.post("/api/kept", json={**DALLAS, "changes": changes})
    params = client.get("/api/neuronpedia", params=DALLAS).json()["qParams"]
    swapped = [key.split("/") for key in there]
    ids = [f"{layer}_{index}_{position}" for layer, position, index in swapped]
    assert set(params["pinnedIds"]) <= set(ids) and params["supernodes"][0][0] == "Texas"
    (graph / "view.json").unlink()
    taken = client.post("/api/neuronpedia", json={**DALLAS, "qParams": params}).json()
    assert set(taken["pins"]) == {there[ids.index(id)] for id in params["pinnedIds"]}
    assert list(taken["groups"].values()) == ["Texas"]
    refused = client.post("/api/neuronpedia", json={**DALLAS, "qParams": {"pinnedIds": ["9_9_9"]}})
    assert refused.status_code == 400 and "none of the pinned" in refused.json()["error"]
