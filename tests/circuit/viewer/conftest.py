"""A run to look at, a client that may, and a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crosslace.circuit.features.dashboards import DashboardWriter
from crosslace.circuit.features.labels import Label, Labels
from crosslace.circuit.viewer.server import Viewer, ViewSettings, build_app
from starlette.testclient import TestClient

TOKEN = "a-token"
HOSTILE = "state: <img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def made_run(make_replacement, tmp_path_factory) -> Path:
    """A run folder with a traced graph, dashboards and labels; some of its texts are attempts at markup."""
    run = tmp_path_factory.mktemp("made") / "demo" / "clt"
    model = make_replacement("llama", reach="all", features=6)
    graph = model.trace([3, 17, 9, 9, 28, 4])
    graph.token_strings[3] = " <script>alert(1)</script>"
    graph.metadata["prompt"] = "a prompt with <b>markup</b>"
    graph.nodes.labels[len(graph.nodes) - 1] = "<i>one</i>"
    graph.save(run / "graphs" / "dallas")
    top = graph.nodes[int(graph.influence()[: graph.n_features].argmax())]
    labels = Labels({(top.layer, top.index): Label(f"{HOSTILE} (F1 0.97)", "truth", 0.97)})
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
def view_run(made_run, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(made_run, tmp_path / "demo" / "clt"))


@pytest.fixture
def client(view_run) -> TestClient:
    """Somebody who opened the printed address, and whose page asks."""
    return client_of(view_run.parents[1])


def client_of(folder: Path, settings: ViewSettings | None = None) -> TestClient:
    client = TestClient(build_app(folder, settings or ViewSettings(), TOKEN), base_url="http://127.0.0.1:8765")
    assert client.get("/", params={"token": TOKEN}).status_code == 200
    client.headers["origin"] = "http://127.0.0.1:8765"
    return client


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = "no-first-run disable-background-networking disable-component-update disable-sync"
ELSEWHERE = "--host-resolver-rules=MAP elsewhere.example 127.0.0.1"
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", ELSEWHERE, *(f"--{switch}" for switch in SWITCHES.split())]


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


class Shared:
    """One server and one browser window for all tests of pages: each gets a new page, and a fresh copy of the run in
    the folder that is served."""

    def __init__(self, browser, root: Path, made: Path, model):
        self.root, self.made, self.model = root, made, model
        self.run = Path(shutil.copytree(made, root / "demo" / "clt"))
        self.viewer = Viewer(root, ViewSettings(port=0, open=False), lambda folder: model).start()
        self.address = self.viewer.address.partition("?")[0]
        self.allowed = (self.address, "data:", "blob:")
        self.context = browser.new_context(base_url=self.address)
        self.context.new_page().goto(self.viewer.address)  # the token becomes the window's cookie

    def fresh(self) -> Path:
        shutil.rmtree(self.run)
        return Path(shutil.copytree(self.made, self.run))

    def close(self) -> None:
        self.context.close()
        self.viewer.stop()


@pytest.fixture(scope="session")
def shared(browser, made_run, make_replacement, tmp_path_factory) -> Iterator[Shared]:
    found = Shared(
        browser, tmp_path_factory.mktemp("shown"), made_run, make_replacement("llama", features=6, reach="all")
    )
    yield found
    found.close()


@pytest.fixture
def problems() -> Iterator[list[str]]:
    """What pages did that they should not have: any error, dialog or request to elsewhere fails the test."""
    found: list[str] = []
    yield found
    assert found == []


@pytest.fixture
def shown_run(shared) -> Path:
    """The run that the page shows, as it was made."""
    return shared.fresh()


@pytest.fixture
def page(shared, shown_run, problems):
    """A page at the viewer."""
    page = watched(shared.context.new_page(), problems, shared.allowed)
    page.goto("/")
    yield page
    page.close()


def watched(page, problems: list[str], allowed: tuple[str, ...]):
    """The page, with everything noted that it should not do."""
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(allowed) else problems.append(request.url))
    return page
