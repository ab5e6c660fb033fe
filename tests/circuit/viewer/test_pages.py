"""The pages in a real browser: reading a graph, and the work that is kept. No page may ask anything elsewhere."""

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
from crosslace.circuit.features.labels import Labels
from crosslace.circuit.graph import Graph
from crosslace.circuit.viewer.payload import node_keys

from .conftest import HOSTILE, watched

pytestmark = pytest.mark.browser
DALLAS = "/#/graph?run=demo%2Fclt&slug=dallas"
AXE = Path(__file__).with_name("axe.min.js")


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Ask until it holds: the page's policy forbids the polling that Playwright does inside it."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.05)


def at_graph(page, more: str = ""):
    page.goto("/")
    page.goto(DALLAS + more)
    page.wait_for_selector(".linkgraph canvas")
    return page


def kept_of(shown_run: Path) -> dict:
    path = shown_run / "graphs" / "dallas" / "view.json"
    return json.loads(path.read_text()) if path.exists() else {"pins": {}, "groups": {}, "members": {}, "revision": 0}


def in_list(page):
    page.get_by_role("tab", name="Nodes").click()
    return page.locator(".nodes li")


def first_feature(page):
    return in_list(page).filter(has=page.locator(".dot.feature")).first


def test_from_the_list_to_a_node_and_its_feature(page):
    page.get_by_text("dallas").click()
    page.wait_for_selector(".linkgraph canvas")
    assert page.locator("h1").first.inner_text() == "a prompt with <b>markup</b>"
    assert "influence" in page.locator(".sentence").inner_text()
    strip = page.locator(".strip").inner_text()
    assert "replacement score" in strip and "the sums hold to" in strip and "circuit-tracer’s" in strip
    in_list(page).filter(has_text=HOSTILE).first.click()
    page.get_by_role("tab", name="Node", exact=True).click()
    assert HOSTILE in page.locator(".nodename").inner_text()
    page.wait_for_selector(".example")
    assert "<script>alert(2)</script>" in page.locator(".example").first.inner_text()
    inputs = page.locator(".edges.into button")
    assert inputs.count() > 0
    other = inputs.first.get_attribute("title")
    inputs.first.click()  # an input is a node itself
    wait_until(lambda: other in page.locator(".nodename").inner_text())
    assert page.locator("script").count() == 1 and page.locator("main img").count() == 0


def test_a_click_on_the_canvas_chooses_what_is_drawn_there(page):
    """The node that the list calls the most influential is found where the canvas draws it."""
    at_graph(page)
    box = page.locator(".stage").bounding_box()
    chosen = set()
    for across in range(60, int(box["width"]), 12):  # a line through the first row of nodes
        for down in range(20, int(box["height"]) - 20, 24):
            page.mouse.move(box["x"] + across, box["y"] + down)
            if page.locator(".tip").count():
                page.mouse.click(box["x"] + across, box["y"] + down)
                chosen.add(page.evaluate("new URLSearchParams(location.hash.split('?')[1]).get('node')"))
                break
        if len(chosen) > 2:
            break
    assert len(chosen - {None}) > 1


def test_the_slider_shows_fewer_nodes(page):
    at_graph(page)
    in_list(page)
    slider = page.get_by_role("slider", name="nodes: share of influence")
    counts = []
    for share in ("1", "0.5", "0"):
        slider.fill(share)
        counts.append(page.locator(".nodes .dot.feature").count())
    assert counts[0] > counts[1]
    assert page.locator(".nodes .dot.logit").count() > 0  # logits and tokens stay
    assert page.locator(".nodes .dot.error").count() == 0
    page.get_by_label("errors").check()
    slider.fill("1")
    assert page.locator(".nodes .dot.error").count() > 0


