"""Through which head an edge goes (values and outputs), on a tiny random model of every family, in float64.

Parts that sum to an edge prove nothing about the parts: each is also held against runs with the source removed and one
head's output, or all that went past the heads, put into the clean run.
"""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from crosslace.circuit.attribution.forward import by_node, carry, freeze_prompt
from crosslace.circuit.model import ReplacementModel
from crosslace.data.errors import UserError

PROMPT = [5, 0, 9, 3, 0, 7]
CLOSE = 1e-9
KINDS = [
    {"reach": "1", "activation": "jumprelu"},
    {"reach": "all", "activation": "relu", "skip": True},
    {"reach": "2", "activation": "topk", "k": 4, "read": "mlp_in", "skip": True},
]
named = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(v) for v in kind.values()))


@pytest.fixture(scope="module")
def make_traced(make_replacement):
    made: dict = {}

    def make(family: str, kind: dict, masked: int | None = 2):
        key = (family, tuple(kind.items()), masked)
        if key not in made:
            replacement = make_replacement(family, **kind)
            if masked is not None:  # a position in the middle that keeps the model's own output, its skip too
                leave_alone(replacement, masked)
            made[key] = replacement, replacement.trace(PROMPT, max_logits=2)
        return made[key]

    return make


def leave_alone(replacement, position):
    before = replacement.masked_positions

    def masked_positions(tokens, *more, **named):
        masked = before(tokens, *more, **named).clone()
        masked[..., position] = True
        return masked

    replacement.masked_positions = masked_positions


class Runner:
    """The local replacement model of a prompt with every source multiplied by a number, run through the model itself,
    and attention's own per-head outputs in reach."""

    def __init__(self, replacement, tokens):
        self.replacement, self.lm, self.transcoder = replacement, replacement.lm, replacement.transcoder
        self.tokens = torch.tensor(tokens)[None]
        self.run = replacement.clean(self.tokens)
        self.acts, self.errors = replacement.features(self.run), replacement.errors(self.run)

    def __call__(self, removed=None, put_back=None):
        """Logits, what the transcoder reads and each layer's attention written before o_proj, with one node removed;
        `put_back` (layer, heads [T, H, hd]) replaces a layer's head outputs."""
        read, seen, heads = self.transcoder.settings.read, {}, {}
        scale = lambda kind, layer, position: (
            0.0
            if removed is not None and (removed.kind, removed.layer, removed.position) == (kind, layer, position)
            else 1.0
        )

        def written(layer, sites):
            seen[layer] = sites[read]
            l = self.transcoder.layers.index(layer)
            y = torch.zeros_like(sites["mlp_out"])
            for source in range(max(0, l - self.transcoder.reach + 1), l + 1):
                a = self.acts[source][0].clone()
                if removed is not None and removed.kind == "feature" and removed.layer == source:
                    a[removed.position, removed.index] = 0
                y = y + a @ self.transcoder.W_dec[source][:, l - source]
            y = y + self.transcoder.b_dec[l]
            if len(self.transcoder.W_skip):
                y = y + sites[read] @ self.transcoder.W_skip[l].T
            error = self.errors[l].clone()
            for position in range(error.shape[1]):
                error[:, position] *= scale("error", layer, position) * scale("kept", layer, position)
            return y * ~self.run.masked[..., None] + error

        def scale_embedding(kind):
            def hook(module, args, output):
                output = output.clone()
                for position in range(output.shape[-2]):
                    output[..., position, :] *= scale(kind, -1, position)
                return output

            return hook

        with ExitStack() as stack:
            stack.callback(self.lm._embedding.register_forward_hook(scale_embedding("embedding")).remove)
            if self.lm._positions is not None:
                stack.callback(self.lm._positions.register_forward_hook(scale_embedding("position")).remove)
            stack.enter_context(self.lm.freeze_attention(self.run.patterns))
            stack.enter_context(self.lm.freeze_norms(self.run.denominators))
            stack.enter_context(self.lm.overwrite(written))
            for layer, parts in enumerate(self.lm.layers):
                stack.enter_context(self._head_outputs(layer, parts, heads, put_back))
            logits = self.lm.before_softcap(self.lm(self.tokens))[0]
        return logits, seen, heads

    @contextmanager
    def _head_outputs(self, layer, parts, heads, put_back):
        """What goes into the output projection, head by head."""
        out = next(m for name, m in parts.attn.named_children() if name in ("o_proj", "c_proj", "dense"))

        def hook(module, args):
            heads[layer] = args[0][0].unflatten(-1, (parts.n_heads, -1))
            if put_back is not None and put_back[0] == layer:
                return (put_back[1].flatten(-2)[None],)
            return None

        handle = out.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def value(self, node, logits, seen):
        if node.kind == "feature":
            l = self.transcoder.layers.index(node.layer)
            return float(self.transcoder.preactivation(seen[node.layer][0, node.position], l)[node.index])
        return float(logits[node.position, node.index] - logits[node.position].mean())


