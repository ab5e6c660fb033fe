"""Models and transcoders stored in bfloat16, numbers that are not finite, and accelerators."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from crosslace.circuit.features.dashboards import DashboardReader
from crosslace.circuit.features.gather import FeatureSettings, build_features
from crosslace.circuit.judge.behaviour import TextBatch
from crosslace.circuit.judge.evaluation import EvalSettings, EvalText, evaluate
from crosslace.circuit.judge.faithfulness import FaithfulnessPlan, measure_faithfulness
from crosslace.circuit.judge.prompts import PromptSet
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import Intervention
from crosslace.data.errors import UserError
from crosslace.data.models import LanguageModel

PROMPT = [3, 0, 17, 9, 9, 28, 4]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def in_float64(lm: LanguageModel, transcoder) -> ReplacementModel:
    """The same numbers, computed with in float64."""
    model = deepcopy(lm.model).double()
    wide = LanguageModel(model, lm.tokenizer, lm.name)
    return ReplacementModel(wide, deepcopy(transcoder).double())


@pytest.mark.parametrize("shape", [{"reach": "1"}, {"reach": "all"}, {"reach": "2", "read": "mlp_in", "skip": True}])
def test_edges_of_a_model_stored_in_bfloat16(family, shape, make_tiny, make_replacement):
    """Each within 1% of what float64 gives on the same weights; the pass itself in bfloat16 would be off by more."""
    if family in ("mixtral", "qwen3_moe", "gpt_oss") and shape["reach"] != "1":
        pytest.skip("one shape of mixtures of experts is enough")
    lm = make_tiny(family, torch.bfloat16)
    transcoder = make_replacement(family, torch.float32, **shape).transcoder.to(torch.bfloat16)
    rm = ReplacementModel(lm, transcoder)
    exact, graph = in_float64(lm, rm.transcoder).trace(PROMPT), rm.trace(PROMPT)
    assert graph.nodes.keys() == exact.nodes.keys() and graph.n_features > 5
    off = (graph.rows - exact.rows).abs() / exact.rows.abs().clamp(min=1e-3 * float(exact.rows.abs().max()))
    assert float(off.max()) < 0.01
    assert graph.accounting["dtype"] == "float32" and graph.accounting["largest_relative_violation"] < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_faithfulness_of_a_model_stored_in_bfloat16(family, make_tiny, make_replacement):
    """Effects are measured in float32: what bfloat16 would round away is there."""
    lm, transcoder = make_tiny(family, torch.bfloat16), make_replacement(family, torch.float32, reach="all").transcoder
    models = [ReplacementModel(lm, transcoder), in_float64(lm, transcoder)]
    plan = FaithfulnessPlan(pairs=30, per_prompt=12, targets=4)
    effects = []
    for model in models:
        graphs = [model.trace(PROMPT), model.trace([5, 11, 2, 30, 8, 8])]
        effects.append(measure_faithfulness(model, graphs, plan))
    for kind in ("to_logits", "to_features"):
        ours, exact = (effect[kind].measured.double() for effect in effects)
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


def test_random_features_of_a_capped_graph_are_random(make_replacement):
    """Faithfulness silences features that were drawn from all active ones, not those that a cap found influential."""
    rm = make_replacement("llama", torch.float64)
    whole = rm.trace(PROMPT)
    cap = whole.n_features // 3
    graph = rm.trace(PROMPT, max_nodes=cap, sample=(8, 5))
    drawn = [tuple(place) for place in graph.metadata["sampled"]]
    assert len(set(drawn)) == 8 and graph.n_features == cap
    order = torch.randperm(whole.n_features, generator=torch.Generator().manual_seed(5))[:8].tolist()
    assert drawn == [(n.layer, n.position, n.index) for n in (whole.nodes[id] for id in order)]
    assert not set(order) <= set(whole.influence()[: whole.n_features].topk(cap).indices.tolist())
    effects = measure_faithfulness(rm, [graph], FaithfulnessPlan(pairs=1, per_prompt=8))["to_logits"]
    assert len(effects.predicted) == 8 * len(graph.logits)
    assert "sampled" not in rm.trace(PROMPT, sample=(8, 5)).metadata  # all are there: any can be drawn


# -- numbers that are not finite -------------------------------------------------------------------------------------


def broken(rm: ReplacementModel) -> ReplacementModel:
    """A copy whose layer 1 overflows."""
    lm = LanguageModel(deepcopy(rm.lm.model), name="broken")
    with torch.no_grad():
        lm.layers[1].mlp_down.weight.fill_(3e38)  # type: ignore[union-attr]
    return ReplacementModel(lm, rm.transcoder)


def random_text(lm: LanguageModel, count: int = 34, length: int = 32) -> EvalText:
    tokens = torch.randint(3, lm.d_vocab, (count, length), generator=torch.Generator().manual_seed(1)).to(lm.device)
    real = torch.ones_like(tokens, dtype=torch.bool)
    batches = [TextBatch(tokens, real, real, 0)]
    return EvalText(batches, count, batches, PromptSet("test", "1", ((5, 9, 11, 7),)))  # type: ignore[arg-type]


QUICK = EvalSettings(prompts=1, pairs=30, tokens=1000, calibration_tokens=1000, controls=False, layers=False)


def test_numbers_that_are_not_finite_end_in_a_sentence(make_replacement):
    rm = broken(make_replacement("gpt2", torch.float32))
    said = "layer 1 of the model gives numbers that are not finite"
    change = [Intervention(0, 2, 1, value=1.0)]
    for work in (
        lambda: rm.trace(PROMPT),
        lambda: rm.intervene(PROMPT, change),
        lambda: rm.generate(PROMPT, change, 2),
        lambda: evaluate(rm, random_text(rm.lm), QUICK),
    ):
        with pytest.raises(UserError, match=said):
            work()


def test_a_transcoder_that_overflows_is_named(make_replacement):
    rm = make_replacement("llama", torch.float32)
    rm = ReplacementModel(rm.lm, deepcopy(rm.transcoder))
    with torch.no_grad():
        rm.transcoder.W_enc[2].fill_(3e38)
        rm.transcoder.b_enc[2].fill_(3e38)
    with pytest.raises(UserError, match="layer 2 of the transcoder gives numbers that are not finite"):
        rm.trace(PROMPT)
    healthy = make_replacement("llama", torch.float32)
    with pytest.raises(UserError, match="of the model, as it is changed, gives numbers that are not finite"):
        healthy.intervene(PROMPT, [Intervention(0, 2, 1, value=3e38)])


# -- accelerators ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(request, make_tiny, make_replacement):
    """A replacement model on the CPU, and the same on another device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here = make_replacement("llama", torch.float32, reach="all", skip=True)
    lm = LanguageModel(deepcopy(here.lm.model).to(request.param))
    return here, ReplacementModel(lm, here.transcoder)


