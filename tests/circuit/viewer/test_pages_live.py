"""Steering and tracing on the page, in a real browser, with a model behind it."""

import re

import pytest
from crosslace.circuit.attribution import explain_attention, save_heads
from crosslace.circuit.graph import Graph
from crosslace.circuit.replacement import Intervention
from crosslace.circuit.viewer import Runs, save_page
from crosslace.circuit.viewer.kept import edit_kept
from crosslace.circuit.viewer.payload import node_keys

from .conftest import watched
from .test_pages import DALLAS, serious, wait_until

pytestmark = pytest.mark.browser


@pytest.fixture
def model(shared):
    return shared.model


@pytest.fixture
def page(page, shown_run):
    """A page at a run that has a transcoder, and so a model to ask."""
    (shown_run / "transcoder").mkdir()
    (shown_run / "transcoder" / "transcoder.json").write_text('{"kind": "clt"}')
    return page


def test_a_supernode_is_steered_and_the_page_says_what_the_model_says(page, shown_run, model):
    folder = shown_run / "graphs" / "dallas"
    graph = Graph.load(folder)
    nodes = [graph.nodes[i] for i in graph.influence()[: graph.n_features].topk(3).indices.tolist()]
    keys = [f"{n.layer}/{n.position}/{n.index}" for n in nodes]
    kept = {"pins": dict.fromkeys(keys, True), "groups": {"g": "Texas"}, "members": dict.fromkeys(keys, "g")}
    edit_kept(folder, None, kept)
    page.goto(DALLAS)
    page.get_by_role("tab", name="Steer").click()
    page.get_by_label("multiply Texas by").fill("-2")
    page.get_by_label("multiply Texas by").blur()
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
    page.reload()  # what is steered is in the address
    page.wait_for_selector(".box")
    assert page.get_by_label("multiply Texas by").input_value() == "-2"
    page.get_by_role("button", name="Steer", exact=True).click()
    page.wait_for_selector(".steered")
    page.get_by_role("button", name="Reset").click()
    wait_until(lambda: page.locator(".steered").count() == 0)


def test_a_feature_is_switched_on_by_its_label(page):
    page.goto(DALLAS + "&side=steer")
    page.get_by_label("label of features to switch on").fill("state")
    page.locator(".row button", has_text="state").first.click()
    page.get_by_role("button", name="Steer", exact=True).click()
    page.wait_for_selector(".probs")
    assert page.locator(".probs").first.locator("tbody tr").count() > 3


def test_a_token_of_the_answer_is_traced(page, shown_run, model, monkeypatch):
    """Answer a prompt, click a token that the model wrote, and stand on the page of its graph."""
    monkeypatch.setattr(model.lm, "tokenize", _numbers(model.lm.tokenize))
    page.goto("/#/live?run=demo%2Fclt")
    page.get_by_label("prompt", exact=True).fill("3 17 9")
    page.get_by_role("button", name="Answer").click()
    answers = page.locator(".said-token.answer")
    answers.first.wait_for()
    before = {path.name for path in (shown_run / "graphs").iterdir()}
    token = answers.nth(1).inner_text()
    answers.nth(1).click()
    page.wait_for_selector(".linkgraph canvas")
    (made,) = {path.name for path in (shown_run / "graphs").iterdir()} - before
    graph = Graph.load(shown_run / "graphs" / made)
    assert f"slug={made}" in page.url and graph.tokens[:3] == [3, 17, 9] and len(graph.tokens) == 4
    assert int(token) in [logit.token for logit in graph.logits]


def test_an_edge_is_looked_at_closely(page, shown_run, model):
    """Its heads, why one of them looked there, and its source silenced: what the edge says beside what happens."""
    graph = Graph.load(shown_run / "graphs" / "dallas")
    logit, last = graph.logits[0].id, len(graph.tokens) - 1
    nodes = [graph.nodes[i] for i in range(graph.n_features)]
    sources = [n.id for n in nodes if n.layer == 0 and n.position < last]
    source = max(sources, key=lambda id: abs(graph.edge(logit, id)))
    keys = node_keys(graph.nodes)
    page.goto(DALLAS + f"&node={keys[logit].replace('/', '%2F')}")
    page.locator(".edges.into .more").first.wait_for()
    while page.get_by_role("button", name="more", exact=False).filter(has_text="more").count():
        page.get_by_role("button", name="more", exact=False).filter(has_text="more").first.click()
    name = f"feature {nodes[source].index}"
    row = page.locator(".edges.into .edge").filter(has_text=name).filter(has_text=f"L0 · {nodes[source].position} ")
    row.locator(".more").click()
    page.wait_for_selector(".edgedetail .headrow")
    layer, head, part = model.heads(graph, [(logit, source)])[0].strongest(1)[0]
    first = page.locator(".edgedetail .headrow").first.inner_text()
    assert f"layer {layer}, head {head}" in first and f"{abs(part):.3g}"[:4] in first
    page.get_by_role("button", name="Measure").click()
    page.wait_for_selector(".edgedetail .probs")
    said, frozen, measured = map(float, page.locator(".edgedetail .probs tbody").inner_text().split())
    node = nodes[source]
    steered = model.intervene(graph.tokens, [Intervention(node.layer, node.position, node.index, times=0)])
    token = graph.logits[0].token
    after, before = (logits[token] - logits.mean() for logits in (steered.logits[-1], steered.clean_logits[-1]))
    assert said == pytest.approx(-graph.edge(logit, source), rel=0.01) == frozen
    assert measured == pytest.approx(float(after - before), rel=0.01)
    page.get_by_role("button", name=f"why layer {layer}, head {head} looked there").click()
    page.wait_for_selector(".pattern")
    assert f"L{layer}H{head} from" in page.locator("#details-panel").inner_text()
    pressed = page.locator('.seen[aria-pressed="true"]')
    assert pressed.count() == 1 and page.locator(".terms").first.locator("tbody tr").count() > 0


