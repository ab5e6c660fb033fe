"""Neuronpedia graph JSON: the schema, what the schema does not say, and graphs that come back the same."""

import json
from pathlib import Path

import pytest
import torch
from crosslace.circuit.features.labels import Label, Labels
from crosslace.circuit.formats.neuronpedia import graph_to_neuronpedia, slugified, write_neuronpedia
from crosslace.circuit.formats.neuronpedia_read import check_neuronpedia, read_neuronpedia
from crosslace.circuit.graph import DenseRows, Graph, Nodes, fewest_edges
from crosslace.data.errors import UserError
from jsonschema import Draft7Validator

SCHEMA = Path(__file__).parents[1] / "interop" / "neuronpedia-graph-schema.json"
L, T = 3, 5


def random_graph(seed: int = 0) -> Graph:
    """A random DAG with every kind of node; feature (0, 2) stands where circuit-tracer's ids collide with errors."""
    random = torch.Generator().manual_seed(seed)
    drawn = {
        (l, t, int(i)) for l in range(L) for t in range(1, T) for i in torch.randint(0, 50, (3,), generator=random)
    }
    places = sorted(drawn | {(0, 3, 2)})
    feature = torch.tensor(places)
    grid = torch.cartesian_prod(torch.arange(L), torch.arange(T))
    position, none = torch.arange(T), torch.zeros(L * T, dtype=torch.long)
    nodes = Nodes.join(
        [
            Nodes.of(
                "feature", feature[:, 0], feature[:, 1], feature[:, 2], torch.rand(len(feature), generator=random)
            ),
            Nodes.of("error", grid[:, 0], grid[:, 1], none),
            Nodes.of("embedding", position * 0 - 1, position, torch.tensor([0, 7, 7, 3, 9])),
            Nodes.of("bias", grid[:, 0], grid[:, 1], none),
            Nodes.of(
                "logit", torch.full((2,), L), torch.full((2,), T - 1), torch.tensor([4, -1]), torch.tensor([3.0, 1.0])
            ),
        ]
    )
    nodes.labels = {len(nodes) - 2: ' "Austin"', len(nodes) - 1: "Austin - Dallas", 1: "a label"}
    rank = {"embedding": 0, "bias": 1, "error": 2, "feature": 1, "logit": 99}
    depth = torch.tensor([rank[node.kind] + 3 * node.layer for node in nodes])
    A = torch.randn(len(nodes), len(nodes), generator=random)
    A *= (depth[:, None] > depth) & (nodes.position[:, None] >= nodes.position)
    A[nodes.mask("error", "embedding", "bias")] = 0
    rows = torch.cat([A[: int(nodes.mask("feature").sum())], A[len(nodes) - 2 :]])
    return Graph(
        DenseRows(rows),
        nodes,
        torch.tensor([0.9, 0.05]),
        [0, 7, 7, 3, 9],
        ["<s>", " the", " the", " <b>", "\n"],
        torch.zeros(len(rows)),
        metadata={"prompt": "the the <b>\n", "model": {"name": "org/a model"}},
        supernodes={"two": [0, 1]},
    )


