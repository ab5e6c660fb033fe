"""Evaluation on cases whose answers are known: perfect, zero and mean transcoders, and the ReLU MLP as a transcoder."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from crosslace.circuit.attribution import trace
from crosslace.circuit.graph import DenseRows, Graph, Nodes
from crosslace.circuit.judge import perturbation
from crosslace.circuit.judge.behaviour import TextBatch, resampled
from crosslace.circuit.judge.controls import (
    RIDGE_OF_FEATURES,
    calibrate,
    neuron_condition,
    random_features,
    untrained,
)
from crosslace.circuit.judge.evaluation import EvalSettings, EvalText, evaluate, few_of, verdicts
from crosslace.circuit.judge.faithfulness import FaithfulnessPlan, compare, measure_faithfulness, total_effects
from crosslace.circuit.judge.graph_scores import path_length
from crosslace.circuit.judge.health import density_histogram, duplicates, warnings
from crosslace.circuit.judge.perturbation import perturbation_growth
from crosslace.circuit.judge.prompts import PromptSet, prompt_set
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import Intervention
from crosslace.data.errors import SettingsError, UserError
from crosslace.data.models.language_model import LanguageModel
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.activations import SparseActs
from crosslace.train.transcoder.transcoder import Transcoder

QUICK = EvalSettings(prompts=0, pairs=0, tokens=1000, calibration_tokens=1000)


@pytest.fixture(scope="module")
def relu_gpt2(make_tiny) -> LanguageModel:
    """A model whose MLPs are ReLU networks: exact transcoders of themselves."""
    return make_tiny("gpt2", torch.float64, activation_function="relu")


def self_transcoder(lm: LanguageModel) -> Transcoder:
    """Identity 5: W_enc = W_in, W_dec = W_out, reading after the norm."""
    mlps: list[Any] = [parts.mlp for parts in lm.layers]
    settings = TranscoderSettings(features=mlps[0].c_fc.weight.shape[1], reach="1", activation="relu", read="mlp_in")
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=torch.float64)
    with torch.no_grad():
        for l, mlp in enumerate(mlps):
            transcoder.W_enc[l].copy_(mlp.c_fc.weight.T)
            transcoder.b_enc[l].copy_(mlp.c_fc.bias)
            transcoder.W_dec[l][:, 0].copy_(mlp.c_proj.weight)
            transcoder.b_dec[l].copy_(mlp.c_proj.bias)
    return transcoder


def constant_transcoder(lm: LanguageModel, bias_LD: torch.Tensor) -> Transcoder:
    """No feature ever fires; every output is the bias."""
    settings = TranscoderSettings(features=8, reach="1", activation="relu")
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=torch.float64)
    with torch.no_grad():
        for l in range(lm.n_layers):
            transcoder.b_enc[l].fill_(-1)
            transcoder.b_dec[l].copy_(bias_LD[l])
    return transcoder


def random_text(lm: LanguageModel, prompts: PromptSet | None = None, sequences: int = 40, length: int = 32) -> EvalText:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, lm.d_vocab, (2 * sequences, length), generator=generator)
    counted = torch.ones(sequences, length, dtype=torch.bool)
    half = sequences // 2
    batches = [TextBatch(tokens[i : i + half], counted[:half], counted[:half], i) for i in (0, half)]
    return EvalText(batches, sequences, [whole(tokens[sequences:])], prompts)


def whole(tokens: torch.Tensor) -> TextBatch:
    """A batch without padding."""
    real = torch.ones_like(tokens, dtype=torch.bool)
    return TextBatch(tokens, real, real, 0)


def mean_outputs(lm: LanguageModel, text: EvalText, masked_positions) -> torch.Tensor:
    """The mean MLP output over the evaluation text itself."""
    found = []
    for batch in text.batches:
        with lm.capture(("mlp_out",)) as sites:
            lm(batch.tokens_BT)
        found.append(sites.stacked("mlp_out")[~masked_positions(batch.tokens_BT)])
    return torch.cat(found).mean(0)


def test_a_perfect_transcoder(relu_gpt2):
    result = evaluate(ReplacementModel(relu_gpt2, self_transcoder(relu_gpt2)), random_text(relu_gpt2), QUICK)
    behaviour = result["behaviour"]
    assert result["overall"]["nmse"] < 1e-12 and result["overall"]["cosine"] == pytest.approx(1)
    assert behaviour["kl"] == pytest.approx(0, abs=1e-9)
    assert behaviour["top1"] == 1 and behaviour["ce_recovered"] == pytest.approx(1, abs=1e-6)
    assert behaviour["ce_replaced"] == pytest.approx(behaviour["ce_clean"], abs=1e-6)
    for part in (*behaviour["layers"], *behaviour["depth"]):
        assert part["kl"] == pytest.approx(0, abs=1e-9)


def test_a_zero_transcoder_explains_nothing(relu_gpt2):
    zero = constant_transcoder(relu_gpt2, torch.zeros(relu_gpt2.n_layers, relu_gpt2.d_model))
    result = evaluate(ReplacementModel(relu_gpt2, zero), random_text(relu_gpt2), QUICK)
    assert result["overall"]["nmse"] == pytest.approx(1)
    assert result["overall"]["l0"] == 0 and result["overall"]["dead"] == 1
    assert "layer 0 has no active feature at all" in result["verdicts"]
    assert any("does not beat the linear control in nmse" in verdict for verdict in result["verdicts"])


def test_the_mean_has_unit_fvu_and_recovers_nothing(relu_gpt2):
    text = random_text(relu_gpt2)
    zero = ReplacementModel(relu_gpt2, constant_transcoder(relu_gpt2, torch.zeros(3, relu_gpt2.d_model)))
    mean = mean_outputs(relu_gpt2, text, zero.masked_positions)
    text = EvalText(text.batches, text.sequences, text.batches, None)
    result = evaluate(ReplacementModel(relu_gpt2, constant_transcoder(relu_gpt2, mean)), text, QUICK)
    assert result["overall"]["fvu"] == pytest.approx(1, abs=1e-9)
    assert result["behaviour"]["ce_recovered"] == pytest.approx(0, abs=1e-4)
    assert all(abs(layer["ce_recovered"]) < 1e-2 for layer in result["behaviour"]["layers"])


def test_depth_curves_end_at_the_full_replacement(relu_gpt2):
    noisy = self_transcoder(relu_gpt2)
    with torch.no_grad():
        for W_dec in noisy.W_dec:
            W_dec.mul_(0.7)
    behaviour = evaluate(ReplacementModel(relu_gpt2, noisy), random_text(relu_gpt2), QUICK)["behaviour"]
    assert behaviour["depth"][-1]["kl"] == behaviour["kl"] > 0
    assert behaviour["depth"][0]["kl"] == pytest.approx(behaviour["layers"][0]["kl"], rel=1e-9)
    assert [part["last"] for part in behaviour["depth"]] == [0, 1, 2]


def test_graphs_of_a_perfect_transcoder(relu_gpt2):
    rm = ReplacementModel(relu_gpt2, self_transcoder(relu_gpt2))
    prompts = PromptSet("test", "1", ((5, 9, 11, 7), (4, 8, 15, 16, 23)))  # type: ignore[arg-type]
    settings = EvalSettings(prompts=2, pairs=60, tokens=1000, calibration_tokens=1000, controls=False, layers=False)
    result = evaluate(rm, random_text(relu_gpt2, prompts), settings)
    graph = result["graph"]
    assert graph["largest_violation"] < 1e-6
    # the first position keeps the model's own output, so that its error is not zero
    assert 0 < graph["replacement_score"] <= 1 and len(graph["prompts"]) == 2
    assert graph["frontier"][-1]["replacement_score"] == pytest.approx(graph["replacement_score"], rel=1e-6)
    kept = [row["features"] for row in graph["frontier"]]
    assert kept == sorted(kept)
    logits = result["faithfulness"]["to_logits"]["graph"]
    assert logits["pairs"] >= 60 and logits["pearson"] > 0.9
    assert logits["pearson"] > result["faithfulness"]["to_logits"]["random"]["pearson"]
    # the replacement model *is* the model here: perturbations agree wherever they go
    for row in result["faithfulness"]["growth"]:
        assert row["cosine"] == pytest.approx(1, abs=1e-5) and row["error"] < 1e-4


def test_few_features_are_decoded_alone():
    """What is left out of the decoding is zero, whether few features fire or many."""
    transcoder = Transcoder(TranscoderSettings(features=64, reach="all"), 16, 3, seed=0, dtype=torch.float64)
    acts = [torch.rand(9, 64, dtype=torch.float64) * (torch.rand(9, 64) < share) for share in (0.02, 0.05, 0.9)]
    few = [few_of(one) for one in acts]
    assert [isinstance(one, SparseActs) for one in few] == [True, True, False]
    torch.testing.assert_close(transcoder.decode(few), transcoder.decode(acts))


def test_growth_starts_with_the_push_itself(relu_gpt2):
    rm = ReplacementModel(relu_gpt2, self_transcoder(relu_gpt2))
    first = perturbation_growth(rm, [torch.tensor([5, 9, 11, 7])])[0]
    assert first["layers"] == 1 and first["growth"] > 0.5 and first["pairs"] > 0


def test_pushes_side_by_side_are_pushes_one_by_one(relu_gpt2, monkeypatch):
    rm = ReplacementModel(relu_gpt2, self_transcoder(relu_gpt2))
    prompts = [torch.tensor([5, 9, 11, 7]), torch.tensor([3, 8, 2])]
    together = perturbation_growth(rm, prompts)
    monkeypatch.setattr(perturbation, "_AT_ONCE", 1)
    for one, other in zip(together, perturbation_growth(rm, prompts), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_too_little_text_is_refused(relu_gpt2):
    rm = ReplacementModel(relu_gpt2, self_transcoder(relu_gpt2))
    with pytest.raises(UserError, match="too few for these statistics"):
        evaluate(rm, random_text(relu_gpt2, sequences=4), QUICK)
    with pytest.raises(UserError, match="held-out text is empty"):
        evaluate(rm, EvalText([], 0, [], None), QUICK)
    with pytest.raises(SettingsError, match=r"eval\.pairs"):
        EvalSettings(prompts=0)
    with pytest.raises(UserError, match="is empty"):
        prompt_set("mine", [])


def test_the_linear_control_finds_a_linear_map(make_tiny):
    """Where the MLP output is a linear map of the input, the control reproduces it."""
    lm = make_tiny("gpt2", torch.float64, activation_function="linear")
    tokens = torch.randint(3, lm.d_vocab, (40, 32), generator=torch.Generator().manual_seed(0))
    keep = lambda tokens: torch.zeros_like(tokens, dtype=torch.bool)
    calibration = calibrate(lm, "mlp_in", [whole(tokens[:20]), whole(tokens[20:])], keep)
    with lm.capture(("mlp_in", "mlp_out")) as sites:
        lm(tokens)
    x, y = sites.stacked("mlp_in"), sites.stacked("mlp_out")
    y_hat = torch.einsum("btld,led->btle", x.float(), calibration.W_LDD) + calibration.b_LD
    assert (y - y_hat).square().sum() / y.square().sum() < 1e-4
    torch.testing.assert_close(calibration.mean_y_LD.double(), y.mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_controls_fire_as_often_as_the_transcoder(relu_gpt2):
    transcoder = self_transcoder(relu_gpt2)
    tokens = torch.randint(3, relu_gpt2.d_vocab, (40, 32), generator=torch.Generator().manual_seed(0))
    keep = lambda tokens: torch.zeros_like(tokens, dtype=torch.bool)
    calibration = calibrate(relu_gpt2, "mlp_in", [whole(tokens)], keep)
    fresh = untrained(transcoder, calibration, [4.0, 4.0, 4.0])
    for l in range(3):
        active = (fresh.encode_layer(calibration.sample_NLD[:, l].double(), l) > 0).sum(-1).double().mean()
        assert active == pytest.approx(4, rel=0.05)


def test_random_features_write_what_a_ridge_fit_gives_them(relu_gpt2):
    """The gradient of the ridge regression's loss is zero at the fitted decoder."""
    transcoder = self_transcoder(relu_gpt2)
    tokens = torch.randint(3, relu_gpt2.d_vocab, (40, 32), generator=torch.Generator().manual_seed(0))
    keep = lambda tokens: torch.zeros_like(tokens, dtype=torch.bool)
    calibration = calibrate(relu_gpt2, "mlp_in", [whole(tokens)], keep)
    fitted = random_features(untrained(transcoder, calibration, [4.0, 4.0, 4.0]), calibration)
    for l in range(3):
        A = fitted.encode_layer(calibration.sample_NLD[:, l].double(), l)
        wanted = (calibration.sample_y_NLD[:, l] - calibration.mean_y_LD[l]).double()
        W, ridge = fitted.W_dec[l][:, 0], RIDGE_OF_FEATURES * A.square().sum(1).mean()
        torch.testing.assert_close(A.T @ (wanted - A @ W), ridge * W, rtol=1e-6, atol=1e-6 * float(ridge))
        assert not fitted.W_dec[l][:, 1:].any()


