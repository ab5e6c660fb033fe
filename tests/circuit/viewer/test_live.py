"""Work with the model: the server's half. Steering is held against `intervene`, predictions against the edges."""

import threading
import time

import pytest
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


def test_an_edges_heads_sum_to_what_attention_carries(client, view_run, model):
    graph, features = features_of(view_run)
    logit = graph.logits[0].id
    source = next(i for i in range(graph.n_features) if graph.edge(logit, i) != 0 and int(graph.nodes.layer[i]) == 0)
    body = {**DALLAS, "source": features[source][0], "target": node_keys(graph.nodes)[logit]}
    answer = client.post("/api/heads", json=body).json()
    expected = model.heads(graph, [(logit, source)])[0]
    for one in answer["heads"]:
        assert one["part"] == pytest.approx(float(expected.heads[one["layer"], one["head"]]))
    assert answer["value"] == pytest.approx(graph.edge(logit, source), rel=1e-4) and len(answer["heads"]) > 1


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
