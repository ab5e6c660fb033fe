"""heads.json beside a graph, and Neuronpedia's qk_tracing_results: written, read, refused where not whole."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from crosslace.circuit.attribution import CONSTANT, attention_text, explain_attention, load_heads, save_heads
from crosslace.circuit.attribution.heads import head_places
from crosslace.circuit.formats import read_neuronpedia
from crosslace.data.errors import UserError

PROMPT = [5, 0, 9, 3, 0, 7]
SCHEMA = json.loads((Path(__file__).parents[1] / "interop" / "neuronpedia-graph-schema.json").read_text())


@pytest.fixture(scope="module")
def explained(make_replacement):
    replacement = make_replacement("qwen2", reach="all", activation="relu", skip=True)
    graph = replacement.trace(PROMPT, max_logits=2)
    return replacement, graph, explain_attention(replacement, graph, edges=60, heads=4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_a_heads_places_sum_to_its_part(family, make_replacement):
    """And each place is where the head can look: at or before the query, from the source on."""
    replacement = make_replacement(family, reach="all", activation="relu", skip=True)
    graph = replacement.trace(PROMPT, max_logits=1)
    targets = [graph.logits[0].id, max(graph.nodes.ids("feature", layer=2))]
    for target in targets:
        source = int(graph.adjacency[target][: graph.n_features].abs().argmax())
        one = graph.heads(replacement, (target, source))
        for layer in one.between:
            for head in range(one.heads.shape[1]):
                places = head_places(replacement, graph, (target, source), layer, head)
                assert float(places.sum()) == pytest.approx(float(one.heads[layer, head]), abs=1e-9)
                assert not places.triu(1).any() and not places[:, : graph.nodes[source].position].any()


def test_the_file_holds_what_was_found(explained, tmp_path):
    replacement, graph, found = explained
    assert load_heads(tmp_path) is None
    save_heads(tmp_path, found)
    assert load_heads(tmp_path) == found == json.loads((tmp_path / "heads.json").read_text())
    keys = {tuple(key): id for id, key in enumerate(map(tuple, named_keys(graph)))}
    for edge in found["edges"]:
        target, source = keys[tuple(edge["target"])], keys[tuple(edge["source"])]
        one = graph.heads(replacement, (target, source))
        assert edge["value"] == pytest.approx(one.value)
        assert set(map(int, edge["bypass"])) == set(one.between)
        for layer, head, part in edge["heads"]:
            assert part == pytest.approx(float(one.heads[layer, head]))
    first = found["attention"][0]
    looked = replacement.attention(PROMPT, first["layer"], first["head"], first["query"])
    assert [first["layer"], first["head"]] == found["top_heads"][0][:2]
    for told, key in zip(first["keys"], looked.explained):
        for name, value in told["attention"]:
            id = len(graph.nodes) if name == ["constant"] else keys[tuple(name)]
            row = looked.log_pattern[-1] if name == ["constant"] else looked.log_pattern[id]
            assert value == pytest.approx(float(row[looked.place(key)]))
        assert told["remainder"] == pytest.approx(looked.remainder(key, 12))
    assert f"L{first['layer']}H{first['head']} from" in attention_text(graph, first)
    assert CONSTANT == -1
    (tmp_path / "heads.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_heads(tmp_path)
    (tmp_path / "heads.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="holds no heads"):
        load_heads(tmp_path)


def named_keys(graph):
    for node in graph.nodes:
        yield node.kind, node.layer, node.position, node.index


@pytest.mark.parametrize("node", [None, 0.3])
def test_neuronpedia_there_and_back(node, explained, tmp_path):
    """All of the graph, and a pruned one: what it lacks is described beside it."""
    _, graph, found = explained
    path = graph.to_neuronpedia(tmp_path / "graph.json", node=node, heads=found)
    data = json.loads(path.read_text())
    jsonschema.validate(data, SCHEMA)
    told = {entry["node_id"]: entry["qk_tracing_results"] for entry in data["nodes"] if "qk_tracing_results" in entry}
    assert told
    ids = {entry["node_id"] for entry in data["nodes"]} | set(data.get("qk_only_nodes", {}))
    for results in told.values():
        assert len(results["pair_wise_contributors"]) == 12
        assert {one for terms in list(results.values())[:3] for term in terms for one in term[:-1]} <= ids
    back = read_neuronpedia(path)
    originals = {json.dumps(one["carried"]["edge"]["target"]): one for one in reversed(found["attention"])}
    assert len(back.metadata["qk"]) == len(told)
    for one in back.metadata["qk"]:
        first = originals[json.dumps(one["node"])]
        key = next(key for key in first["keys"] if key["key"] == first["carried"]["key"])
        assert {name: one[name] for name in ("pairs", "query_side", "key_side")} == {
            name: key[name] for name in ("pairs", "query_side", "key_side")
        }
        assert one["about"] == {name: first[name] for name in ("layer", "head", "query")} | {"key": key["key"]}
    again = json.loads(back.to_neuronpedia(tmp_path / "again.json", node=None).read_text())
    assert {e["node_id"]: e["qk_tracing_results"] for e in again["nodes"] if "qk_tracing_results" in e} == told
    back.save(tmp_path / "kept")  # and in our own file


def test_foreign_results_that_are_not_whole_are_refused(explained, tmp_path):
    _, graph, found = explained
    path = graph.to_neuronpedia(tmp_path / "graph.json", node=None, heads=found)
    data = json.loads(path.read_text())
    entry = next(entry for entry in data["nodes"] if "qk_tracing_results" in entry)
    whole = entry["qk_tracing_results"]
    one = whole["pair_wise_contributors"][0]
    for bad, reason in (
        ([], "is not a mapping"),
        ({}, "is not a list"),
        (whole | {"pair_wise_contributors": [one[:2]]}, "is not a list"),
        (whole | {"pair_wise_contributors": [[one[0], one[1], "x"]]}, "is not a list"),
        (whole | {"top_q_marginal_contributors": [["nowhere", 1.0]]}, "which is not there"),
        (whole | {"top_q_marginal_contributors": [[["a"], 1.0]]}, "which is not there"),
    ):
        entry["qk_tracing_results"] = bad
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=reason):
            read_neuronpedia(path)
    entry["qk_tracing_results"] = whole
    for bad, reason in (([], "not a mapping"), ({"x": {}}, "lacks"), ({"x": constant(99)}, "outside the prompt")):
        path.write_text(json.dumps(data | {"qk_only_nodes": bad}))
        with pytest.raises(UserError, match=reason):
            read_neuronpedia(path)


def constant(position):
    return {"feature_type": "bias", "layer": "0", "ctx_idx": position, "jsNodeId": "x", "clerp": "x"}


def test_vector_targets_have_names_in_the_file(make_replacement):
    replacement = make_replacement("llama")
    graph = replacement.trace(PROMPT, targets=["L2:3"])
    found = explain_attention(replacement, graph, heads=1)
    assert torch.tensor([edge["target"][3] == "feature L2:3" for edge in found["edges"]]).any()