def test_all_neurons_are_the_model_itself(relu_gpt2):
    tokens = torch.randint(3, relu_gpt2.d_vocab, (2, 8), generator=torch.Generator().manual_seed(0))
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    clean = relu_gpt2(tokens)
    everything = neuron_condition(relu_gpt2, dict.fromkeys(range(3), 24))
    few = neuron_condition(relu_gpt2, dict.fromkeys(range(3), 1))
    assert everything is not None and few is not None
    with everything.install(keep):
        torch.testing.assert_close(relu_gpt2(tokens), clean)
    with few.install(keep):
        assert not torch.allclose(relu_gpt2(tokens), clean)
    with few.install(~keep):  # kept positions are untouched
        torch.testing.assert_close(relu_gpt2(tokens), clean)
    torch.testing.assert_close(relu_gpt2(tokens), clean)


def test_resampled_interval_covers_the_value():
    sums = torch.stack([torch.full((50,), 10.0), torch.arange(50.0)], -1).double()
    found = resampled(sums, lambda totals: totals[..., 1] / totals[..., 0])
    assert found.value == pytest.approx(2.45)
    assert found.value is not None and found.low is not None and found.high is not None
    half = 1.96 * (torch.arange(50.0) / 10).std() / math.sqrt(50)
    assert found.high - found.value == pytest.approx(float(half), rel=0.15)
    assert found.value - found.low == pytest.approx(float(half), rel=0.15)
    assert resampled(sums[:1], lambda totals: totals[..., 1] / totals[..., 0]).low is None


