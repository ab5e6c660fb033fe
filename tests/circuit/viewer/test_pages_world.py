"""The bundled world on the page, with transcoders trained for the purpose: Texas is steered to California and
Sacramento is read; and graphs of two prompts, two checkpoints and two kinds of transcoder stand side by side."""

import re
from pathlib import Path

import pytest
from crosslace.circuit.features import Labels
from crosslace.circuit.graph import Graph
from crosslace.circuit.viewer.server import Viewer, ViewSettings
from crosslace.launch.cli.main import main

from .conftest import watched
from .test_pages import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1200)]
PROMPT = "the capital of the state containing {} is"
PRESET = ["experiment=demo", "wandb.mode=disabled", "trainer.checkpoint_every=250", "trainer.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def world_runs(tmp_path_factory) -> Path:
    """The demonstration's cross-layer run with its checkpoints, and a shorter per-layer one; features are named by the
    world's ground truth."""
    root = tmp_path_factory.mktemp("world")
    store, runs = f"store={root / 'store'}", root / "runs"
    run("cache", "experiment=demo", store)
    for kind, steps in (("clt", 750), ("plt", 150)):
        folder = f"run={runs / kind}"
        run("train", *PRESET, store, folder, f"transcoder={kind}", f"trainer.steps={steps}")
        run("features", folder, "features.tokens=5000", "features.top=2", "features.quantiles=1")
        run("trace", folder, f"prompt={PROMPT.format('Dallas')}", "slug=dallas")
    run("trace", f"run={runs / 'clt'}", f"prompt={PROMPT.format('Oakland')}", "slug=oakland")
    return runs


def run(*words: str) -> None:
    assert main(list(words)) == 0


@pytest.fixture(scope="module")
def server(world_runs):
    viewer = Viewer(world_runs, ViewSettings(port=0, open=False)).start()
    yield viewer
    viewer.stop()


@pytest.fixture
def page(browser, server, problems):
    address = server.address.partition("?")[0]
    page = watched(browser.new_page(base_url=address), problems, (address, "data:", "blob:"))
    page.goto(server.address)
    yield page
    page.close()


def test_texas_is_steered_to_california_and_sacramento_is_read(page, world_runs):
    page.goto("/#/graph?run=clt&slug=dallas")
    page.wait_for_selector(".box")
    page.get_by_role("tab", name="Nodes", exact=True).click()
    page.get_by_role("searchbox").fill('label~"state: Texas" kind:feature')
    page.locator(".nodes li").first.click()  # where California is switched on
    page.get_by_role("tab", name="Steer").click()
    for row in page.locator(".row", has_text="state: Texas").all():
        row.get_by_role("spinbutton").fill("-2")
        row.get_by_role("spinbutton").blur()
    page.get_by_label("label of features to switch on").fill("state: California")
    page.locator(".row button", has_text="state: California").first.click()
    page.get_by_label("tokens to write").fill("2")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.wait_for_selector(".probs", timeout=120_000)
    rows = page.locator(".probs").first.locator("tbody tr").all_inner_texts()
    said = {row.split()[0]: re.findall(r"[<\d.]+%", row) for row in rows}
    assert float(said["Austin"][0][:-1]) > 90  # before
    assert float(said["Sacramento"][1][:-1]) > 50 > float(said["Austin"][1].strip("<%"))  # then
    assert "Sacramento" in page.locator(".steered").inner_text()
    assert any("% of before" in text for text in page.locator(".box").all_text_contents())


def compared(page, address: str) -> tuple[int, ...]:
    page.goto("/#/")
    page.goto(f"/#/compare?{address}")
    page.wait_for_selector(".sides canvas", timeout=60_000)
    return tuple(int(text.split()[0]) for text in page.locator(".sentence b").all_inner_texts())


def places(folder: Path) -> set[tuple[int, ...]]:
    graph = Graph.load(folder).prune(0.95, 0.98)
    return {(n.layer, n.position, n.index) for n in graph.nodes if n.kind == "feature"}


def test_two_prompts_side_by_side(page, world_runs):
    """Texas is lost and California gained; what stands at the words that both prompts have is shared."""
    shared, lost, gained = compared(page, "run=clt&slug=dallas&with=oakland")
    columns = page.locator(".sides.three section").all_inner_texts()
    assert shared > 5 and "state: Texas" in columns[0] and "state: California" in columns[1]
    assert "state: Texas" not in columns[1] + columns[2]
    sizes = [len(places(world_runs / "clt" / "graphs" / slug)) for slug in ("dallas", "oakland")]
    assert (shared + lost, shared + gained) == tuple(sizes)


def test_two_checkpoints_side_by_side(page, world_runs):
    """The slider traces the prompt at step 250; its graph stands beside the finished one, by the features' numbers."""
    page.goto("/#/graph?run=clt&slug=dallas")
    slider = page.get_by_role("slider", name="checkpoint of the run")
    slider.fill("0")
    wait_until(lambda: "step=250" in page.evaluate("location.hash"), seconds=120)
    folder = world_runs / "clt" / "graphs" / "dallas"
    early, late = places(folder / "steps" / "step-250"), places(folder)
    assert compared(page, "run=clt&slug=dallas&step=250&with=dallas") == (
        len(early & late), len(early - late), len(late - early),
    )  # fmt: skip
    assert early & late and early != late


def test_a_cross_layer_beside_a_per_layer_transcoder(page, world_runs):
    """Their features have nothing in common but their names, by which they are compared."""
    shared, lost, gained = compared(page, "run=clt&slug=dallas&withrun=plt&with=dallas")
    assert shared > 0 and lost > 0 and gained > 0
    assert "two transcoders" in page.locator(".sentence").inner_text()
    named = {label.text for _, label in Labels.load(world_runs / "plt").items()}
    column = page.locator(".sides.three section").nth(2).locator("li .name").all_inner_texts()
    assert column and all(any(text.startswith(name) for text in named) for name in column)
