"""Steering and tracing on the page, in a real browser, with a model behind it."""

import re

import pytest
from crosslace.circuit.graph import Graph
from crosslace.circuit.replacement import Intervention
from crosslace.circuit.viewer.kept import edit_kept
from crosslace.circuit.viewer.server import Viewer, ViewSettings

from .conftest import watched
from .test_pages import DALLAS, wait_until

pytestmark = pytest.mark.browser


@pytest.fixture
def model(make_replacement):
    return make_replacement("llama", reach="all", features=6)


@pytest.fixture
def page(browser, view_run, model):
    (view_run / "transcoder").mkdir()
    (view_run / "transcoder" / "transcoder.json").write_text('{"kind": "clt"}')
    viewer = Viewer(view_run.parents[1], ViewSettings(port=0, open=False), lambda folder: model).start()
    address, problems = viewer.address.partition("?")[0], []
    page = watched(browser.new_context(base_url=address).new_page(), problems, (address, "data:", "blob:"))
    page.goto(viewer.address)
    yield page
    page.context.close()
    viewer.stop()
    assert problems == []


def test_a_supernode_is_steered_and_the_page_says_what_the_model_says(page, view_run, model):
    folder = view_run / "graphs" / "dallas"
    graph = Graph.load(folder)
    nodes = [graph.nodes[i] for i in graph.influence()[: graph.n_features].topk(3).indices.tolist()]
    keys = [f"{n.layer}/{n.position}/{n.index}" for n in nodes]
    kept = {"pins": dict.fromkeys(keys, True), "groups": {"g": "Texas"}, "members": dict.fromkeys(keys, "g")}
    edit_kept(folder, None, kept)
    page.goto(DALLAS)
    page.get_by_role("tab", name="Steer").click()
    page.get_by_label("multiply Texas by").fill("-2")
    page.get_by_label("tokens to write").fill("3")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.wait_for_selector(".steered")
    group = [Intervention(n.layer, n.position, n.index, times=-2) for n in nodes]
    expected = model.intervene(graph.tokens, group, "steer").probabilities()
    rows = page.locator(".probs").first.locator("tbody tr")
    shown = {row.locator("th").inner_text(): row.locator("td").nth(1).inner_text() for row in rows.all()}
    for token, share in shown.items():
        if re.fullmatch(r"[\d.]+%", share):
            assert float(share[:-1]) == pytest.approx(100 * float(expected[int(token)]), rel=0.06, abs=0.51), token
    assert len(shown) > 3
    written = model.generate(graph.tokens, group, 3).text
    assert page.locator(".steered").inner_text().split() == written.split()
    assert "% of before" in page.locator(".box").first.text_content()
    page.get_by_role("button", name="Reset").click()
    wait_until(lambda: page.locator(".steered").count() == 0)


def test_a_feature_is_switched_on_by_its_label(page):
    page.goto(DALLAS + "&side=steer")
    page.get_by_label("label of features to switch on").fill("state")
    page.locator(".row button", has_text="state").first.click()
    page.get_by_role("button", name="Steer", exact=True).click()
    page.wait_for_selector(".probs")
    assert page.locator(".probs").first.locator("tbody tr").count() > 3


def test_a_token_of_the_answer_is_traced(page, view_run, model, monkeypatch):
    """Answer a prompt, click a token that the model wrote, and stand on the page of its graph."""
    monkeypatch.setattr(model.lm, "tokenize", _numbers(model.lm.tokenize))
    page.goto("/#/live?run=demo%2Fclt")
    page.get_by_label("prompt", exact=True).fill("3 17 9")
    page.get_by_role("button", name="Answer").click()
    answers = page.locator(".said-token.answer")
    answers.first.wait_for()
    before = {path.name for path in (view_run / "graphs").iterdir()}
    token = answers.nth(1).inner_text()
    answers.nth(1).click()
    page.wait_for_selector(".linkgraph canvas")
    (made,) = {path.name for path in (view_run / "graphs").iterdir()} - before
    graph = Graph.load(view_run / "graphs" / made)
    assert f"slug={made}" in page.url and graph.tokens[:3] == [3, 17, 9] and len(graph.tokens) == 4
    assert int(token) in [logit.token for logit in graph.logits]


def _numbers(tokenize):
    """The tiny model has no tokenizer: a prompt is its token ids."""
    return lambda prompt: tokenize([int(word) for word in prompt.split()] if isinstance(prompt, str) else prompt)