def test_the_search_takes_words_and_filters(page):
    at_graph(page)
    rows = in_list(page)
    everything = rows.count()
    search = page.get_by_role("searchbox")
    search.fill("label~STATE:")
    assert 0 < rows.count() < everything and HOSTILE in rows.first.inner_text()
    search.fill("layer:1 act>0 kind:feature")
    where = [row.locator(".where").inner_text() for row in rows.all()]
    assert where and all(place.startswith("L1 ") for place in where)
    search.fill("colour:red")
    assert "there is no filter colour" in page.locator("#search-says").inner_text()
    search.press("Escape")
    assert rows.count() == everything


def test_pin_group_rename_reload_undo(page, shown_run):
    at_graph(page)
    page.get_by_role("button", name="Clear").click()
    rows = in_list(page).filter(has=page.locator(".dot.feature"))
    keys = [rows.nth(n).get_attribute("data-node") for n in range(2)]
    for n in range(2):
        rows.nth(n).click()
        page.keyboard.press("p")
    boxes = page.locator(".box")
    wait_until(lambda: boxes.count() == 2 and set(kept_of(shown_run)["pins"]) == set(keys))
    boxes.nth(0).click()
    boxes.nth(1).click(modifiers=["Shift"])
    page.get_by_role("button", name="Group…").click()
    name = page.get_by_label("name of the supernode")
    name.fill("Texas <b>")
    name.press("Enter")
    wait_until(lambda: boxes.count() == 1 and "Texas <b>" in boxes.first.text_content())
    page.get_by_role("button", name="Rename…").click()
    name.fill("the state")
    name.press("Enter")
    wait_until(lambda: list(kept_of(shown_run)["groups"].values()) == ["the state"])
    page.reload()
    page.wait_for_selector(".box")
    assert boxes.count() == 1 and "the state" in boxes.first.text_content()
    page.get_by_role("button", name="Ungroup").click()
    wait_until(lambda: boxes.count() == 2)
    page.keyboard.press("Control+z")
    wait_until(lambda: boxes.count() == 1)
    page.keyboard.press("Control+Shift+z")
    wait_until(lambda: boxes.count() == 2 and kept_of(shown_run)["groups"] == {})


def test_the_first_edit_takes_over_what_was_suggested(page, shown_run):
    """Nothing that is in sight disappears, and undo gives the untouched page back."""
    at_graph(page)
    before = page.locator(".box").count()
    assert before > 1 and "suggested" in page.locator(".tools").inner_text()
    rows = in_list(page).filter(has=page.locator(".dot.feature"))
    rows.last.click()
    page.keyboard.press("p")
    wait_until(lambda: page.locator(".box").count() >= before and len(kept_of(shown_run)["pins"]) >= before)
    assert "suggested" not in page.locator(".tools").inner_text()


def test_a_dragged_box_stays_where_it_was_put(page, shown_run):
    at_graph(page)
    box = page.locator(".box").first
    name, where = box.get_attribute("data-box"), box.bounding_box()
    page.mouse.move(where["x"] + where["width"] / 2, where["y"] + where["height"] / 2)
    page.mouse.down()
    page.mouse.move(where["x"] + where["width"] / 2 + 70, where["y"] + where["height"] / 2 + 30, steps=5)
    page.mouse.up()
    wait_until(lambda: name in kept_of(shown_run).get("places", {}))
    place = kept_of(shown_run)["places"][name]
    page.reload()
    page.wait_for_selector(".box")
    assert f"translate({place[0]:.1f} {place[1]:.1f})" == page.locator(f'[data-box="{name}"]').get_attribute(
        "transform"
    )


def test_a_label_is_the_runs_and_a_note_is_kept(page, shown_run):
    at_graph(page)
    first_feature(page).click()
    page.get_by_role("tab", name="Node", exact=True).click()
    page.get_by_role("button", name="edit the label").click()
    page.get_by_label("label of the feature").fill("<u>my name</u>")
    page.keyboard.press("Enter")
    wait_until(lambda: "<u>my name</u>" in page.locator(".nodename").inner_text())
    wait_until(
        lambda: any(
            label.text == "<u>my name</u>" and label.source == "hand" for _, label in Labels.load(shown_run).items()
        )
    )
    note = page.get_by_label("note on this node")
    note.fill("fires on <i>")
    note.blur()
    wait_until(lambda: "fires on <i>" in kept_of(shown_run).get("notes", {}).values())
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    wait_until(lambda: not any(label.source == "hand" for _, label in Labels.load(shown_run).items()))
    assert kept_of(shown_run)["notes"] == {}


