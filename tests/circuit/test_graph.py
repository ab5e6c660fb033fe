"""The graph object: storage, pruning, subgraphs, paths."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from crosslace.circuit.attribution.tracer import trace
from crosslace.circuit.graph import KINDS, DenseRows, Graph
from crosslace.circuit.graph.influence import fewest_nodes
from crosslace.circuit.graph.rows import packed_places, unpacked_places
from crosslace.circuit.graph.text import path_text, strongest_paths_text, summary_text
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import SettingsError, UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

PROMPT = [5, 0, 9, 3, 0, 7, 1]


@pytest.fixture(scope="module")
def graph(make_tiny):
    lm = make_tiny("gpt2")
    settings = TranscoderSettings(features=16, activation="jumprelu")
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for weight in transcoder.parameters():
        scale = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data.copy_(torch.randn(weight.shape, generator=random, dtype=torch.float64) * scale)
    return trace(ReplacementModel(lm, transcoder.requires_grad_(False)), PROMPT)


def test_order_of_nodes(graph):
    kinds = ["error" if kind == "kept" else kind for kind in graph.nodes.kind]
    order = ["feature", "error", "embedding", "position", "bias", "logit"]
    assert [kind for kind, after in pairwise([*kinds, ""]) if kind != after] == order
    features = graph.nodes.keys()[: graph.n_features]
    assert features == sorted(features)
    errors = graph.nodes.keys()[graph.n_features : graph.n_features + 3 * len(PROMPT)]
    places = [(layer, position) for layer in range(3) for position in range(len(PROMPT))]
    kept = KINDS.index("kept")  # what is left to the model at the first position stands in the error's place
    assert errors == [(1 if position else kept, layer, position, 0) for layer, position in places]
    assert graph.kept == {0: "first"}
    assert graph.nodes.token[graph.nodes.mask("embedding")].tolist() == PROMPT
    assert [node.kind for node in graph.nodes] == graph.nodes.kind and graph.nodes[-1].kind == "logit"
    assert graph.nodes.ids("error", layer=1, position=2) == [graph.n_features + len(PROMPT) + 2]


def test_adjacency_holds_the_rows(graph):
    adjacency = graph.adjacency
    assert adjacency.shape == (len(graph.nodes), len(graph.nodes))
    assert torch.equal(adjacency[graph.row_ids], graph.rows)
    assert int((adjacency != 0).sum()) == int((graph.rows != 0).sum())
    target = graph.logits[0].id
    assert graph.edge(target, 0) == adjacency[target, 0] and graph.edge(graph.n_features, 0) == 0


@pytest.mark.parametrize("pruned", [False, True])
def test_round_trip_is_exact(graph, pruned, tmp_path):
    one = graph.prune(0.6, 0.9) if pruned else graph.subgraph(range(graph.n_features))
    one.group("a group", [0, 1])
    one.label_features({(int(one.nodes.layer[0]), int(one.nodes.index[0])): "state: Texas"})
    again = Graph.load(one.save(tmp_path / "graph"))
    assert torch.equal(again.rows, one.rows) and torch.equal(again.cancelled, one.cancelled)
    assert torch.equal(again.probabilities, one.probabilities)
    assert list(again.nodes) == list(one.nodes) and again.nodes[0].label == "state: Texas"
    assert (again.tokens, again.token_strings) == (one.tokens, one.token_strings)
    assert (again.metadata, again.supernodes) == (one.metadata, one.supernodes)
    assert again.scores() == one.scores()


def test_damaged_and_missing_graphs_are_refused(graph, tmp_path):
    with pytest.raises(UserError, match="holds no graph"):
        Graph.load(tmp_path)
    folder = graph.save(tmp_path / "graph")
    (folder / "graph.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        Graph.load(folder)
    (folder / "graph.json").write_text("{}")
    graph.save(tmp_path / "graph")
    (folder / "graph.json").write_text("{}")
    with pytest.raises(UserError, match="version"):
        Graph.load(folder)


@pytest.mark.parametrize(("node", "edge"), [(0.8, 0.98), (0.3, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_pruning_keeps_sums_and_never_flatters(graph, node, edge):
    pruned = graph.prune(node, edge)
    torch.testing.assert_close(pruned.rows.sum(1), pruned.nodes.activation[pruned.row_ids], rtol=0, atol=1e-9)
    for name, score in pruned.scores().items():
        assert score <= graph.scores()[name] + 1e-12
    for kind in ("error", "embedding", "position", "bias", "logit"):
        assert len(pruned.nodes.ids(kind)) == len(graph.nodes.ids(kind))
    left = graph.accounting["left_out_features"] + graph.n_features - pruned.n_features
    assert pruned.accounting["left_out_features"] == left
    influence = graph.influence()
    names, keys = graph.nodes.keys(), set(pruned.nodes.keys())
    kept = torch.tensor([key in keys for key in names]) & graph.nodes.mask("feature")
    assert not (kept & ~fewest_nodes(influence, node)).any()


def test_pruning_leaves_no_feature_that_leads_nowhere(graph):
    """Cutting edges may cut all that a feature gives, and then what fed only that one."""
    found = 0
    for edge in (0.3, 0.5, 0.7, 0.9):
        once = graph.cut_edges(edge)
        found += int((~once.stored.linked()[: once.n_features]).sum())
        pruned = graph.prune(1.0, edge)
        assert bool(pruned.stored.linked()[: pruned.n_features].all())
        torch.testing.assert_close(pruned.rows.sum(1), pruned.nodes.activation[pruned.row_ids], rtol=0, atol=1e-9)
    assert found > 0


def test_pruning_nothing_is_the_same_graph(graph):
    same = graph.subgraph(range(graph.n_features)).cut_edges(1.0)
    explains = graph.influence_per_input > 0  # edges into what has no influence carry nothing
    torch.testing.assert_close(same.rows[explains], graph.rows[explains], rtol=0, atol=1e-12)
    with pytest.raises(SettingsError, match="node"):
        graph.prune(node=1.5)


def all_paths(graph, source, target):
    """Every path through features, by brute force, as {nodes: strength}."""
    adjacency = graph.adjacency
    total = adjacency.abs().sum(1).index_add(0, graph.row_ids, graph.cancelled)
    hat = adjacency / total.clamp(min=1e-300)[:, None]
    found, open_ = {}, [((target,), 1.0)]
    while open_:
        path, strength = open_.pop()
        for id in hat[path[0]].nonzero().squeeze(1).tolist():
            if id == source:
                found[(id, *path)] = strength * float(hat[path[0], id])
            elif id < graph.n_features:
                open_.append(((id, *path), strength * float(hat[path[0], id])))
    return found


def test_top_paths_are_the_strongest_of_all(graph):
    small = graph.prune(0.7, 1.0)
    source, target = small.nodes.ids("embedding")[2], small.logits[0].id
    expected = sorted(all_paths(small, source, target).items(), key=lambda item: -abs(item[1]))
    found = small.top_paths(source, target, count=5)
    assert 5 == len(found) <= len(expected)
    for path, (nodes, strength) in zip(found, expected):
        assert path.strength == pytest.approx(strength, abs=1e-15)
        assert path.nodes == list(nodes)
    assert small.top_paths(None, target)[0].nodes[0] in small.nodes.ids("embedding")
    assert small.top_paths(source, small.nodes.ids("error")[0]) == []


def test_the_strongest_path_through_features_is_found_behind_any_number_of_direct_edges(graph):
    small = graph.prune(0.7, 1.0)
    rows = small.rows.clone()
    rows[small.n_features :, small.nodes.ids("embedding")] += 100
    small = replace(small, stored=DenseRows(rows))
    target, tokens = small.logits[0].id, small.nodes.ids("embedding")
    longer = [entry for source in tokens for entry in all_paths(small, source, target).items() if len(entry[0]) > 2]
    nodes, strength = max(longer, key=lambda entry: abs(entry[1]))
    (found,) = small.top_paths(None, target, direct=False)
    assert found.nodes == list(nodes) and found.strength == pytest.approx(strength, abs=1e-15)
    assert all(len(path.nodes) == 2 for path in small.top_paths(None, target, len(tokens)))
    assert path_text(small, found) in strongest_paths_text(small)


def test_text_of_paths_and_scores(graph):
    path = graph.top_paths(None, graph.logits[0].id)[0]
    text = path_text(graph, path)
    assert "→" in text and repr(graph.logits[0].label) in text
    assert strongest_paths_text(graph).count("p=") == len(graph.logits) > 3
    text = summary_text(graph.prune())
    assert "replacement score" in text and "left out" in text and "at most" in text
    text = summary_text(replace(graph, metadata={}))  # as of another program's file
    assert f"{graph.n_features} features; how many were active" in text and "nan" not in text


def test_a_group_takes_nodes_of_the_graph(graph):
    with pytest.raises(UserError, match="supernode"):
        graph.group("nothing", [10**6])


@pytest.mark.parametrize("places", [[], [0], [254], [255], [0, 1, 256, 511, 512, 70_000, 70_001]])
def test_places_come_back_from_their_gaps(places):
    wanted = torch.tensor(places, dtype=torch.long)
    assert torch.equal(unpacked_places(packed_places(wanted)), wanted)