def some_edges(graph, each=2):
    """Edges of every kind of source into features and logits, the strongest of each."""
    nodes = graph.nodes
    found = {}
    for target in graph.row_ids.tolist():
        row = graph.adjacency[target]
        for source in row.nonzero().squeeze(1).tolist():
            kind = nodes[source].kind
            if kind != "bias":
                found.setdefault((nodes[target].kind, nodes[target].layer, kind), []).append(
                    (abs(float(row[source])), target, source)
                )
    return [(t, s) for group in found.values() for _, t, s in sorted(group, reverse=True)[:each]]


def test_all_sources_carried_forwards_are_the_residual_stream(family, make_traced):
    """Biases too, through skips and past a position that is left to the model."""
    replacement, graph = make_traced(family, KINDS[1])
    frozen = freeze_prompt(replacement, torch.tensor(graph.tokens))
    nodes = list(frozen.sources.nodes(frozen.recording))
    for layer in range(replacement.lm.n_layers + 1):
        F, first = carry(frozen.model, nodes, layer)
        assert first == 0
        torch.testing.assert_close(F.sum(0), frozen.recording.layer_in[layer], rtol=0, atol=CLOSE)
        random = torch.randn(len(PROMPT), replacement.lm.d_model, 1, dtype=torch.float64)
        backwards = by_node(frozen.sources, frozen.model.edges_into(layer, random.clone()))[:, 0]
        torch.testing.assert_close((F * random[..., 0]).sum((1, 2)), backwards, rtol=0, atol=CLOSE)


@named
def test_heads_and_bypass_are_the_edge_at_every_layer(family, kind, make_traced):
    replacement, graph = make_traced(family, kind)
    edges = some_edges(graph, each=4)
    assert {graph.nodes[s].kind for _, s in edges} >= {"feature", "error", "embedding"}
    parallel = [parts.parallel for parts in replacement.lm.layers]
    for one in graph.heads(replacement, edges):
        assert one.value == pytest.approx(graph.edge(one.target, one.source), abs=CLOSE)
        torch.testing.assert_close(one.heads.sum(1) + one.bypass, torch.full_like(one.bypass, one.value))
        source, target = graph.nodes[one.source], graph.nodes[one.target]
        last = target.layer if target.kind == "logit" or parallel[target.layer] else target.layer + 1
        assert list(one.between) == list(range(source.layer + 1, last))
        for layer in range(replacement.lm.n_layers):
            assert bool(one.heads[layer].any()) <= (layer in one.between)


def test_a_heads_part_is_what_its_output_moves(family, make_traced):
    check_parts(*make_traced(family, KINDS[1]))


@named
@pytest.mark.slow
def test_a_heads_part_for_every_kind_of_transcoder(family, kind, make_traced):
    check_parts(*make_traced(family, kind))


def check_parts(replacement, graph):
    """Run with the source removed, put one head's output of that run into the clean one: the target moves by the head's
    part. With all heads of the layer held clean it moves by the bypass."""
    runner = Runner(replacement, graph.tokens)
    clean_logits, clean_seen, clean_heads = runner()
    checked = 0
    found = graph.heads(replacement, some_edges(graph, each=1))
    for one in found:
        target, source = graph.nodes[one.target], graph.nodes[one.source]
        if not one.between:
            continue
        logits, seen, heads = runner(source)
        before = runner.value(target, clean_logits, clean_seen)
        assert before - runner.value(target, logits, seen) == pytest.approx(one.value, abs=CLOSE)
        for layer in one.between:
            for head in range(one.heads.shape[1]):
                mixed = clean_heads[layer].clone()
                mixed[:, head] = heads[layer][:, head]
                moved = before - runner.value(target, *runner(None, (layer, mixed))[:2])
                assert moved == pytest.approx(float(one.heads[layer, head]), abs=CLOSE)
            moved = before - runner.value(target, *runner(source, (layer, clean_heads[layer]))[:2])
            assert moved == pytest.approx(float(one.bypass[layer]), abs=CLOSE)
            checked += 1
    assert checked > 5


