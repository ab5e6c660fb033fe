"""Groups of features, what flows between them, and differences of graphs."""

import pytest
import torch
from crosslace.circuit.attribution.tracer import trace
from crosslace.circuit.graph import difference, flow_between, propose_supernodes
from crosslace.circuit.graph.supernodes import average_linkage, token_profiles
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import UserError
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

PROMPT = [5, 0, 9, 3, 0, 7, 1]
HALF = 8


@pytest.fixture(scope="module")
def replacement(make_tiny):
    """Features i and i + HALF of a layer are twins: the same encoder and decoder."""
    lm = make_tiny("gpt2")
    settings = TranscoderSettings(features=2 * HALF, activation="jumprelu")
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for name, weight in transcoder.named_parameters():
        scale = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data.copy_(torch.randn(weight.shape, generator=random, dtype=torch.float64) * scale)
        if not name.startswith("b_dec"):
            weight.data[HALF:] = weight.data[:HALF]
    return ReplacementModel(lm, transcoder.requires_grad_(False))


@pytest.fixture(scope="module")
def graph(replacement):
    return trace(replacement, PROMPT)


@pytest.mark.parametrize("by", ["tokens", "edges", "decoder", "together", ["tokens", "together"]])
def test_twins_are_proposed_as_one_group(graph, replacement, by):
    nodes, n = graph.nodes, graph.n_features
    fires = torch.rand(50, 3, HALF, generator=torch.Generator().manual_seed(1)) - 0.7
    acts = torch.stack([fires[:, nodes.layer[id], nodes.index[id] % HALF].relu() for id in range(n)], 1)
    groups = propose_supernodes(graph, by, alike=0.98, transcoder=replacement.transcoder, acts=acts)
    assert groups
    where = {id: name for name, ids in groups.items() for id in ids}
    for id, name in where.items():
        node = nodes[id]
        twin = nodes.ids("feature", node.layer, node.position, (node.index + HALF) % (2 * HALF))[0]
        assert where[twin] == name
    assert all(len({nodes[id].position for id in ids}) == 1 for ids in groups.values())
    assert len(groups) > 1 and not graph.supernodes


def test_groups_by_label_are_named_and_kept(graph):
    named = {(l, i): "even" if i % 2 == 0 else f"odd {i}" for l in range(3) for i in range(2 * HALF)}
    graph.label_features(named)
    groups = propose_supernodes(graph, "label", use=True)
    assert graph.supernodes == groups and "even" in groups and "even (2)" in groups
    for name, ids in groups.items():
        found = [graph.nodes[id] for id in ids]
        assert len({(node.label, node.position) for node in found}) == 1 and name.startswith(found[0].label)
    graph.supernodes.clear()
    graph.nodes.labels.clear()


def test_what_features_go_back_to_is_the_sum_over_paths(graph):
    ids = torch.arange(graph.n_features)
    embeddings = graph.nodes.ids("embedding")
    share = graph.rows.abs() / (graph.rows.abs().sum(1) + graph.cancelled)[:, None]

    def goes_back(feature):
        total = share[feature, embeddings].clone()
        for source in share[feature, : graph.n_features].nonzero().squeeze(1).tolist():
            total += share[feature, source] * known[source]
        return total

    known = {}
    for feature in range(graph.n_features):  # by layer
        known[feature] = goes_back(feature)
    found = token_profiles(graph, ids)
    torch.testing.assert_close(found.to(share), torch.stack(list(known.values())), rtol=1e-9, atol=1e-12)


def test_ways_that_lack_something_are_refused(graph):
    for by, what in (("decoder", "needs the transcoder"), ("together", "needs acts"), ("colour", "by=colour")):
        with pytest.raises(UserError, match=what):
            propose_supernodes(graph, by)


def test_average_linkage():
    alike = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.5], [0.1, 0.5, 1.0]])
    assert sorted(map(sorted, average_linkage(alike, 0.6))) == [[0, 1], [2]]
    assert sorted(map(sorted, average_linkage(alike, 0.2))) == [[0, 1, 2]]


def test_flow_between_groups(graph):
    first, logit = graph.nodes.ids("feature")[0], graph.logits[0].id
    between = flow_between(graph, {"one": [first], "all logits": [logit.id for logit in graph.logits]})
    rows = graph.rows[graph.n_features :, first] * graph.influence_per_input[graph.n_features :]
    assert float(between[1, 0]) == pytest.approx(float(rows.sum()))
    assert between[0, 1] == 0 and logit


def test_difference(graph, replacement):
    same = difference(graph, graph)
    assert not same.only_first and not same.only_second and not same.edges.any()
    other = trace(replacement, [*PROMPT[:-1], 2])
    found = difference(graph, other)
    assert found.only_first and found.only_second
    # causal: what stands before the last token is the same, the logits aside
    before = graph.nodes.mask("feature") & (graph.nodes.position < len(PROMPT) - 1)
    earlier = [row for row, (id, _) in enumerate(found.common) if before[id]]
    assert earlier and found.edges[earlier].abs().max() < 1e-9
    assert len(found.common) + len(found.only_second) == len(other.nodes)
