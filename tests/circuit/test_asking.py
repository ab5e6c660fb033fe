"""Asking a graph: a node's edges, interventions, checks, groups as nodes, comparison, tables; what is kept of it."""

import pytest
import torch
from crosslace.circuit.features import Label, Labels, name_features
from crosslace.circuit.graph import (
    Graph,
    check_node,
    collapsed,
    difference,
    flow_text,
    main_circuit,
    propose_supernodes,
    to_networkx,
    to_pandas,
    widest_path,
)
from crosslace.circuit.graph.collapse import Collapsed
from crosslace.circuit.graph.rows import DenseRows, rows_of_tensors
from crosslace.circuit.replacement import Intervention
from crosslace.data.errors import SettingsError, UserError

PROMPT = [3, 0, 17, 9, 9, 28, 4]


@pytest.fixture(scope="module")
def model(make_replacement):
    return make_replacement("llama", reach="all", skip=True)


@pytest.fixture
def graph(model):
    return model.trace(PROMPT)


def test_strongest_inputs_and_outputs(model, graph):
    sparse = model.trace(PROMPT, edges="top-k", top_k=8)
    for one in (graph, sparse):
        adjacency = one.adjacency
        for id in (one.logits[0].id, one.n_features - 1):
            found = one.inputs(id, 5)
            expected = adjacency[id].abs().topk(5).indices.tolist()
            assert [link.id for link in found] == expected
            assert [link.weight for link in found] == [float(adjacency[id, source]) for source in expected]
        outputs = one.outputs(3, 4)
        carried = [abs(link.weight) * float(one.influence_per_input[one.row_ids == link.id]) for link in outputs]
        assert carried == sorted(carried, reverse=True) and all(
            adjacency[link.id, 3] == link.weight for link in outputs
        )
        assert sum(link.share for link in one.outputs(3, len(one.nodes))) == pytest.approx(1)
    assert graph.inputs(graph.n_features) == []  # an error has no input


def test_a_group_becomes_interventions(graph):
    graph.group("a group", [0, 4])
    nodes = [graph.nodes[id] for id in (0, 4)]
    expected = [Intervention(n.layer, n.position, n.index, times=-2.0) for n in nodes]
    assert graph.interventions("a group", times=-2.0) == expected
    with pytest.raises(UserError, match="has no supernode 'other'; a group"):
        graph.interventions("other", times=0.0)
    with pytest.raises(UserError, match="only features can be set"):
        graph.interventions([graph.logits[0].id], value=1.0)


def test_predicted_against_measured(model, graph):
    """In mode direct the prediction is exact; over all paths it is the sum over the graph."""
    last = max(range(graph.n_features), key=lambda id: (graph.nodes.position[id], graph.nodes.layer[id]))
    for check in check_node(graph, model, last, "direct"):
        assert check.measured == pytest.approx(check.predicted, abs=1e-9) and abs(check.measured) > 1e-6
    assert check_node(graph, model, last)[0].predicted == pytest.approx(-graph.edge(graph.logits[0].id, last))


def test_groups_as_nodes(graph):
    propose_supernodes(graph, use=True, alike=0.5)
    found = collapsed(graph)
    inside = [id for ids in graph.supernodes.values() for id in ids]
    influence = graph.influence()
    assert found.carried == pytest.approx(float(influence[inside].sum() / influence[: graph.n_features].sum()))
    assert found.scores == graph.subgraph(inside).scores()
    said = flow_text(graph, main_circuit(graph))
    assert said.startswith("widest path") and "of all features' influence" in said


def test_the_widest_path_is_by_its_narrowest_step():
    flow = torch.zeros(4, 4)  # token, A, B, logit; straight from the token is no path
    flow[3, 0], flow[1, 0], flow[3, 1], flow[2, 0], flow[3, 2], flow[2, 1] = 9, 5, 1, 3, 3, 4
    found = Collapsed(["'t' @0", "A", "B", "logit 'x'"], [[0], [1], [2], [3]], torch.ones(4), flow, 1.0)
    assert widest_path(found, "logit 'x'") in ([0, 2, 3], [0, 1, 2, 3])
    assert widest_path(found, "logit 'x'", "A") == [0, 1, 2, 3]
    assert widest_path(found, "A") == [0, 1]


def test_prompts_of_different_length_are_compared(model, graph):
    longer = model.trace([11, 3, 0, 17, 9, 9, 28, 4])
    by_token = difference(graph, longer, "tokens")
    shared = [(graph.nodes[a], longer.nodes[b]) for a, b in by_token.common if graph.nodes[a].layer >= 0]
    assert shared and all(a.position + 1 == b.position for a, b in shared)
    by_feature = difference(graph, longer, "feature")
    features = lambda one: {(n.layer, n.index) for n in one.nodes if n.kind == "feature"}
    common = {
        (graph.nodes[a].layer, graph.nodes[a].index) for a, _ in by_feature.common if graph.nodes[a].kind == "feature"
    }
    assert common == features(graph) & features(longer)
    same = difference(graph, graph, "feature")
    assert not same.edges.any() and not same.influence.any() and not same.only_first
    with pytest.raises(SettingsError, match="by=word is not known"):
        difference(graph, longer, "word")