def test_many_edges_are_one_by_one_the_same(make_traced, monkeypatch):
    """In blocks of sources and of targets, and edge by edge."""
    import crosslace.circuit.attribution.heads as module

    replacement, graph = make_traced("llama", KINDS[1])
    edges = some_edges(graph, each=5)
    whole = graph.heads(replacement, edges)
    monkeypatch.setattr(module, "TOGETHER", 3)
    monkeypatch.setattr(module, "VALUES", 4000)
    for one, other in zip(whole, graph.heads(replacement, edges), strict=True):
        torch.testing.assert_close(one.heads, other.heads, rtol=0, atol=1e-12)
    alone = graph.heads(replacement, edges[7])
    torch.testing.assert_close(alone.heads, whole[7].heads, rtol=0, atol=1e-12)


def test_top_heads_are_the_sum_over_edges(make_traced):
    replacement, graph = make_traced("gemma2", KINDS[0])
    heads = graph.top_heads(replacement, 100, edges=100000)
    flow = dict(zip(graph.row_ids.tolist(), graph.influence_per_input.tolist()))
    signed = torch.zeros(replacement.lm.n_layers, replacement.lm.layers[0].n_heads, dtype=torch.float64)
    absolute, whole = signed.clone(), signed[:, 0].clone()
    edges = [(t, s) for t in graph.row_ids.tolist() for s in graph.adjacency[t].nonzero().squeeze(1).tolist()]
    for one in graph.heads(replacement, [edge for edge in edges if graph.nodes[edge[1]].kind != "bias"]):
        weight = flow[one.target]
        signed += weight * torch.sign(torch.tensor(one.value)) * one.heads
        absolute += weight * one.heads.abs()
        for layer in one.between:
            whole[layer] += weight * (one.heads[layer].abs().sum() + one.bypass[layer].abs())
    assert heads == sorted(heads, key=lambda head: -head.absolute) and len(heads) > 8
    for head in heads:
        assert head.signed == pytest.approx(float(signed[head.layer, head.head]), abs=1e-9)
        assert head.absolute == pytest.approx(float(absolute[head.layer, head.head]), abs=1e-9)
        assert head.share == pytest.approx(float(absolute[head.layer, head.head] / whole[head.layer]), abs=1e-9)


def test_targets_that_are_no_next_token(make_traced):
    """A feature that does not fire, another position, a smaller graph; a vector is not kept."""
    replacement, _ = make_traced("llama", KINDS[1])
    graph = replacement.trace(PROMPT, targets=["L2:3@4", "L1:5"])
    edges = [(logit.id, s) for logit in graph.logits for s in graph.adjacency[logit.id].nonzero().squeeze(1).tolist()]
    edges = [edge for edge in edges if graph.nodes[edge[1]].kind != "bias"]
    for one in graph.heads(replacement, edges):
        assert one.value == pytest.approx(graph.edge(one.target, one.source), abs=CLOSE)
        assert max(one.between, default=0) <= 2
    smaller = graph.prune(node=0.5)
    one = smaller.heads(replacement, (smaller.logits[0].id, 0))
    same = smaller.nodes.keys()[0]
    whole = graph.heads(replacement, (graph.logits[0].id, graph.nodes.keys().index(same)))
    torch.testing.assert_close(one.heads, whole.heads)
    graph = replacement.trace(PROMPT, targets=torch.ones(replacement.lm.d_model, dtype=torch.float64))
    with pytest.raises(UserError, match="vector is not kept"):
        graph.heads(replacement, (graph.logits[0].id, 0))


def test_bad_edges_are_refused_in_a_sentence(make_traced):
    replacement, graph = make_traced("llama", KINDS[0])
    logit, bias, error = graph.logits[0].id, graph.nodes.ids("bias")[0], graph.nodes.ids("error")[0]
    for edge, reason in (
        ((logit, 10**6), "not in the graph"),
        ((error, 0), "into which no edge goes"),
        ((logit, bias), "of kind bias"),
    ):
        with pytest.raises(UserError, match=reason):
            graph.heads(replacement, edge)
    other = ReplacementModel(replacement.lm, replacement.transcoder)
    other.transcoder.b_enc[1].data -= 100
    try:
        gone = graph.nodes.ids("feature", layer=1)[0]
        with pytest.raises(UserError, match="trace it again"):
            graph.heads(other, (logit, gone))
    finally:
        other.transcoder.b_enc[1].data += 100