@pytest.mark.parametrize("pair", DEVICES, indirect=True)
def test_traces_steers_and_generates_on_a_device(pair):
    here, there = pair
    a, b = here.trace(PROMPT), there.trace(PROMPT)
    torch.testing.assert_close(b.rows.cpu(), a.rows, rtol=1e-3, atol=1e-4)
    assert b.prune().carrying(0.99).scores() and b.top_paths(None, b.logits[0].id)
    change = a.interventions([a.n_features - 1], times=-1.0)
    for mode in ("steer", "free", "constrained", "direct"):
        moved, expected = there.intervene(PROMPT, change, mode), here.intervene(PROMPT, change, mode)
        torch.testing.assert_close(moved.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    said = [rm.generate(PROMPT, change, 4).tokens.tolist() for rm in pair]
    assert said[0] == said[1]
    capped = there.trace(PROMPT, max_nodes=20, memory=1e-5, sample=(4, 0))
    assert capped.n_features == 20


@pytest.mark.parametrize("pair", DEVICES, indirect=True)
def test_evaluates_on_a_device(pair):
    a, b = (evaluate(rm, random_text(rm.lm), QUICK) for rm in pair)
    assert b["overall"] == pytest.approx(a["overall"], rel=1e-3)
    assert b["graph"]["replacement_score"] == pytest.approx(a["graph"]["replacement_score"], rel=1e-3)
    assert b["faithfulness"]["to_logits"]["graph"]["slope"] == pytest.approx(
        a["faithfulness"]["to_logits"]["graph"]["slope"], rel=1e-2
    )


class Texts:
    """A corpus of given texts."""

    def __init__(self, texts):
        self.texts = texts

    def sequences(self, split="train", limit_tokens=None):
        return (SimpleNamespace(tokens=text) for text in self.texts)


@pytest.mark.parametrize("pair", DEVICES, indirect=True)
def test_gathers_features_on_a_device(pair, tmp_path):
    texts = Texts(list(random_text(pair[0].lm).batches[0].tokens_BT.cpu()))
    found = []
    for name, rm in zip(("here", "there"), pair):
        build_features(rm, texts, tmp_path / name, FeatureSettings(tokens=1000, top=3, quantiles=2))
        reader = DashboardReader(tmp_path / name / "features")
        found.append([reader.record(layer, 3) for layer in range(rm.lm.n_layers)])
    for a, b in zip(*found):
        assert b["activation_frequency"] == pytest.approx(a["activation_frequency"], abs=2e-3)
        assert b["act_max"] == pytest.approx(a["act_max"], rel=1e-3)
        assert b["top_logits"] == a["top_logits"]
