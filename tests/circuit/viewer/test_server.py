"""What the server answers, who may ask, and what it refuses."""

import json
import re
import time
import urllib.error
import urllib.request

import pytest
from crosslace.circuit.graph.graph import Graph
from crosslace.circuit.viewer import runs
from crosslace.circuit.viewer.api import STATIC
from crosslace.circuit.viewer.runs import Runs
from crosslace.circuit.viewer.security import MOST_BODY
from crosslace.circuit.viewer.server import Viewer, ViewSettings, build_app, serve
from crosslace.data.errors import SettingsError, UserError
from starlette.testclient import TestClient

from .conftest import HOSTILE, TOKEN, client_of

DALLAS = {"run": "demo/clt", "slug": "dallas"}
PIN = {**DALLAS, "changes": {"pins": {"0/1/2": True}}}


def test_lists_runs_and_their_graphs(client):
    answer = client.get("/api/runs").json()
    assert [run["name"] for run in answer["runs"]] == ["demo/clt"]
    run = answer["runs"][0]
    assert run["features"] and run["graphs"][0]["slug"] == "dallas"
    assert run["graphs"][0]["scores"]["replacement_score"] > 0


def test_serves_a_single_run_as_well(view_run):
    client = client_of(view_run)
    assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["clt"]
    assert client.get("/api/graph", params={"run": "clt", "slug": "dallas"}).status_code == 200


def test_gives_a_graph_with_its_figures(client, view_run):
    data = client.get("/api/graph", params=DALLAS).json()
    graph = Graph.load(view_run / "graphs" / "dallas")
    assert data["scores"] == pytest.approx(graph.scores()) and data["accounting"] == graph.accounting
    assert data["tokens"] == graph.token_strings and data["layers"] == 3
    assert HOSTILE in [node["label"] for node in data["nodes"] if node["kind"] == "feature"]
    links = data["links"]
    assert len(links["source"]) == len(links["target"]) == len(links["weight"]) == len(links["flow"]) > 10
    assert all(0 <= end < len(data["nodes"]) for end in links["source"] + links["target"])
    assert 0 not in links["weight"] and links["flow"][0] == 1.0 and links["flow"] == sorted(links["flow"])[::-1]
    fewer = client.get("/api/graph", params={**DALLAS, "node": 0.3}).json()
    assert fewer["size"]["shown"] < data["size"]["shown"]


def test_links_are_the_graphs_edges(client, view_run):
    """Source and target by key, against the pruned graph itself."""
    data = client.get("/api/graph", params={**DALLAS, "node": 1, "edge": 1}).json()
    graph = Graph.load(view_run / "graphs" / "dallas").prune(1.0, 1.0)
    id_of = dict(zip(runs_keys(graph), range(len(graph.nodes)), strict=True))
    for source, target, weight in list(zip(*(data["links"][name] for name in ("source", "target", "weight"))))[:40]:
        ends = (id_of[data["nodes"][target]["key"]], id_of[data["nodes"][source]["key"]])
        assert weight == pytest.approx(graph.edge(*ends), rel=1e-4)


def runs_keys(graph):
    from crosslace.circuit.viewer.payload import node_keys

    return node_keys(graph.nodes)


def test_a_changed_graph_is_read_again(client, view_run):
    before = client.get("/api/graph", params=DALLAS).json()["prompt"]
    graph = Graph.load(view_run / "graphs" / "dallas")
    graph.metadata["prompt"] = "another"
    graph.save(view_run / "graphs" / "dallas")
    assert before != client.get("/api/graph", params=DALLAS).json()["prompt"] == "another"


def test_gives_a_feature_with_its_label(client):
    answer = client.get("/api/feature", params={"run": "demo/clt", "layer": 1, "feature": 2}).json()
    assert answer["record"]["index"] == 2 and answer["features"] == [6, 6, 6]


REFUSED = [
    ("graph", {"run": "demo/clt", "slug": "../../../etc"}, "no graph"),
    ("graph", {"run": "../demo/clt", "slug": "dallas"}, "no run"),
    ("graph", {"run": "/etc", "slug": "dallas"}, "no run"),
    ("graph", {**DALLAS, "node": "nan"}, "takes a number from 0 to 1"),
    ("graph", {**DALLAS, "node": "x"}, "is not a number"),
    ("graph", {**DALLAS, "slug": "d" * 600}, "at most 500 characters"),
    ("feature", {"run": "demo/clt", "layer": "-1", "feature": "0"}, "not a whole number"),
    ("feature", {"run": "demo/clt", "layer": "0", "feature": "999"}, "no dashboard"),
    ("feature", {"run": "demo/clt", "layer": "1e3", "feature": "0"}, "not a whole number"),
    ("picture", {**DALLAS, "theme": "pink"}, "theme=pink"),
    ("nothing", {}, "no such page"),
]