def test_two_tabs_that_edit_at_once_lose_nothing(page, shown_run, shared, problems):
    at_graph(page)
    page.get_by_role("button", name="Clear").click()
    wait_until(lambda: kept_of(shown_run)["revision"] == 1)
    second = watched(shared.context.new_page(), problems, shared.allowed)
    second.goto(page.url)
    second.wait_for_selector(".linkgraph canvas")
    rows = [in_list(tab).filter(has=tab.locator(".dot.feature")) for tab in (page, second)]
    keys = [rows[0].nth(n).get_attribute("data-node") for n in range(4)]
    for n, key in enumerate(keys):  # by turns, neither waiting for the other
        row = (page, second)[n % 2].locator(f'.nodes li[data-node="{key}"]')
        row.click()
        row.press("p")
    wait_until(lambda: set(kept_of(shown_run)["pins"]) == set(keys))
    for tab in (page, second):  # and each learns of what the other did
        wait_until(lambda tab=tab: {box.get_attribute("data-box") for box in tab.locator(".box").all()} == set(keys))
    second.close()


def test_the_address_holds_the_whole_state(page):
    at_graph(page, "&share=1&errors=1&side=list&q=layer%3A0&links=100")
    first_feature(page).click()
    page.keyboard.press("Escape")
    page.get_by_role("searchbox").fill("layer:0 act>0")
    first_feature(page).click()
    address = page.url
    shown = page.locator(".nodes li").all_inner_texts()
    page.goto("/")
    page.wait_for_selector("a.card")
    page.goto(address)
    page.wait_for_selector(".nodes li")
    assert page.locator(".nodes li").all_inner_texts() == shown
    assert page.get_by_label("errors").is_checked() and page.get_by_role("searchbox").input_value() == "layer:0 act>0"


def test_the_keyboard_moves_and_keeps_its_place(page):
    at_graph(page)
    stage = page.locator(".stage")
    stage.focus()
    seen = []
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
        seen.append(page.evaluate("location.hash"))
        assert page.evaluate("document.activeElement.className") == "stage"
    assert "node=" in seen[0] and len(set(seen)) > 1
    in_list(page)
    page.locator('.nodes li[tabindex="0"]').focus()
    page.keyboard.press("Home")
    first = page.evaluate("document.activeElement.dataset.node")
    page.keyboard.press("ArrowDown")
    wait_until(lambda: page.evaluate("document.activeElement.dataset.node") not in (None, first))
    assert page.locator('.nodes li[tabindex="0"]').count() == 1
    assert page.get_by_role("status").inner_text() != ""
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    wait_until(lambda: page.get_by_role("dialog").count() == 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_are_usable_by_everyone(page, scheme):
    """axe-core finds nothing serious on the list, a graph with a chosen node, its list, and a feature."""
    page.emulate_media(color_scheme=scheme)
    at_graph(page)
    first_feature(page).click()
    for tab in ("Nodes", "Node"):
        page.get_by_role("tab", name=tab, exact=True).click()
        if tab == "Node":
            page.wait_for_selector(".example")
        assert serious(page) == []
    page.goto("/#/feature?run=demo%2Fclt&layer=1&feature=3")
    page.wait_for_selector(".example")
    brightness = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    )
    assert (brightness > 600) == (scheme == "light")
    assert serious(page) == []
    page.goto("/#/")
    page.wait_for_selector("a.card")
    assert serious(page) == []


def serious(page) -> list[str]:
    """What axe-core calls serious or worse."""
    page.evaluate(AXE.read_text("utf-8") + "; undefined")
    found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})")
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]} {one['nodes'][0]['any'][:1]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical") or one["id"] == "target-size"
    ]