def test_a_graphs_record_of_heads_is_shown(page, shared, shown_run, model, problems, tmp_path):
    """Without asking the model, and in a saved copy too."""
    folder = shown_run / "graphs" / "dallas"
    explained = explain_attention(model, Graph.load(folder), edges=30, heads=2)
    save_heads(folder, explained)
    saved = save_page(Runs(shared.root).run("demo/clt"), "dallas", tmp_path / "dallas.html")
    copy = watched(shared.context.new_page(), problems, ("file://", "data:", "blob:"))
    copy.goto(saved.as_uri())
    page.goto(DALLAS)
    look = explained["attention"][0]
    most = max(look["pattern"].items(), key=lambda item: item[1])
    for at in (page, copy):
        at.get_by_role("tab", name="Attention").click()
        heads = at.locator("#details-panel .words button")
        heads.first.click()
        at.wait_for_selector(".pattern")
        assert f"L{look['layer']}H{look['head']} from {look['query']}" in at.locator("#details-panel").inner_text()
        assert f"{100 * most[1]:.0f}%" in at.locator(".seen").nth(int(most[0])).inner_text()
        assert heads.count() == 2
    copy.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_the_model_answers_is_usable_by_everyone(page, shown_run, model, scheme):
    """axe-core finds nothing serious on an edge, a head's look, steering, two graphs, and asking."""
    page.emulate_media(color_scheme=scheme)
    folder = shown_run / "graphs" / "dallas"
    save_heads(folder, explain_attention(model, Graph.load(folder), edges=30, heads=1))
    page.goto(DALLAS + "&side=heads")
    page.locator("#details-panel .words button").first.click()
    page.wait_for_selector(".pattern")
    assert serious(page) == []
    graph = Graph.load(folder)
    page.goto(DALLAS + f"&side=steer&changes={node_keys(graph.nodes)[0]}*2")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.wait_for_selector(".probs")
    assert serious(page) == []
    page.goto("/#/compare?run=demo%2Fclt&slug=dallas&with=dallas")
    page.wait_for_selector(".sides canvas")
    assert serious(page) == []
    page.goto("/#/live?run=demo%2Fclt")
    page.get_by_label("prompt", exact=True).wait_for()
    assert serious(page) == []


def test_the_slider_goes_through_a_runs_checkpoints(page, shown_run, make_replacement, monkeypatch):
    """Traced on the first visit; pins stay; and the step stands beside the finished run, by feature."""
    other = make_replacement("llama", reach="all", features=6, seed=5)
    monkeypatch.setattr("crosslace.circuit.viewer.live.transcoder_at", lambda run, step, rows: other.transcoder)
    for step in (40, 80):
        (shown_run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    page.goto(DALLAS)
    page.get_by_role("button", name="Clear").click()
    rows = page.get_by_role("tab", name="Nodes", exact=True)
    rows.click()
    page.locator('.nodes li[data-node^="logit"]').first.click()
    page.keyboard.press("p")
    before = page.locator(".strip").inner_text()
    slider = page.get_by_role("slider", name="checkpoint of the run")
    assert slider.get_attribute("aria-valuetext") == "finished"
    slider.fill("0")
    wait_until(lambda: "step=40" in page.evaluate("location.hash") and page.locator(".strip").inner_text() != before)
    wait_until(lambda: page.locator(".box").count() == 1)
    assert (shown_run / "graphs" / "dallas" / "steps" / "step-40" / "graph.json").exists()
    page.get_by_text("beside the finished one").click()
    page.wait_for_selector(".sides canvas")
    trace = [Graph.load(shown_run / "graphs" / "dallas" / at).prune(0.95, 0.98) for at in ("steps/step-40", ".")]
    places = [{(n.layer, n.position, n.index) for n in graph.nodes if n.kind == "feature"} for graph in trace]
    shared, lost, gained = page.locator(".sentence b").all_inner_texts()
    assert shared == f"{len(places[0] & places[1])} features"
    assert (int(lost), int(gained)) == (len(places[0] - places[1]), len(places[1] - places[0]))
    page.goto(DALLAS + "&step=40")
    slider.fill("2")
    wait_until(lambda: "step=" not in page.evaluate("location.hash") and page.locator(".strip").inner_text() == before)


def _numbers(tokenize):
    """The tiny model has no tokenizer: a prompt is its token ids."""
    return lambda prompt: tokenize([int(word) for word in prompt.split()] if isinstance(prompt, str) else prompt)
