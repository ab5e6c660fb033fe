"""Work with the model: the server's half. Steering is held against `intervene`, predictions against the edges."""

import threading
import time

import pytest
from crosslace.circuit.attribution import explain_attention, save_heads
from crosslace.circuit.graph import Graph
from crosslace.circuit.replacement import Intervention
from crosslace.circuit.viewer.live import Cancelled, Job, Live, free_folder
from crosslace.circuit.viewer.payload import node_keys
from crosslace.circuit.viewer.runs import Runs
from crosslace.circuit.viewer.server import ViewSettings, _build, _checked
from crosslace.data.errors import UserError
from starlette.testclient import TestClient

from .conftest import TOKEN

DALLAS = {"run": "demo/clt", "slug": "dallas"}
PROMPT = [3, 17, 9, 9, 28, 4]


@pytest.fixture
def model(make_replacement):
    return make_replacement("llama", reach="all", features=6)


@pytest.fixture
def live(view_run, model):
    (view_run / "transcoder").mkdir()
    (view_run / "transcoder" / "transcoder.json").write_text('{"kind": "clt"}')
    return Live(Runs(_checked(view_run.parents[1])), lambda folder: model)


@pytest.fixture
def client(live):
    client = TestClient(_build(live, ViewSettings(), TOKEN), base_url="http://127.0.0.1:8765")
    client.get("/", params={"token": TOKEN})
    client.headers["origin"] = "http://127.0.0.1:8765"
    return client