def test_pictures_and_files_can_be_taken_away(page, tmp_path):
    at_graph(page)
    first_feature(page).click()
    for name, start in [
        ("Link graph as SVG", b"<svg "),
        ("Link graph as PNG", b"\x89PNG"),
        ("Subgraph as SVG", b"<svg "),
        ("Subgraph as PNG", b"\x89PNG"),
        ("Neuronpedia JSON", b'{"metadata"'),
    ]:
        page.locator(".menu summary").click()
        with page.expect_download() as download:
            page.get_by_text(name).click()
        content = Path(download.value.path()).read_bytes()
        assert content.startswith(start) and len(content) > 2000, name
        if start == b"<svg ":
            assert b"<script" not in content and b"<img" not in content and content.count(b"<path") > 5
        page.locator(".menu").evaluate("menu => { menu.open = false; }")


def test_what_is_not_there_is_said(page, problems):
    page.goto("/#/nothing")
    assert "no such page" in page.get_by_role("alert").inner_text()
    page.goto("/#/feature?run=demo%2Fclt&layer=0&feature=7")
    page.wait_for_selector('[role="alert"]')
    assert "no dashboard" in page.get_by_role("alert").inner_text()
    assert [text for text in problems if "404" not in text] == []  # the console names the refusal
    problems.clear()


def test_pages_from_elsewhere_neither_read_nor_change(page, shared, shown_run):
    """From another origin with the window's cookie at hand, under another name of the server, and by a path outside."""
    other = shared.context.new_page()
    other.goto("about:blank")
    ask = "([address, options]) => fetch(address, options).then((answer) => answer.text(), (error) => String(error))"
    edit = {"run": "demo/clt", "slug": "dallas", "changes": {"pins": {"0/1/1": True}}}
    for options in ({"credentials": "include"}, {"credentials": "include", "method": "POST", "body": json.dumps(edit)}):
        said = other.evaluate(ask, [f"{shared.address}api/kept?run=demo/clt&slug=dallas", options])
        assert "Failed to fetch" in said
        said = other.evaluate(ask, [f"{shared.address}api/kept", {**options, "mode": "no-cors"}])
        assert "Failed to fetch" in said
    assert not (shown_run / "graphs" / "dallas" / "view.json").exists()
    named = other.goto(shared.viewer.address.replace("127.0.0.1", "elsewhere.example"))
    assert named.status == 421 and "its own address" in other.locator("body").inner_text()
    outside = other.goto(f"{shared.address}static/%2e%2e/%2e%2e/api.py")
    assert outside.status == 404
    other.close()


def test_without_the_token_the_page_says_what_to_do(browser, page):
    stranger = browser.new_context().new_page()
    answer = stranger.goto(page.url.partition("#")[0])
    assert answer is not None and answer.status == 401
    assert "crosslace view" in stranger.locator("body").inner_text()
    stranger.context.close()


def test_what_holds_over_seeds_stands_at_edges_features_and_paths(page, shown_run):
    folder = shown_run / "graphs" / "dallas"
    graph = Graph.load(folder)
    path = next(one for one in graph.top_paths(None, graph.logits[0].id, 50, direct=False))
    places = [(n.kind, n.layer, n.position, n.index) for n in (graph.nodes[id] for id in path.nodes)]
    edges = [(source, target, 3) for source, target in pairwise(places)]
    told = {"nodes": places, "strength": 1.0, "in": 2}
    found = {"trainings": 5, "features": [(*places[1], 4)], "edges": edges, "paths": [told]}
    (folder / "seeds.json").write_text(json.dumps(found))
    at_graph(page)
    assert "in 2 of 5 trainings" in page.get_by_text("Strongest paths, over seeds").locator("..").inner_text()
    source, target = (node_keys([graph.nodes[id]])[0] for id in path.nodes[:2])
    at_graph(page, f"&node={quote(target)}&edge={quote(source)}")
    wait_until(lambda: page.locator(".edgedetail").count() == 1)
    assert "found in 3 of 5 trainings" in page.locator(".edgedetail").inner_text()
    assert "found in 4 of 5 trainings" in page.locator(".facts").first.inner_text()
