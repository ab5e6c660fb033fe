"""Tracing: targets, caps, edge cases and refusals. What edges are is held in test_identities.py."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from crosslace.circuit.attribution.batching import bytes_per_target, fitting_batch
from crosslace.circuit.attribution.forward import freeze_prompt
from crosslace.circuit.attribution.targets import Target, likely_tokens
from crosslace.circuit.attribution.tracer import TraceSettings, trace
from crosslace.circuit.formats.neuronpedia import graph_to_neuronpedia
from crosslace.circuit.graph import difference, flow_between
from crosslace.circuit.graph.graph import Graph
from crosslace.circuit.graph.rows import DenseRows, SparseRows
from crosslace.circuit.graph.text import strongest_paths_text
from crosslace.circuit.judge.graph_scores import path_length
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.viewer.payload import graph_payload
from crosslace.circuit.viewer.picture import render_graph_svg
from crosslace.data.errors import SettingsError, UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

PROMPT = [5, 0, 9, 3, 0, 7, 1, 12, 30, 2]


def random_transcoder(lm, seed=0, dtype=torch.float64, **settings):
    settings = TranscoderSettings(**({"features": 40, "activation": "jumprelu"} | settings))
    layers = settings.layers or lm.n_layers
    transcoder = Transcoder(settings, lm.d_model, layers, seed=None, dtype=dtype)
    random = torch.Generator().manual_seed(seed)
    for weight in transcoder.parameters():
        scale = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data.copy_(torch.randn(weight.shape, generator=random, dtype=torch.float64) * scale)
    return transcoder.requires_grad_(False)


@pytest.fixture
def lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture
def replacement(lm):
    return ReplacementModel(lm, random_transcoder(lm))


@pytest.fixture
def whole(replacement):
    return trace(replacement, PROMPT)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_change_nothing(batch, replacement, whole):
    graph = trace(replacement, PROMPT, batch=batch)
    assert graph.nodes.keys() == whole.nodes.keys()
    torch.testing.assert_close(graph.rows, whole.rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reach", ["1", "2", "all"])
@pytest.mark.parametrize("lazy", [False, True])
def test_rows_that_features_share_change_nothing(reach, lazy, lm, tmp_path, monkeypatch):
    """On a long prompt a decoder row is held once for all positions at which its feature fires."""
    transcoder = random_transcoder(lm, reach=reach)
    transcoder.save(tmp_path)
    replacement = ReplacementModel(lm, Transcoder.load(tmp_path, lazy_decoders=lazy))
    whole = trace(replacement, PROMPT)
    monkeypatch.setattr("crosslace.circuit.attribution.sources.GATHERED", 0)
    writers = freeze_prompt(replacement, lm.tokenize(PROMPT)).sources.writers
    used = {(l, f) for l, f in zip(whole.nodes.layer.tolist(), whole.nodes.index[: whole.n_features].tolist())}
    first = max(0, 2 - transcoder.reach + 1)
    assert len(writers[2].decoders) == sum(l >= first for l, _ in used)
    shared = trace(replacement, PROMPT)
    assert shared.nodes.keys() == whole.nodes.keys()
    torch.testing.assert_close(shared.rows, whole.rows, rtol=0, atol=1e-12)


def test_a_cap_keeps_the_most_influential_and_moves_the_rest_into_errors(replacement, whole):
    graph = trace(replacement, PROMPT, max_nodes=40, batch=5)
    assert graph.n_features == 40 and whole.n_features > 100
    assert graph.accounting["left_out_features"] == whole.n_features - 40
    assert graph.accounting["active_features"] == whole.n_features
    keys = {key: id for id, key in enumerate(whole.nodes.keys())}
    found = graph.nodes.keys()
    ids = torch.tensor([keys[key] for key in found])
    expected = whole.subgraph(ids[ids < whole.n_features].tolist())
    torch.testing.assert_close(graph.rows, expected.rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(graph.cancelled, expected.cancelled, rtol=0, atol=1e-9)
    torch.testing.assert_close(graph.rows.sum(1), graph.nodes.activation[graph.row_ids], rtol=0, atol=1e-5)
    # what was chosen while the graph was incomplete is nearly what the whole graph would choose
    best = whole.influence()[: whole.n_features].topk(40).values.sum()
    chosen = whole.influence()[ids[ids < whole.n_features]].sum()
    assert chosen > 0.9 * best
    for name, score in graph.scores().items():
        assert score <= whole.scores()[name] + 1e-9


def test_a_cap_within_little_memory_gives_the_same_kind_of_graph(replacement, whole):
    graph = trace(replacement, PROMPT, max_nodes=60, batch=10, memory=60 * 260 * 8 / 2**30)
    assert graph.n_features == 60
    torch.testing.assert_close(graph.rows.sum(1), graph.nodes.activation[graph.row_ids], rtol=0, atol=1e-5)
    assert graph.scores()["replacement_score"] <= whole.scores()["replacement_score"] + 1e-9


def test_rows_beyond_memory_are_mapped(replacement, whole):
    graph = trace(replacement, PROMPT, memory=0.0)
    torch.testing.assert_close(graph.rows, whole.rows, rtol=0, atol=1e-12)


def test_rows_that_fit_nowhere_are_refused(replacement, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"more than trace.memory=0, .* free; set trace.max_nodes"):
        trace(replacement, PROMPT, memory=0.0)


@pytest.mark.parametrize("cap", [None, 40])
def test_enough_strongest_edges_are_all_edges(cap, replacement, whole):
    """Kept sparse from the start, capped or not: the same graph, influence, scores, pruning, paths and file."""
    K = whole.n_features
    dense = whole if cap is None else trace(replacement, PROMPT, max_nodes=cap, batch=5)
    sparse = trace(replacement, PROMPT, max_nodes=cap, batch=5, edges="top-k", top_k=K - 1)
    assert dense.nodes.keys() == sparse.nodes.keys()
    torch.testing.assert_close(sparse.rows, dense.rows, rtol=0, atol=1e-9)
    torch.testing.assert_close(sparse.cancelled, dense.cancelled, rtol=0, atol=1e-9)
    torch.testing.assert_close(sparse.influence(), dense.influence(), rtol=0, atol=1e-9)
    assert sparse.scores() == pytest.approx(dense.scores(), abs=1e-9)
    pruned, expected = sparse.prune(0.7, 0.9), dense.prune(0.7, 0.9)
    assert pruned.nodes.keys() == expected.nodes.keys()
    torch.testing.assert_close(pruned.rows, expected.rows, rtol=0, atol=1e-9)
    assert (
        sparse.top_paths(None, sparse.logits[0].id, 3)[2].nodes == dense.top_paths(None, dense.logits[0].id, 3)[2].nodes
    )
    if cap is None:
        assert isinstance(sparse.stored, SparseRows)


def test_strongest_edges_stay_sparse(replacement, whole, tmp_path):
    """What pruning, subgraphs and files make of sparse rows is what they make of the same rows as a matrix."""
    sparse = trace(replacement, PROMPT, edges="top-k", top_k=20)
    assert isinstance(sparse.stored, SparseRows) and sparse.stored.columns.shape[1] == 20
    assert sparse.values.numel() + sparse.stored.columns.numel() < 0.6 * whole.rows.numel()
    dense = replace(sparse, stored=DenseRows(sparse.rows))
    assert sparse.scores() == pytest.approx(dense.scores(), abs=1e-12)
    chosen = range(0, sparse.n_features, 2)
    for mine, same in (
        (sparse.subgraph(chosen), dense.subgraph(chosen)),
        (sparse.cut_edges(0.8), dense.cut_edges(0.8)),
        (sparse.prune(0.9, 0.9), dense.prune(0.9, 0.9)),
        (Graph.load(sparse.save(tmp_path / "sparse")), dense),
    ):
        torch.testing.assert_close(mine.rows, same.rows, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine.cancelled, same.cancelled, rtol=0, atol=1e-12)
    assert isinstance(sparse.subgraph(chosen).stored, SparseRows)
    assert isinstance(Graph.load(tmp_path / "sparse").stored, SparseRows)
    small = sparse.subgraph(range(10))
    assert isinstance(small.stored, DenseRows) and small.n_features == 10
    assert sparse.edge(sparse.n_features - 1, 3) == dense.edge(sparse.n_features - 1, 3)
    assert sparse.accounting["largest_violation"] < 1e-6


def test_looking_at_sparse_rows_makes_no_matrix(replacement, monkeypatch):
    """The page, the picture, Neuronpedia's JSON, path lengths, groups and differences: the same as of the matrix."""
    sparse = trace(replacement, PROMPT, edges="top-k", top_k=20)
    dense = replace(sparse, stored=DenseRows(sparse.rows))
    other = trace(replacement, PROMPT[:-1], edges="top-k", top_k=20)
    monkeypatch.setattr("crosslace.circuit.graph.rows.CHUNK", 7 * sparse.values.shape[1])  # more than one block
    looks = [
        lambda graph: graph_payload(graph, node=0.9, most_features=10, most_links=50),
        lambda graph: graph_to_neuronpedia(graph, "slug", node=None)["links"],
        lambda graph: graph_to_neuronpedia(graph, "slug", node=None)["nodes"],
        lambda graph: render_graph_svg(graph),
        path_length,
        lambda graph: flow_between(graph, {"a": [0, 1, 5], "b": [sparse.n_features - 1, len(sparse.nodes) - 1]}),
        lambda graph: difference(graph, other).edges,
    ]
    expected = [look(dense) for look in looks]

    def refused(graph):
        raise AssertionError("a matrix was made of sparse rows")

    monkeypatch.setattr(Graph, "rows", property(refused))
    for look, should in zip(looks, expected):
        same(look(sparse), should)