@pytest.mark.parametrize("options", [{}, {"node": None}, {"biases": True, "feature_url": "https://x.example/f"}])
def test_what_is_written_keeps_the_schema_and_all_that_it_leaves_unsaid(tmp_path, options):
    labels = Labels({(0, 2): Label("state: Texas (F1 0.97)", "truth", 0.97)})
    path = write_neuronpedia(random_graph(), tmp_path / "my graph.json", labels=labels, **options)
    data = json.loads(path.read_text())
    Draft7Validator(json.loads(SCHEMA.read_text())).validate(data)
    check_neuronpedia(data)
    assert data["metadata"]["slug"] == "my-graph" and data["metadata"]["scan"] == "org-a-model"
    assert ("schema_version" in data["metadata"]) == ("feature_url" not in options)
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids)
    by_id = {node["node_id"]: node for node in data["nodes"]}
    top = by_id[f"{L}_4_{T - 1}"]
    assert top["clerp"] == 'Output " "Austin"" (p=0.900)' and top["is_target_logit"] and top["influence"] is None
    assert top["token_prob"] == pytest.approx(0.9)
    for node in data["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, index, _ = map(int, node["node_id"].split("_"))
            assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
            assert 0 < node["influence"] <= 1
    kinds = {node["feature_type"] for node in data["nodes"]}
    assert ("bias" in kinds) == bool(options.get("biases"))
    if "0_2_3" in by_id:
        assert by_id["0_2_3"]["clerp"] == "state: Texas (F1 0.97)"


def test_links_from_errors_keep_to_the_thresholds(tmp_path):
    """As circuit-tracer's files do: without them a file is mostly links from errors."""
    graph = random_graph()
    pruned = graph.prune(0.8, 0.7)
    few, all_ = (graph_to_neuronpedia(graph, "g", edge=0.7, errors=errors) for errors in (False, True))
    from_error = lambda data: {(x["source"], x["target"]) for x in data["links"] if "error_mlp" in x["source"]}
    others = lambda data: (
        {(x["source"], x["target"], x["weight"]) for x in data["links"]}
        - {(x["source"], x["target"], x["weight"]) for x in data["links"] if "error_mlp" in x["source"]}
    )
    assert others(few) == others(all_) and from_error(few) < from_error(all_)
    share = dict(zip(graph.nodes.keys(), graph.cumulative_influence().tolist(), strict=True))
    strong = fewest_edges(pruned.values, pruned.influence_per_input, 0.7)
    keys, is_error = pruned.nodes.keys(), pruned.nodes.mask("error")
    listed = [is_error[column] and share[keys[column]] <= 0.8 for column in strong.nonzero()[:, 1].tolist()]
    expected = sum(map(bool, listed))
    assert len(from_error(few)) == expected > 0
    check_neuronpedia(few)


def test_influence_is_the_cumulative_share_in_the_whole_graph():
    graph = random_graph()
    share = dict(zip(graph.nodes.keys(), graph.cumulative_influence().tolist(), strict=True))
    data = graph_to_neuronpedia(graph, "g")
    codes = {"cross layer transcoder": 0}
    for node in data["nodes"]:
        if node["feature_type"] in codes:
            layer, index, position = map(int, node["node_id"].split("_"))
            assert node["influence"] == share[0, layer, position, index]


def test_a_graph_comes_back_the_same(tmp_path):
    graph = random_graph()
    read = read_neuronpedia(write_neuronpedia(graph, tmp_path / "g.json", node=None, edge=None, biases=True))
    kept = torch.ones(len(graph.nodes), dtype=torch.bool)
    kept[graph.nodes.mask("bias")] = (graph.rows != 0).any(0)[graph.nodes.mask("bias")]
    torch.testing.assert_close(read.adjacency, graph.adjacency[kept][:, kept])
    for name in ("code", "position", "index", "activation"):
        torch.testing.assert_close(getattr(read.nodes, name), getattr(graph.nodes, name)[kept])
    torch.testing.assert_close(read.probabilities, graph.probabilities)
    assert read.tokens == graph.tokens and read.token_strings == graph.token_strings
    assert [logit.label for logit in read.logits] == [logit.label for logit in graph.logits]
    assert read.supernodes == graph.supernodes and read.nodes[1].label == "a label"
    assert read.metadata["imported"]["crosslace"]["scores"] == graph.scores()
    read.prune(0.8, 0.98).scores()  # an imported graph is one like any other
    read.save(tmp_path / "saved")
    assert torch.equal(Graph.load(tmp_path / "saved").rows, read.rows)


def test_scores_and_accounting_of_the_whole_graph_travel_along(tmp_path):
    graph = random_graph()
    own = {"active_features": graph.n_features, "largest_violation": 1e-6, "largest_relative_violation": 1e-7}
    graph.metadata["accounting"] = {**own, "left_out_features": 0}
    path = write_neuronpedia(graph, tmp_path / "g.json", node=0.5)
    data = json.loads(path.read_text())
    assert data["metadata"]["crosslace"]["scores"] == graph.scores()
    read = read_neuronpedia(path)
    assert 0 < read.n_features < graph.n_features
    assert read.accounting == {**own, "left_out_features": graph.n_features - read.n_features}
    for wrong in ("x", {}, {**own, "active_features": "many"}, {**own, "largest_violation": float("nan")}):
        data["metadata"]["crosslace"]["accounting"] = wrong
        path.write_text(json.dumps(data))
        assert read_neuronpedia(path).accounting == {}


def test_a_graph_of_circuit_tracer_without_our_notes_is_read(tmp_path):
    data = graph_to_neuronpedia(random_graph(), "g", node=None)
    del data["metadata"]["crosslace"]
    for node in data["nodes"]:
        if node["feature_type"] == "mlp reconstruction error":
            node["node_id"] = node["node_id"].replace("error_mlp", "error")
    data["links"] = [
        {**link, **{end: link[end].replace("error_mlp", "error") for end in ("source", "target")}}
        for link in data["links"]
    ]
    (tmp_path / "g.json").write_text(json.dumps(data))
    assert read_neuronpedia(tmp_path / "g.json").tokens == [0, 7, 7, 3, 9]


def broken(change):
    data = graph_to_neuronpedia(random_graph(), "g", node=None)
    change(data)
    return data


REFUSED = [
    (lambda d: d.pop("links"), "lacks links"),
    (lambda d: d["metadata"].update(slug="../up"), "metadata.slug '../up'"),
    (lambda d: d["metadata"].update(scan=".."), "metadata.scan '..'"),
    (lambda d: d["metadata"].update(prompt_tokens=[]), "prompt_tokens"),
    (lambda d: d["nodes"].append(d["nodes"][0]), "two nodes have the id"),
    (lambda d: d["nodes"][0].update(ctx_idx=99), "outside the prompt"),
    (lambda d: d["nodes"][0].update(ctx_idx=True), "outside the prompt"),
    (lambda d: d["nodes"][0].pop("clerp"), "lacks clerp"),
    (lambda d: d["nodes"][0].update(layer="x"), "which is no number"),
    (lambda d: d["nodes"][0].update(layer=10**9), "outside 0 to"),
    (lambda d: d["nodes"][0].update(feature_type="lorsa"), "type 'lorsa'"),
    (lambda d: d["nodes"][0].update(influence=float("nan")), "not a finite number"),
    (lambda d: d["links"][0].update(weight=float("inf")), "no finite weight"),
    (lambda d: d["links"][0].update(source="9_9_9"), "names node '9_9_9'"),
    (lambda d: d["links"][0].update(target="E_0_0"), "only features and logits have inputs"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_a_broken_graph_is_refused(tmp_path, change, sentence):
    (tmp_path / "g.json").write_text(json.dumps(broken(change)))
    with pytest.raises(UserError, match=sentence):
        read_neuronpedia(tmp_path / "g.json")


def test_no_json_is_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_neuronpedia(tmp_path / "g.json")
    for text in ("{", "[" * 100_000, "\x00"):
        (tmp_path / "g.json").write_text(text)
        with pytest.raises(UserError, match="not readable JSON"):
            read_neuronpedia(tmp_path / "g.json")


def test_names_become_slugs():
    assert slugified("the capital of Texas?") == "the-capital-of-Texas"
    assert slugified("…") == "graph"
    with pytest.raises(UserError, match="slug"):
        graph_to_neuronpedia(random_graph(), "a/b")