def test_tables_for_other_programs(graph):
    nodes, edges = to_pandas(graph)
    assert len(nodes) == len(graph.nodes) and len(edges) == graph.stored.count()
    network = to_networkx(graph)
    source, target, weight = edges.iloc[7]
    assert network.edges[int(source), int(target)]["weight"] == weight == graph.edge(int(target), int(source))


def test_features_near_their_threshold(model):
    found = model.near_threshold(PROMPT, -1, 5)
    acts = model.activations(PROMPT)
    assert len(found) == 5 and [one.lacks for one in found] == sorted(one.lacks for one in found)
    for one in found:
        assert acts[one.layer][-1, one.feature] == 0 and one.lacks >= 0
        assert one.preactivation + one.lacks == pytest.approx(float(model.transcoder.theta(one.layer)[one.feature]))


@pytest.mark.parametrize("edges", ["all", "top-k"])
def test_what_is_kept_never_looks_better(model, edges, tmp_path):
    graph = model.trace(PROMPT, edges=edges, top_k=8)
    part = graph.carrying(0.9)
    own = Graph(part.stored, part.nodes, part.probabilities, part.tokens, part.token_strings, part.cancelled)
    whole = graph.scores()
    assert own.n_features < graph.n_features
    assert all(own.scores()[name] <= whole[name] + 1e-9 for name in ("replacement_score", "completeness"))
    again = Graph.load(part.save(tmp_path / "graph"))
    assert torch.equal(again.rows, part.rows)
    assert again.scores() == whole and again.prune().scores() != whole  # of the whole until it is made smaller
    assert graph.carrying(1.0) is graph


def test_an_edge_that_is_kept_takes_four_bytes(tmp_path):
    """Two for its source, two for its value, which is off by 1 in 2,000; what that moves is booked."""
    rows = torch.randn(60, 2000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 60)[:, None]
    rows = rows.masked_fill(torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.8, 0)
    rounded = DenseRows(rows).rounded()
    assert ((rounded.values - rows).abs() <= rows.abs() / 2**11).all()
    stored = rounded.tensors()
    assert torch.equal(rows_of_tensors(stored).values, rounded.values)
    edges = int((rows != 0).sum())
    assert sum(tensor.nbytes for tensor in stored.values()) < 4 * edges + 20 * len(rows) + 100
    assert torch.equal(rows_of_tensors(DenseRows(rows).tensors()).values, rows)  # nothing is rounded unasked


def test_labels_and_groups_of_a_smaller_graph_are_its_own(graph):
    graph.group("both", [0, 1])
    pruned = graph.prune(1.0, 0.9)
    pruned.group("mine", [0])
    pruned.nodes.labels[0] = "mine"
    assert list(graph.supernodes) == ["both"] and 0 not in graph.nodes.labels


def test_features_of_one_name_are_grouped_by_position(model):
    graph = model.trace(PROMPT)
    places = [(node.layer, node.index, node.position) for node in graph.nodes if node.kind == "feature"]
    layer, index, _ = next(one for one in places if sum(other[:2] == one[:2] for other in places) > 1)
    name_features(graph, Labels({(layer, index): Label("Texas", "hand")}))
    expected = {
        f"Texas @{p}": graph.nodes.ids("feature", layer, p, index) for l, i, p in places if (l, i) == (layer, index)
    }
    assert graph.supernodes == expected and len(expected) > 1


def test_targets_are_named_once_and_tell_themselves_apart(model):
    with pytest.raises(UserError, match="names '5' at position 6 twice"):
        model.trace(PROMPT, targets=[5, 5])
    vectors = torch.eye(model.lm.d_model, dtype=torch.float64)[:2]
    from crosslace.circuit.attribution import Target

    graph = model.trace(PROMPT, targets=[Target(vector=v, label=name) for v, name in zip(vectors, "ab")])
    assert len(set(graph.nodes.keys())) == len(graph.nodes)


def test_a_bos_that_is_generated_is_masked(make_replacement):
    rm = make_replacement("llama", torch.float32)
    object.__setattr__(rm.sinks, "bos", 1)
    assert rm.masked_positions(torch.tensor([[1]]), start=4).tolist() == [[True]]
    assert rm.masked_positions(torch.tensor([[5]]), start=4).tolist() == [[False]]