def same(found, expected):
    """Equal, numbers to 1e-9."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            same(a, b)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    else:
        assert found == (pytest.approx(expected, rel=1e-9, abs=1e-12) if isinstance(expected, float) else expected)


def test_pages_that_stay_zero_are_never_written(replacement, whole):
    """Nothing comes from the layer that a feature reads, or later ones: those columns are left as they were."""
    layer = whole.nodes.layer
    rows, columns = (whole.rows != 0).nonzero(as_tuple=True)
    row_layer = layer[whole.row_ids][rows]
    is_bias = whole.nodes.mask("bias")[columns]
    assert (layer[columns] < row_layer + is_bias).all()


@pytest.mark.parametrize(
    ("free", "targets", "expected"),
    [
        (None, 8000, 128),
        (None, 100, 100),
        (10 * 2**30, 8000, 5120),
        (64 * 2**20, 8000, 32),
        (2**20, 8000, 8),
        (1, 3, 3),
    ],
)
def test_batches_fill_what_is_free(free, targets, expected):
    assert fitting_batch(2**20, free, targets) == expected


def test_an_accelerator_s_free_memory_sets_the_batch(replacement, whole, monkeypatch):
    """With a stand-in for the device's figures: half of what is free is filled, and the graph is the same."""
    each = bytes_per_target(len(PROMPT), replacement.lm.d_model, 16, len(whole.nodes), 8)
    monkeypatch.setattr("crosslace.circuit.attribution.tracer.free_memory", lambda device: 2 * 33 * each)
    graph = trace(replacement, PROMPT)
    assert graph.metadata["settings"]["batch"] == 32 and whole.metadata["settings"]["batch"] > 32
    torch.testing.assert_close(graph.rows, whole.rows, rtol=0, atol=1e-12)