def test_compare_gives_slope_and_ranks():
    x, prompt = torch.linspace(-1, 1, 101), torch.arange(101) % 10
    half = compare(x, 0.5 * x, prompt)
    assert half.slope == pytest.approx(0.5) and half.slope_interval == pytest.approx([0.5, 0.5])
    cubed = compare(x, x**3, prompt)
    assert cubed.spearman == pytest.approx(1) and cubed.pearson is not None and cubed.pearson < 1
    assert compare(x[:5], x[:5], prompt[:5]).slope is None
    assert compare(x, x, torch.full_like(x, 3)).slope_interval is None


def test_a_slope_that_rests_on_one_prompt_shows_it():
    x, prompt = torch.linspace(-1, 1, 100), torch.arange(100) // 10
    y = x.clone()
    x[0], y[0] = 20, 0  # one promise that is not kept outweighs all others
    found = compare(x, y, prompt)
    assert found.slope is not None and found.slope < 0.1
    assert found.slope_interval is not None and found.slope_interval[0] < 0.1 and found.slope_interval[1] > 0.9


def test_effects_on_logits_are_taken_before_a_soft_cap(make_tiny, make_replacement):
    """As a graph has them: a cap that bites and none give the same effects."""
    prompts = [[3, 0, 17, 9, 28, 4], [5, 9, 11, 7]]
    found = []
    for cap in (2.0, None):
        lm = make_tiny("gemma2", final_logit_softcapping=cap)
        rm = ReplacementModel(lm, make_replacement("gemma2").transcoder)
        graphs = [rm.trace(prompt, targets=[1, 8]) for prompt in prompts]
        found.append(measure_faithfulness(rm, graphs, FaithfulnessPlan(pairs=40))["to_logits"])
    assert found[0].measured.abs().max() > 0.1 and set(found[0].prompt.tolist()) == {0, 1}
    for capped, plain in zip(*found, strict=True):
        torch.testing.assert_close(capped, plain, rtol=0, atol=1e-5)