@pytest.mark.parametrize(("page", "parameters", "sentence"), REFUSED)
def test_refuses_what_is_not_there(client, page, parameters, sentence):
    answer = client.get(f"/api/{page}", params=parameters)
    assert answer.status_code == 404 and sentence in answer.json()["error"]


def test_what_is_damaged_is_said_in_json(view_run):
    """A defect of ours, too, is a sentence and not a page of text."""
    client = client_of(view_run)
    header = view_run / "graphs" / "dallas" / "graph.json"
    content = json.loads(header.read_text())
    header.write_text(json.dumps({name: content[name] for name in content if name != "labels"}))
    quiet = TestClient(client.app, base_url="http://127.0.0.1:8765", raise_server_exceptions=False)
    quiet.cookies = client.cookies
    answer = quiet.get("/api/graph", params={"run": "clt", "slug": "dallas"})
    assert answer.status_code >= 400 and "labels" in answer.json()["error"]


# --- who may ask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/graph?run=demo/clt&slug=dallas"])
def test_without_the_token_nothing_is_shown(view_run, path):
    client = TestClient(build_app(view_run.parents[1], token=TOKEN), base_url="http://127.0.0.1:8765")
    assert client.get(path).status_code == 401
    wrong = client.get("/", params={"token": "a-tokem"})
    assert wrong.status_code == 401 and "error" in wrong.json() and not client.cookies


def test_the_token_becomes_a_cookie_and_leaves_the_address(view_run):
    client = TestClient(build_app(view_run, token=TOKEN), base_url="http://127.0.0.1:8765", follow_redirects=False)
    answer = client.get("/", params={"token": TOKEN})
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite" in cookie
    assert client.get("/api/runs").status_code == 200


def test_every_address_has_a_token_of_its_own(view_run):
    first, second = (Viewer(view_run, ViewSettings(port=0, open=False)) for _ in range(2))
    tokens = [viewer.address.partition("token=")[2] for viewer in (first, second)]
    assert tokens[0] != tokens[1] and all(len(token) >= 32 for token in tokens)
    for viewer in (first, second):
        viewer._listener.close()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8765", "", "evil.example:8765", "10.0.0.7"])
def test_answers_to_its_own_address_alone(client, host):
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 421 and "runs" not in answer.text and "view.names" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8765", "[::1]:8765", "LOCALHOST"])
def test_answers_to_every_name_of_this_machine(client, host):
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    assert client.get("/api/runs", headers={"host": host, "cookie": cookie}).status_code == 200


def test_other_addresses_answer_to_ip_literals_and_to_the_names_that_are_given(view_run):
    everywhere = str(ipaddress_any())
    client = client_of(view_run, ViewSettings(host=everywhere, names=["node17.cluster"]))
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    for host, status in [
        ("192.168.1.7:8765", 200),
        ("[fd00::7]:8765", 200),
        ("node17.cluster", 200),
        ("evil.example", 421),
    ]:
        assert client.get("/api/runs", headers={"host": host, "cookie": cookie}).status_code == status, host


def ipaddress_any():
    import ipaddress

    return ipaddress.ip_address(0)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "http://127.0.0.1:9999", "http://localhost:8765"]
)
def test_only_own_pages_change_something(client, view_run, origin):
    answer = client.post("/api/kept", json=PIN, headers={"origin": origin})
    assert answer.status_code == 403 and not (view_run / "graphs" / "dallas" / "view.json").exists()
    del client.headers["origin"]
    assert client.post("/api/kept", json=PIN).status_code == 403


def test_a_change_needs_the_cookie_and_json(client, view_run):
    assert client.post("/api/kept", json=PIN).status_code == 200
    form = client.post("/api/kept", content=json.dumps(PIN), headers={"content-type": "text/plain"})
    assert form.status_code == 415
    client.cookies.clear()
    assert client.post("/api/kept", json=PIN).status_code == 401


