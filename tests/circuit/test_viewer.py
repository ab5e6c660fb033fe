"""The viewer: what its server answers and refuses, what the picture shows, and the pages in a real browser."""

import re
import shutil
import threading
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crosslace.circuit.features.dashboards import DashboardWriter
from crosslace.circuit.features.labels import Label, Labels
from crosslace.circuit.graph.graph import Graph
from crosslace.circuit.graph.text import summary_text
from crosslace.circuit.viewer.drawing import Box, Line, draw
from crosslace.circuit.viewer.payload import graph_payload
from crosslace.circuit.viewer.picture import feature_groups, group_scores, render_graph_svg
from crosslace.circuit.viewer.server import STATIC, ViewSettings, build_app, serve
from crosslace.data.errors import SettingsError, UserError
from starlette.testclient import TestClient

LOCAL = {"host": "127.0.0.1:8765"}


@pytest.fixture
def view_run(make_replacement, tmp_path) -> Path:
    """A run folder with a traced graph, dashboards and labels; two of its texts are attempts at markup."""
    run = tmp_path / "demo" / "clt"
    model = make_replacement("llama", reach="all", features=6)
    graph = model.trace([3, 17, 9, 9, 28, 4])
    graph.token_strings[3] = " <script>alert(1)</script>"
    graph.metadata["prompt"] = "a prompt with <b>markup</b>"
    graph.nodes.labels[len(graph.nodes) - 1] = "<i>one</i>"
    graph.save(run / "graphs" / "dallas")
    top = graph.nodes[int(graph.influence()[: graph.n_features].argmax())]
    labels = Labels({(top.layer, top.index): Label("state: <img src=x onerror=alert(1)> (F1 0.97)", "truth", 0.97)})
    labels.save(run)
    writer = DashboardWriter(run / "features", 3)
    example = {"tokens": [" Dal", "<script>alert(2)</script>"], "tokens_acts_list": [0.5, 2.0]}
    record = {
        "examples_quantiles": [{"quantile_name": "Top <b>", "examples": [example]}],
        "top_logits": [" Austin", "<u>"],
        "bottom_logits": [],
        "act_min": 0.5,
        "act_max": 2.0,
        "histogram": [3, 1],
        "quantile_values": [0.5, 2.0],
        "activation_frequency": 0.01,
    }
    for layer in range(3):
        writer.write_layer(layer, [{"index": i, **record} for i in range(6)])
    writer.close()
    return run


@pytest.fixture
def client(view_run) -> TestClient:
    return TestClient(build_app(view_run.parents[1]), headers=LOCAL)


def test_lists_runs_and_their_graphs(client):
    answer = client.get("/api/runs").json()
    assert [run["name"] for run in answer["runs"]] == ["demo/clt"]
    run = answer["runs"][0]
    assert run["features"] and run["graphs"][0]["slug"] == "dallas"
    assert run["graphs"][0]["scores"]["replacement_score"] > 0


def test_serves_a_single_run_as_well(view_run):
    client = TestClient(build_app(view_run), headers=LOCAL)
    assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["clt"]
    assert client.get("/api/graph", params={"run": "clt", "slug": "dallas"}).status_code == 200


def test_gives_a_graph_with_its_figures(client, view_run):
    data = client.get("/api/graph", params={"run": "demo/clt", "slug": "dallas"}).json()
    graph = Graph.load(view_run / "graphs" / "dallas")
    assert data["scores"] == pytest.approx(graph.scores()) and data["accounting"] == graph.accounting
    assert data["tokens"] == graph.token_strings and data["layers"] == 3
    names = [node["label"] for node in data["nodes"] if node["kind"] == "feature"]
    assert "state: <img src=x onerror=alert(1)> (F1 0.97)" in names
    for source, target, weight, flow in data["links"]:
        assert 0 <= source < len(data["nodes"]) and 0 <= target < len(data["nodes"])
        assert weight != 0 and 0 < flow <= 1
    assert data["links"][0][3] == 1.0
    fewer = client.get("/api/graph", params={"run": "demo/clt", "slug": "dallas", "node": 0.3}).json()
    assert fewer["size"]["shown"] < data["size"]["shown"]


def test_a_changed_graph_is_read_again(client, view_run):
    ask = {"run": "demo/clt", "slug": "dallas"}
    before = client.get("/api/graph", params=ask).json()["prompt"]
    graph = Graph.load(view_run / "graphs" / "dallas")
    graph.metadata["prompt"] = "another"
    graph.save(view_run / "graphs" / "dallas")
    assert before != client.get("/api/graph", params=ask).json()["prompt"] == "another"