def chain_graph(weights: Sequence[float]) -> Graph:
    """embedding -> feature at layer 0 -> feature at layer 1 -> logit, each edge with its weight, activations 2."""
    column = lambda *values: torch.tensor(values, dtype=torch.long)
    nodes = Nodes.join(
        [
            Nodes.of("feature", column(0, 1), column(0, 0), column(0, 0), torch.tensor([2.0, 2.0])),
            Nodes.of("error", column(0, 1), column(0, 0), column(0, 0)),
            Nodes.of("embedding", column(-1), column(0), column(3)),
            Nodes.of("logit", column(2), column(0), column(4), torch.tensor([1.0])),
        ]
    )
    rows = torch.zeros(3, len(nodes))
    rows[0, 4], rows[1, 0], rows[2, 1] = weights
    return Graph(DenseRows(rows), nodes, torch.tensor([1.0]), [3], ["a"], torch.zeros(3))


def test_path_length_of_a_chain():
    assert path_length(chain_graph((2.0, 3.0, 4.0))) == pytest.approx(3)


def test_with_attention_frozen_effects_are_measured_apart(make_exact_replacement):
    """The same predictions; measurements that differ, and follow them more closely without attention's answer."""
    rm = make_exact_replacement("gpt2")
    graphs = [trace(rm, [3, 0, 17, 9, 9, 28, i]) for i in range(4, 8)]
    found = measure_faithfulness(rm, graphs, FaithfulnessPlan(pairs=40, per_prompt=16))
    live, frozen = found["to_logits"], found["to_logits_attention_frozen"]
    assert torch.equal(live.predicted, frozen.predicted) and not torch.allclose(live.measured, frozen.measured)
    off = [compare(e.predicted, e.measured, e.prompt) for e in (live, frozen)]
    assert off[0].pearson is not None and off[1].pearson is not None and off[1].pearson > off[0].pearson