def test_top_k_edges(replacement, whole):
    graph = trace(replacement, PROMPT, edges="top-k", top_k=3)
    features = graph.rows[:, : graph.n_features]
    assert int((features != 0).sum(1).max()) == 3
    torch.testing.assert_close(graph.rows.sum(1), whole.rows.sum(1), rtol=0, atol=1e-9)
    strongest = whole.rows[:, : whole.n_features].abs().topk(3).values
    torch.testing.assert_close(features.abs().topk(3).values, strongest, rtol=0, atol=1e-12)
    assert graph.scores()["completeness"] <= whole.scores()["completeness"] + 1e-9


def test_no_nodes_at_all(replacement):
    graph = trace(replacement, PROMPT, max_nodes=0)
    assert graph.n_features == 0 and graph.scores()["replacement_score"] == 0


def test_named_targets(replacement, whole):
    lm = replacement.lm
    direction = torch.randn(lm.d_model, dtype=torch.float64)
    feature = whole.nodes[whole.nodes.ids("feature")[-1]]
    targets = [3, Target(token=3, minus=8), direction, f"L{feature.layer}:{feature.index}@{feature.position}"]
    graph = trace(replacement, PROMPT, targets=targets)
    assert len(graph.logits) == 4 and graph.probabilities.tolist() == [0.25] * 4
    one, difference, vector, of_feature = graph.rows[-4:]
    eight = trace(replacement, PROMPT, targets=[8]).rows[-1]
    torch.testing.assert_close(one[:-4] - eight[:-1], difference[:-4], rtol=0, atol=1e-9)
    torch.testing.assert_close(of_feature[:-4], whole.rows[feature.id][: -len(whole.logits)], rtol=0, atol=1e-9)
    assert graph.logits[3].value == pytest.approx(feature.activation)
    assert graph.metadata["settings"]["targets"] == ["3", "3 - 8", "vector", targets[3]]
    assert vector.abs().sum() > 0
    for alone in (3, targets[3], direction):  # one target needs no list
        assert torch.equal(
            trace(replacement, PROMPT, targets=alone).rows, trace(replacement, PROMPT, targets=[alone]).rows
        )
    assert graph.accounting["largest_violation"] < 1e-6