def test_gives_a_feature_with_its_label(client):
    answer = client.get("/api/feature", params={"run": "demo/clt", "layer": 1, "feature": 2}).json()
    assert answer["record"]["index"] == 2 and answer["features"] == [6, 6, 6]


REFUSED = [
    ("graph", {"run": "demo/clt", "slug": "../../../etc"}, "no graph"),
    ("graph", {"run": "../demo/clt", "slug": "dallas"}, "no run"),
    ("graph", {"run": "/etc", "slug": "dallas"}, "no run"),
    ("graph", {"run": "demo/clt", "slug": "dallas", "node": "nan"}, "takes a number from 0 to 1"),
    ("graph", {"run": "demo/clt", "slug": "dallas", "node": "x"}, "is not a number"),
    ("feature", {"run": "demo/clt", "layer": "-1", "feature": "0"}, "not a whole number"),
    ("feature", {"run": "demo/clt", "layer": "0", "feature": "999"}, "no dashboard"),
    ("feature", {"run": "demo/clt", "layer": "1e3", "feature": "0"}, "not a whole number"),
    ("picture", {"run": "demo/clt", "slug": "dallas", "theme": "pink"}, "theme=pink"),
]


@pytest.mark.parametrize(("page", "parameters", "sentence"), REFUSED)
def test_refuses_what_is_not_there(client, page, parameters, sentence):
    answer = client.get(f"/api/{page}", params=parameters)
    assert answer.status_code == 404 and sentence in answer.json()["error"]


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/etc/passwd"]
)
def test_paths_stay_inside(client, path):
    assert client.get(path).status_code in (404, 405)