@pytest.mark.parametrize("kind", [{"reach": "all"}, {"reach": "1", "skip": True, "activation": "topk", "k": 4}])
def test_effects_measured_together_are_those_of_constrained_one_by_one(make_replacement, kind):
    """Features of all layers in one pass of the live model, against each with everything before it frozen."""
    rm = make_replacement("gemma2", **kind)
    graph = trace(rm, [3, 0, 17, 9, 28, 4], targets=[1, 8])
    found = measure_faithfulness(rm, [graph], FaithfulnessPlan(pairs=40, per_prompt=12))
    sources = torch.randperm(graph.n_features, generator=torch.Generator().manual_seed(0))[:12].tolist()
    assert len({graph.nodes[source].layer for source in sources}) > 1
    for kind, freeze in (("to_logits", ()), ("to_logits_attention_frozen", ("attention",))):
        alone = []
        for source in sources:
            node = graph.nodes[source]
            off = [Intervention(node.layer, node.position, node.index, times=0.0)]
            result = rm.intervene(graph.tokens, off, "constrained", freeze=freeze)
            change = rm.lm.before_softcap(result.logits[-1]) - rm.lm.before_softcap(result.clean_logits[-1])
            alone.append((change - change.mean())[[1, 8]])
        torch.testing.assert_close(found[kind].measured, torch.cat(alone), rtol=1e-9, atol=1e-12)


def test_total_effects_follow_every_path():
    """Silencing the first feature (2 -> 0) takes its edge 3 from the second, which is then 2 - 3 short of 2."""
    effects = total_effects(chain_graph((2.0, 3.0, 4.0)), [0])
    assert effects[:, 0].tolist() == pytest.approx([0.0, -3.0, -6.0])  # -3 of 2 takes 1.5 times the edge of 4


def test_health_counts():
    assert density_histogram(torch.tensor([0.0, 5e-7, 0.05, 0.5])) == [1, 1, 0, 0, 0, 0, 1, 1]
    rows = torch.eye(4)
    assert duplicates(rows) == 0
    assert duplicates(torch.cat([rows, rows[:1] * 3])) == pytest.approx(2 / 5)
    layer = {"dead": 0.0, "dense": 0.0, "duplicates": 0.0}
    found = warnings([{"layer": n, "l0": l0, **layer} for n, l0 in enumerate((12.0, 12.0, 12.0, 2.0))])
    assert found == ["layer 3 uses 6.0 times fewer features than the median layer"]


def test_verdicts_speak_of_missing_effects():
    result = {
        "health": {"warnings": []},
        "faithfulness": {"to_logits": {"graph": {"pairs": 3, "slope": None}}},
    }
    assert verdicts(result) == ["only 3 feature-to-logit effects could be measured, too few for a slope"]
