"""A graph's page as one file: it opens from disk, asks nobody anything, and nothing in a graph becomes markup."""

import re

import pytest
from crosslace.circuit.features import Labels
from crosslace.circuit.graph import Graph
from crosslace.circuit.viewer import Runs, save_page
from crosslace.circuit.viewer.kept import edit_kept
from crosslace.data.errors import UserError

from .conftest import HOSTILE, watched


@pytest.fixture
def run(view_run):
    return Runs(view_run.parents[1]).run("demo/clt")


def test_the_file_holds_no_address_and_no_markup_of_the_graphs(run, tmp_path):
    text = save_page(run, "dallas", tmp_path / "out" / "dallas.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<img" not in text and "alert(1)</script>" not in text and text.count("<script") == 3
    with pytest.raises(UserError, match="has no graph 'x'; it has dallas"):
        save_page(run, "x", tmp_path / "x.html")


@pytest.mark.browser
def test_it_opens_from_disk_with_pins_and_dashboards(run, view_run, tmp_path, browser):
    graph = Graph.load(view_run / "graphs" / "dallas")
    node = graph.nodes[int(graph.influence()[: graph.n_features].argmax())]
    key = f"{node.layer}/{node.position}/{node.index}"
    edit_kept(
        view_run / "graphs" / "dallas", None, {"pins": {key: True}, "groups": {"g": "Mine <i>"}, "members": {key: "g"}}
    )
    path = save_page(run, "dallas", tmp_path / "dallas.html")
    problems: list[str] = []
    page = watched(browser.new_page(), problems, ("file://", "data:", "blob:"))
    page.goto(path.as_uri())
    page.wait_for_selector(".box")
    assert page.locator(".box").count() == 1 and "Mine <i>" in page.locator(".box").text_content()
    page.locator(".box").click()
    page.wait_for_selector(".example")
    assert HOSTILE in page.locator(".nodename").inner_text()
    assert page.get_by_role("tab", name="Steer").count() == 0
    page.get_by_role("button", name="Unpin").first.click()
    page.wait_for_selector(".empty")
    page.keyboard.press("Control+z")
    page.wait_for_selector(".box")
    page.close()
    assert problems == []


@pytest.mark.browser
def test_a_notebook_shows_the_same(view_run, tmp_path, browser):
    """In a frame without an address of its own, as notebooks show it."""
    shown = Graph.load(view_run / "graphs" / "dallas").show(Labels.load(view_run))
    (tmp_path / "notebook.html").write_text(f"<!doctype html><html><body>{shown._repr_html_()}</body></html>")
    problems: list[str] = []
    page = watched(browser.new_page(), problems, ("file://", "data:", "blob:", "about:"))
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator(".box").first.wait_for()
    frame.get_by_role("tab", name="Nodes").click()
    frame.locator(".nodes li").filter(has_text=HOSTILE).first.click()
    frame.get_by_role("tab", name="Node", exact=True).click()
    assert HOSTILE in frame.locator(".nodename").inner_text()
    page.close()
    assert problems == []