def test_a_link_that_leads_out_is_not_followed(view_run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "run" / "graphs").mkdir(parents=True)
    (view_run.parent / "sly").symlink_to(outside / "run")
    client = TestClient(build_app(view_run.parents[1]), headers=LOCAL)
    assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["demo/clt"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8765", "", "evil.example:8765"])
def test_answers_to_its_own_address_alone(client, host):
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 421 and "runs" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8765", "[::1]:8765", "LOCALHOST"])
def test_answers_to_every_name_of_this_machine(client, host):
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/app.js", "/nothing"])
def test_every_answer_carries_the_policy(client, path):
    headers = client.get(path).headers
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_changes_nothing(client):
    for method in ("post", "put", "delete", "patch"):
        assert getattr(client, method)("/api/runs").status_code == 405


def test_data_never_becomes_markup():
    """The scripts have no way to write markup, and load nothing from elsewhere."""
    for path in STATIC.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        urls = set(re.findall(r"https?://[^\s\"'`]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not urls, path


def test_listens_on_this_machine_and_says_where(view_run):
    """A real server on a free port; a second one on the same port is refused in a sentence."""
    assert ViewSettings().host == "127.0.0.1"
    told, address = threading.Event(), []

    def announce(where):
        address.append(where)
        told.set()

    threading.Thread(target=serve, args=(view_run, ViewSettings(port=0, open=False), announce), daemon=True).start()
    assert told.wait(20)
    assert address[0].startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address[0] + "api/runs", timeout=20) as answer:
        assert answer.status == 200
    port = int(address[0].rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
        serve(view_run, ViewSettings(port=port, open=False))
    with pytest.raises(SettingsError, match=r"view\.port"):
        ViewSettings(port=70000)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        build_app(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        build_app(tmp_path / "none")


# --- the picture ----------------------------------------------------------------------------------------------


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


def test_groups_are_those_that_share_a_label_and_a_position(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    labels = Labels()
    chosen = [id for id in graph.nodes.ids("feature") if int(graph.nodes.position[id]) == 3][:3]
    for id in chosen:
        labels.set(int(graph.nodes.layer[id]), int(graph.nodes.index[id]), Label("state: Texas (F1 0.90)", "truth"))
    groups = feature_groups(graph, labels)
    assert sorted(id for group in groups for id in group.ids) == graph.nodes.ids("feature")
    assert [group.ids for group in groups if group.title == "state: Texas" and group.position == 3] == [chosen]
    graph.group("by hand", chosen[:2])
    assert feature_groups(graph, labels)[0].ids == chosen[:2]


def test_edges_between_groups_are_sums_of_influence(view_run):
    graph = Graph.load(view_run / "graphs" / "dallas")
    groups = [group for group in feature_groups(graph) if group.ids][:6]
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
    assert sum(node["kind"] == "feature" for node in data["nodes"]) == 5 and len(data["links"]) <= 7
    assert torch.isfinite(torch.tensor([link[2] for link in data["links"]])).all()


def test_page_assets_are_there():
    names = {path.name for path in Path(STATIC).iterdir()}
    assert names == {"index.html", "style.css", "app.js", "dom.js", "graph.js", "canvas.js", "feature.js"}


# --- in a browser ---------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = "no-first-run disable-background-networking disable-component-update disable-sync"
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", *(f"--{switch}" for switch in SWITCHES.split())]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, view_run):
    """A page at the viewer, which fails the test on any error, dialog or request to elsewhere."""
    told, address = threading.Event(), []
    announce = lambda where: (address.append(where), told.set())
    threading.Thread(
        target=serve, args=(view_run.parents[1], ViewSettings(port=0, open=False), announce), daemon=True
    ).start()
    assert told.wait(20)
    page, problems = browser.new_page(base_url=address[0]), []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((address[0], "data:")) else problems.append(request.url),
    )
    page.goto("/")
    yield page
    page.close()
    assert problems == []


@pytest.mark.browser
def test_from_the_list_to_a_node_and_its_feature(page):
    page.get_by_text("dallas").click()
    page.wait_for_selector("svg.graph")
    assert page.locator("h1").first.inner_text() == "a prompt with <b>markup</b>"
    chips = page.locator(".chips").inner_text()
    assert "replacement score" in chips and "largest violation" in chips and "completeness (circuit-tracer)" in chips
    name = "state: <img src=x onerror=alert(1)> (F1 0.97)"
    page.locator(f'.node.feature[aria-label="{name}, feature"]').first.click()
    assert page.locator("aside h1").inner_text() == name
    page.wait_for_selector(".example")
    assert "<script>alert(2)</script>" in page.locator(".example").first.inner_text()
    assert page.locator(".link.in, .link.out").count() > 0
    inputs = page.locator("aside .edges").first.locator("button")
    assert inputs.count() > 0
    other = inputs.first.get_attribute("title")
    inputs.first.click()  # an input is a node itself
    assert page.locator("aside h1").inner_text() == other
    assert page.locator("script").count() == 1 and page.locator("main img").count() == 0


@pytest.mark.browser
def test_the_slider_shows_fewer_nodes(page):
    page.goto("/#/graph?run=demo/clt&slug=dallas")
    page.wait_for_selector("svg.graph")
    slider = page.get_by_role("slider", name="nodes: share of influence")
    counts = []
    for share in ("1", "0.5", "0"):
        slider.fill(share)
        counts.append(page.locator(".node.feature").count())
    assert counts[0] > counts[1] > counts[2] == 0
    assert page.locator(".node.logit").count() > 0  # logits and tokens stay
    page.get_by_label("errors").check()
    slider.fill("1")
    assert page.locator(".node.error").count() > 0


@pytest.mark.browser
def test_the_keyboard_and_the_search(page):
    page.goto("/#/graph?run=demo/clt&slug=dallas")
    page.wait_for_selector("svg.graph")
    page.locator(".node.logit").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("aside h1").inner_text().startswith("says")
    page.get_by_role("searchbox").fill("state:")
    assert page.locator(".node.near").count() > 0 and page.locator(".node.faded").count() > 0


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Ask until it holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.05)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_and_the_feature_page_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto("/#/graph?run=demo/clt&slug=dallas")
    page.get_by_role("tab", name="In short").click()
    # asked again from here: the page's policy forbids the polling that Playwright does inside it
    wait_until(lambda: page.evaluate("document.querySelector('.picture')?.naturalWidth ?? 0") > 100)
    page.goto("/#/feature?run=demo/clt&layer=1&feature=3")
    page.wait_for_selector(".example")
    brightness = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    )
    assert (brightness > 600) == (scheme == "light")
    page.get_by_label("layer").fill("2")
    page.get_by_label("layer").press("Enter")
    wait_until(lambda: "layer=2" in page.url)


@pytest.mark.browser
def test_what_is_not_there_is_said(browser, view_run, page):
    page.goto("/#/nothing")
    assert "no such page" in page.get_by_role("alert").inner_text()