def test_a_target_at_an_earlier_position_sees_no_later_one(replacement):
    graph = trace(replacement, PROMPT, targets=[Target(token=0, position=4)])
    assert graph.logits[0].position == 4 and graph.logits[0].token == 0
    assert not graph.rows[-1, graph.nodes.position > 4].any()
    assert strongest_paths_text(graph).startswith("'0' @4 p=") and graph.metadata["settings"]["targets"] == ["0@4"]
    assert graph.accounting["largest_violation"] < 1e-6


def test_several_prompts(make_tiny, monkeypatch):
    lm = make_tiny("llama")
    replacement = ReplacementModel(lm, random_transcoder(lm))
    monkeypatch.setattr(type(lm), "tokenize", lambda self, prompt: torch.tensor([len(word) for word in prompt.split()]))
    graphs = trace(replacement, ["a bb ccc", "dd eee"])
    assert [graph.tokens for graph in graphs] == [[1, 2, 3], [2, 3]]
    monkeypatch.undo()
    for prompts in ([[1, 2, 3], [2, 3]], [torch.tensor([1, 2, 3]), torch.tensor([2, 3])]):
        assert [graph.tokens for graph in trace(replacement, prompts)] == [[1, 2, 3], [2, 3]]
    by_row = trace(replacement, torch.tensor([[1, 2], [3, 4]]))  # types do not tell how many dimensions a tensor has
    assert isinstance(by_row, list) and [graph.tokens for graph in by_row] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("reach", ["1", "all"])
def test_one_token(lm, reach):
    """Position 0 keeps the model's own output: there are no features, and the error carries everything."""
    graph = trace(ReplacementModel(lm, random_transcoder(lm, reach=reach)), [0])
    assert graph.n_features == 0 and graph.tokens == [0]
    assert graph.accounting["largest_violation"] < 1e-6
    assert graph.prune().scores()["replacement_score"] == 0


def test_silent_at_the_last_position(lm, monkeypatch):
    transcoder = random_transcoder(lm)
    replacement = ReplacementModel(lm, transcoder)
    keep = replacement.masked_positions

    def keep_last_too(tokens, **named):
        return keep(tokens, **named) | (torch.arange(tokens.shape[1]) == tokens.shape[1] - 1)

    monkeypatch.setattr(replacement, "masked_positions", keep_last_too)
    graph = trace(replacement, PROMPT)
    features = graph.nodes.mask("feature")
    assert graph.n_features > 0 and (graph.nodes.position[features] < len(PROMPT) - 1).all()
    assert graph.accounting["largest_violation"] < 1e-6