def features_of(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    return graph, [(key, graph.nodes[i]) for i, key in enumerate(node_keys(graph.nodes)) if i < graph.n_features]


def ended(client, job):
    until = time.monotonic() + 60
    while job["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.05)
        job = client.get("/api/job", params={"id": job["id"]}).json()
    return job


def test_steering_is_what_intervene_says(client, view_run, model):
    graph, features = features_of(view_run)
    changes = {key: times for (key, _), times in zip(features[:3], (0.0, -2.0, 3.0), strict=True)}
    group = [Intervention(n.layer, n.position, n.index, times=t) for (_, n), t in zip(features, changes.values())]
    for mode in ("steer", "direct", "free"):
        body = {**DALLAS, "changes": changes, "mode": mode, "groups": {"g": [features[0][0], features[1][0]]}}
        answer = client.post("/api/steer", json=body).json()
        expected = model.intervene(graph.tokens, group, mode)
        for one in answer["next"]:
            after = float(expected.probabilities()[int(one["token"])])
            assert one["after"] == pytest.approx(after, rel=1e-6), mode
        was = sum(n.activation for _, n in features[:2])
        assert answer["levels"]["g"] == pytest.approx(-2 * features[1][1].activation / was, rel=1e-4)


def test_the_edges_say_what_happens_with_all_else_frozen(client, view_run):
    """Predicted equals direct for every target; and it is no comparison of a number with itself."""
    _, features = features_of(view_run)
    last = features[-1][0]
    early = [key for key, node in features if node.layer == 0][:2]
    answer = client.post("/api/steer", json={**DALLAS, "changes": dict.fromkeys(early, 3), "target": last}).json()
    assert last in [one["key"] for one in answer["targets"]] and len(answer["targets"]) > 1
    for one in answer["targets"]:
        assert one["predicted"] == pytest.approx(one["direct"], rel=1e-3, abs=1e-5)
    assert any(abs(one["predicted"] - one["measured"]) > 1e-3 * abs(one["measured"]) for one in answer["targets"])


def test_silent_features_are_switched_on_by_value(client, view_run, model):
    graph, features = features_of(view_run)
    there = {key for key, _ in features}
    silent = next(
        f"{l}/{p}/{i}" for l in range(3) for p in range(1, 6) for i in range(6) if f"{l}/{p}/{i}" not in there
    )
    layer, position, index = map(int, silent.split("/"))
    answer = client.post("/api/steer", json={**DALLAS, "changes": {silent: {"value": 5.0}}}).json()
    expected = model.intervene(graph.tokens, [Intervention(layer, position, index, value=5.0)], "steer").probabilities()
    assert answer["next"][0]["after"] == pytest.approx(float(expected[int(answer["next"][0]["token"])]), rel=1e-6)
    assert all(one["unseen"] == 1 for one in answer["targets"])
    refused = client.post("/api/steer", json={**DALLAS, "changes": {silent: 3}})
    assert refused.status_code == 400 and "silent" in refused.json()["error"]


REFUSED = [
    ({"changes": {}}, "change a multiplier first"),
    ({"changes": {"logit/5/1": 2}}, "only features"),
    ({"changes": {"0/1/1": "many"}}, "is a number"),
    ({"changes": {"0/1/1": True}}, "is a number"),
    ({"changes": {"0/1/999": 2}}, "features 0 to 5"),
    ({"changes": {"0/1/1": {"value": 1}}, "groups": {"g": ["9/9/9"]}}, "no node"),
    ({"changes": {"0/1/1": {"value": 1}}, "mode": "magic"}, "mode=magic"),
    ({"changes": [1]}, "entries by name"),
]


@pytest.mark.parametrize(("body", "sentence"), REFUSED)
def test_what_cannot_be_steered_is_refused(client, body, sentence):
    answer = client.post("/api/steer", json={**DALLAS, **body})
    assert answer.status_code == 400 and sentence in answer.json()["error"]


def test_a_trace_becomes_a_graph_of_the_run(client, view_run, model):
    job = client.post("/api/trace", json={"run": "demo/clt", "ids": PROMPT[:4], "token": 28}).json()
    job = ended(client, job)
    assert job["state"] == "done", job
    graph = Graph.load(view_run / "graphs" / job["slug"])
    assert graph.tokens == PROMPT[:4] and 28 in [logit.token for logit in graph.logits]
    assert (view_run / "graphs" / job["slug"] / "graph.svg").exists()
    again = ended(client, client.post("/api/trace", json={"run": "demo/clt", "ids": PROMPT[:4]}).json())
    assert again["slug"] != job["slug"]  # what is there is never written over
    listed = client.get("/api/graph", params={"run": "demo/clt", "slug": again["slug"]})
    assert listed.status_code == 200


def test_one_trace_at_a_time_and_it_can_be_called_off(client, live, model, monkeypatch, view_run):
    begun, go_on = threading.Event(), threading.Event()

    def slow(ids, targets=None, progress=None):
        for n in range(1000):
            begun.set()
            assert progress is not None
            progress("tracing", n, 1000)
            go_on.wait(0.05)
        raise AssertionError("nobody called it off")

    monkeypatch.setattr(model, "trace", slow)
    job = client.post("/api/trace", json={"run": "demo/clt", "ids": PROMPT}).json()
    assert begun.wait(10)
    second = client.post("/api/trace", json={"run": "demo/clt", "ids": PROMPT})
    assert second.status_code == 400 and "at work" in second.json()["error"]
    running = client.get("/api/job", params={"id": job["id"]}).json()
    assert running["state"] == "running" and running["total"] == 1000
    client.post("/api/cancel", json={"id": job["id"]})
    assert ended(client, running)["state"] == "cancelled"
    assert [path.name for path in (view_run / "graphs").iterdir()] == ["dallas"]
    monkeypatch.undo()
    done = client.post("/api/steer", json={**DALLAS, "changes": {"0/1/1": {"value": 1}}})
    assert done.status_code == 200  # and the model is free again


def test_a_trace_that_fails_says_why(client, model, monkeypatch):
    def broken(ids, targets, progress):
        raise ZeroDivisionError

    monkeypatch.setattr(model, "trace", broken)
    job = ended(client, client.post("/api/trace", json={"run": "demo/clt", "ids": PROMPT}).json())
    assert job["state"] == "failed" and "ZeroDivisionError" in job["error"]
    for ids in ([], "abc", [1.5], [True], [-1], None):
        refused = client.post("/api/trace", json={"run": "demo/clt", "ids": ids})
        assert refused.status_code == 400 and "ids takes" in refused.json()["error"]


@pytest.fixture
def edge(client, view_run):
    """An edge through attention: from a feature of the first layer at another position to the likeliest logit."""
    graph, features = features_of(view_run)
    logit, last = graph.logits[0].id, len(PROMPT) - 1
    source = next(
        i for i, (_, node) in enumerate(features)
        if node.layer == 0 and node.position < last and graph.edge(logit, i) != 0
    )  # fmt: skip
    return graph, (logit, source), {"target": node_keys(graph.nodes)[logit], "source": features[source][0]}


def test_an_edges_heads_are_those_of_the_model(client, model, edge):
    graph, ids, ends = edge
    answer = client.post("/api/heads", json={**DALLAS, **ends}).json()
    expected = model.heads(graph, [ids])[0]
    for layer, head, part in answer["heads"]:
        assert part == pytest.approx(float(expected.heads[layer, head]))
    assert answer["value"] == pytest.approx(graph.edge(*ids), rel=1e-4) and len(answer["heads"]) > 1


def test_why_a_head_looked_there(client, model, edge):
    """By an edge it is asked from where most of the edge went through; by hand from any token."""
    graph, ids, ends = edge
    layer, head, _ = model.heads(graph, [ids])[0].strongest(1)[0]
    by_edge = client.post("/api/attention", json={**DALLAS, **ends, "layer": layer, "head": head}).json()
    assert by_edge["carried"]["key"] == graph.nodes[ids[1]].position and by_edge["query"] > by_edge["carried"]["key"]
    expected = model.attention(graph.tokens, layer, head, by_edge["query"])
    assert by_edge["pattern"]["0"] == pytest.approx(float(expected.pattern[0]))
    by_hand = client.post("/api/attention", json={**DALLAS, "layer": layer, "head": head, "query": 3}).json()
    assert by_hand["query"] == 3 and sum(by_hand["pattern"].values()) == pytest.approx(1)
    for wrong in ({"layer": 9, "head": 0, "query": 3}, {"layer": 0, "head": 99, **ends}, {"layer": 0}):
        assert client.post("/api/attention", json={**DALLAS, **wrong}).status_code == 400, wrong


def test_the_graphs_own_record_of_heads_is_handed_out(client, view_run, model):
    folder = view_run / "graphs" / "dallas"
    assert client.get("/api/graph", params=DALLAS).json()["attention"] is None
    save_heads(folder, explain_attention(model, Graph.load(folder), edges=20, heads=1))
    found = client.get("/api/graph", params=DALLAS).json()["attention"]
    assert len(found["edges"]) == 20 and len(found["attention"]) == 1


def test_groups_are_predicted_and_measured(client, view_run):
    """What the edges say of a group is what happens to it with all else frozen; its changed members do not count."""
    graph, features = features_of(view_run)
    early = [key for key, node in features if node.layer == 0][:2]
    late = [key for key, node in features if node.layer == 2][:3]
    body = {**DALLAS, "changes": dict.fromkeys(early, 0), "groups": {"late": [*late, early[0]], "early": early}}
    targets = {one["key"]: one for one in client.post("/api/steer", json=body).json()["targets"]}
    assert "early" not in targets
    id_of = {key: id for id, key in enumerate(node_keys(graph.nodes))}
    edges = -sum(graph.edge(id_of[target], id_of[source]) for target in late for source in early)
    assert targets["late"]["predicted"] == pytest.approx(edges) and abs(edges) > 1e-3
    assert targets["late"]["direct"] == pytest.approx(edges, rel=1e-3, abs=1e-5)


def test_a_prompt_is_traced_at_a_checkpoint(client, live, view_run, model, make_replacement, monkeypatch):
    """With that step's transcoder and the graph's own targets; what is kept of the graph holds at every step."""
    other = make_replacement("llama", reach="all", features=6, seed=5)
    monkeypatch.setattr("crosslace.circuit.viewer.live.transcoder_at", lambda run, step, rows: other.transcoder)
    (view_run / "checkpoints" / "step-40").mkdir(parents=True)
    model.trace(PROMPT, targets=[7, 11]).save(view_run / "graphs" / "dallas")
    client.post("/api/kept", json={**DALLAS, "changes": {"notes": {"0/1/1": "mine"}}})
    answer = client.get("/api/graph", params=DALLAS).json()
    assert (answer["steps"], answer["traced"]) == ([40], [])
    assert client.get("/api/graph", params={**DALLAS, "step": 40}).status_code == 404
    assert client.post("/api/trace-step", json={**DALLAS, "step": 41}).status_code == 400
    job = ended(client, client.post("/api/trace-step", json={**DALLAS, "step": 40}).json())
    assert (job["state"], job["step"], job["slug"]) == ("done", 40, "dallas"), job
    graph = Graph.load(view_run / "graphs" / "dallas")
    targets = [7, 11]
    expected = other.trace(graph.tokens, targets=targets).carrying(0.99)
    found = client.get("/api/graph", params={**DALLAS, "step": 40}).json()
    assert found["scores"] == pytest.approx(expected.scores()) and found["scores"] != answer["scores"]
    assert sorted(node["index"] for node in found["nodes"] if node["kind"] == "logit") == targets
    assert found["kept"]["notes"] == {"0/1/1": "mine"} and found["traced"] == [40]
    key = next(node["key"] for node in found["nodes"] if node["kind"] == "feature")
    steered = client.post("/api/steer", json={**DALLAS, "step": 40, "changes": {key: 0}}).json()
    layer, position, index = map(int, key.split("/"))
    after = other.intervene(graph.tokens, [Intervention(layer, position, index, times=0)]).probabilities()
    assert steered["next"][0]["after"] == pytest.approx(float(after[int(steered["next"][0]["token"])]), rel=1e-6)
    graph.save(view_run / "graphs" / "dallas")  # another graph has taken its place
    assert client.get("/api/graph", params=DALLAS).json()["traced"] == []


def test_a_run_without_a_transcoder_cannot_be_asked(client, view_run):
    (view_run / "transcoder" / "transcoder.json").unlink()
    assert client.get("/api/graph", params=DALLAS).json()["live"] is False
    for path, body in (("trace", {"ids": PROMPT}), ("answer", {"prompt": "x"})):
        refused = client.post(f"/api/{path}", json={"run": "demo/clt", **body})
        assert refused.status_code == 400 and "no transcoder" in refused.json()["error"]


def test_labels_are_found_with_their_features(client):
    (one,) = client.get("/api/labels", params={"run": "demo/clt", "q": "IMG"}).json()
    assert "F1" not in one["label"] and one["features"][0][2] == 2.0
    assert client.get("/api/labels", params={"run": "demo/clt", "q": ""}).json() == []


def test_names_of_new_graphs(view_run):
    run = Runs(view_run.parents[1]).all()["demo/clt"]
    assert free_folder(run, "The capital of <Dallas>/../x").name == "the-capital-of-dallas-x"
    assert free_folder(run, "→").name == "graph" and free_folder(run, "dallas").name == "dallas-2"
    job = Job("a", cancelled=True)
    with pytest.raises(Cancelled):
        job.progress("tracing", 1)
    with pytest.raises(UserError, match="no run"):
        Runs(view_run.parents[1]).run("x")