def test_bodies_have_a_limit(client):
    big = client.post("/api/kept", json={**PIN, "more": "x" * MOST_BODY})
    assert big.status_code == 413 and "MiB" in big.json()["error"]
    for body in ("[1]", "{", "[" * 100_000):
        answer = client.post("/api/kept", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "JSON" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/app.js", "/nothing", "/api/graph", "/api/picture"])
def test_every_answer_carries_the_policy(client, path):
    headers = client.get(path).headers
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_a_picture_alone_has_its_style_and_nothing_else(client):
    policy = client.get("/api/picture", params=DALLAS).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy


def test_reading_addresses_change_nothing(client):
    for method in ("post", "put", "delete", "patch"):
        headers = {"content-type": "application/json"}
        answer = getattr(client, method)("/api/runs", headers=headers)
        assert answer.status_code == 405 and "error" in answer.json()


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/etc/passwd"]
)
def test_paths_stay_inside(client, path):
    assert client.get(path).status_code in (404, 405)


def test_a_linked_run_outside_is_not_followed(view_run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "run" / "graphs").mkdir(parents=True)
    (view_run.parent / "sly").symlink_to(outside / "run")
    assert [run["name"] for run in client_of(view_run.parents[1]).get("/api/runs").json()["runs"]] == ["demo/clt"]


@pytest.mark.parametrize(
    "name",
    [
        "graphs/dallas/graph.json",
        "graphs/dallas/graph.safetensors",
        "features/layer_1.bin",
        "features/labels.json",
        "features",
        "graphs/dallas/view.json",
    ],
)
def test_a_linked_file_outside_is_not_followed(view_run, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / "there"
    path = view_run / name
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    path.symlink_to(outside)
    client = client_of(view_run.parents[1])
    graph = client.get("/api/graph", params=DALLAS)
    feature = client.get("/api/feature", params={"run": "demo/clt", "layer": 1, "feature": 2})
    edit = client.post("/api/kept", json={**DALLAS, "changes": {"labels": {"0/1": "mine"}}})
    assert 404 in (graph.status_code, feature.status_code)
    if "graphs/" in name or name.endswith("labels.json"):
        assert graph.status_code == 404 and edit.status_code == 400


def test_known_runs_are_found_without_a_walk(view_run, monkeypatch):
    """Asking for graphs and features does not walk the folders again; a store is never walked."""
    (view_run.parents[1] / "store" / "deep" / "runs" / "transcoder").mkdir(parents=True)
    (view_run.parents[1] / "store" / "zarr.json").write_text("{}")
    client = client_of(view_run.parents[1])
    assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["demo/clt"]
    monkeypatch.setattr(runs, "_walk", lambda *more: pytest.fail("the folders were walked"))
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    assert client.get("/api/graph", params=DALLAS).status_code == 200
    assert client.get("/api/feature", params={"run": "demo/clt", "layer": 1, "feature": 2}).status_code == 200


def test_a_run_that_was_made_meanwhile_is_found(view_run, monkeypatch):
    found = Runs(view_run.parents[1])
    found.all()
    (view_run.parent / "plt" / "transcoder").mkdir(parents=True)
    with pytest.raises(UserError, match="no run"):
        found.run("nothing")
    monkeypatch.setattr(runs, "FRESH", 0.0)
    assert found.run("demo/plt").folder == view_run.parent.resolve() / "plt"


def test_data_never_becomes_markup():
    """Our scripts have no way to write markup, and load nothing from elsewhere."""
    for path in STATIC.rglob("*"):
        if path.suffix not in (".js", ".html", ".css") or "vendor" in path.parts:
            continue
        text = path.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        urls = set(re.findall(r"https?://[^\s\"'`]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not urls, path


def test_our_scripts_stay_small():
    lines = [len(path.read_text("utf-8").splitlines()) for path in STATIC.rglob("*.js") if "vendor" not in path.parts]
    assert sum(lines) < 3000 and max(lines) < 260


def test_listens_on_this_machine_and_says_where(view_run):
    """A real server on a free port; a second one on the same port is refused in a sentence."""
    assert ViewSettings().host == "127.0.0.1"
    viewer = Viewer(view_run, ViewSettings(port=0, open=False)).start()
    try:
        assert viewer.address.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(viewer.address, timeout=20) as answer:
            assert answer.status == 200
        base = viewer.address.partition("?")[0]
        with opener.open(base + "api/runs", timeout=20) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(base + "api/runs", timeout=20)
        port = int(base.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serve(view_run, ViewSettings(port=port, open=False))
    finally:
        viewer.stop()
    with pytest.raises(SettingsError, match=r"view\.port"):
        ViewSettings(port=70000)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        build_app(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        build_app(tmp_path / "none")