def test_layers_that_are_not_covered_are_errors(make_tiny):
    lm = make_tiny("gpt_neox")
    graph = trace(ReplacementModel(lm, random_transcoder(lm, layers=[0, 2])), PROMPT)
    assert set(graph.nodes.layer[graph.nodes.mask("feature")].tolist()) == {0, 2}
    assert graph.accounting["largest_violation"] < 1e-9


def test_float32_is_close_to_float64(make_tiny, tiny_models, whole):
    lm = tiny_models.make_tiny("llama", torch.float32)
    graph = trace(ReplacementModel(lm, random_transcoder(lm, dtype=torch.float32)), PROMPT)
    assert graph.rows.dtype == torch.float32
    assert graph.nodes.keys() == whole.nodes.keys()
    torch.testing.assert_close(graph.rows.double(), whole.rows, rtol=0, atol=1e-5)


def test_progress_is_told(replacement):
    told = []
    trace(replacement, PROMPT, batch=20, progress=lambda label, done, total=None, note="": told.append((done, total)))
    assert told[-1][0] == told[-1][1] and len(told) > 3


def test_likely_tokens():
    probabilities = torch.tensor([0.05, 0.6, 0.05, 0.3])
    assert likely_tokens(probabilities, 10, 0.5).tolist() == [1]
    assert likely_tokens(probabilities, 10, 0.8).tolist() == [1, 3]
    assert likely_tokens(probabilities, 1, 0.99).tolist() == [1]


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ([99], "no token"),
        (["L7:1"], "layer 7"),
        (["L1:99"], "features 0 to 39"),
        (["x@99"], "10 tokens"),
        ([Target(token=1, position=10)], "outside the prompt"),
        ([torch.ones(3)], "takes 16 numbers"),
        (["word"], "no tokenizer"),
        ([], "empty"),
        ([Target()], "a token, a vector or a feature"),
        ([1.5], "target 1.5 is neither"),
        ([True], "target True is neither"),
        ([""], "empty text"),
    ],
)
def test_targets_that_are_refused(targets, sentence, replacement):
    with pytest.raises(UserError, match=sentence):
        trace(replacement, PROMPT, targets=targets)


def test_prompts_and_settings_that_are_refused(replacement):
    with pytest.raises(UserError, match="context"):
        trace(replacement, [1] * 65)
    with pytest.raises(UserError, match="empty"):
        trace(replacement, [])
    with pytest.raises(SettingsError, match=r"trace.edges"):
        TraceSettings(edges="some")
    with pytest.raises(SettingsError, match=r"trace.batch"):
        TraceSettings(batch=0)


def test_out_of_memory_names_the_setting(replacement, monkeypatch):
    def out_of_memory(*arguments, **named):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("crosslace.circuit.attribution.tracer.FrozenModel.edges", out_of_memory)
    with pytest.raises(UserError, match=r"trace.batch"):
        trace(replacement, PROMPT)


@pytest.mark.slow
def test_a_long_prompt_takes_little_memory():
    """200 tokens, 30 layers of width 576, 60 features a layer and token: decoder rows and directions of all 358,200
    that are active would take 1.7 GB. In a process of its own, which takes 1 GB with the model."""
    script = """
import torch
from crosslace.circuit.attribution import batching
from crosslace.circuit.model import ReplacementModel
from crosslace.data.models import LanguageModel
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder import Transcoder
from transformers import LlamaConfig, LlamaForCausalLM
batching.available_memory = lambda: 4 * 2**30  # of a machine with 6 GB
sizes = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=8192)
lm = LanguageModel(LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=1536, tie_word_embeddings=True)))
transcoder = Transcoder(TranscoderSettings(features=1024, reach="1", activation="topk", k=60), 576, 30, seed=0)
graph = ReplacementModel(lm, transcoder).trace(torch.arange(200).tolist(), max_nodes=8)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(graph.accounting["active_features"], graph.n_features, int(peak) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    active, kept, peak = map(float, done.stdout.split())
    assert active == 30 * 199 * 60 and kept == 8 and peak < 2.0, peak
