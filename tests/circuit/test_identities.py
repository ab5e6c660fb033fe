"""The identities of graphs and interventions on a tiny random model of every family, in float64."""

from itertools import product

import pytest
import torch
from crosslace.circuit.attribution.backward import FrozenModel, Places
from crosslace.circuit.attribution.linear import record
from crosslace.circuit.attribution.sources import active_features, find_sources
from crosslace.circuit.attribution.targets import feature_targets
from crosslace.circuit.attribution.tracer import trace
from crosslace.circuit.graph.nodes import KINDS as NODE_KINDS
from crosslace.circuit.model import ReplacementModel
from crosslace.circuit.replacement import Intervention
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder

PROMPT = [5, 0, 9, 3, 0, 7]  # token id 0 is a token like any other
FEATURES = 12


def random_transcoder(lm, seed=0, activation="jumprelu", k=3, **settings):
    """A transcoder with no weight at zero, in the model's dtype; topk kinds are folded as after training."""
    settings = TranscoderSettings(features=FEATURES, activation=activation, k=k, **settings)
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in transcoder.named_parameters():
            scale = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            shift = -1.0 if name.startswith("log_theta") else 0.0
            weight.copy_(torch.randn(weight.shape, generator=random, dtype=torch.float64) * scale + shift)
    transcoder.requires_grad_(False)
    if activation == "batchtopk":
        one = torch.ones(lm.n_layers, dtype=torch.float64)
        return transcoder.folded(one, one, [0.2] * lm.n_layers)
    return transcoder


CLOSE = 1e-9  # also where a family's norms pass through float32: a recording computes them in the model's dtype


def autograd_rows(replacement, graph):
    """The graph's rows by autograd through the model itself, with patterns and denominators replayed and every source
    multiplied by a number whose derivative is the edge; biases are left out."""
    lm, transcoder = replacement.lm, replacement.transcoder
    tokens = torch.tensor(graph.tokens)[None]
    run = replacement.clean(tokens)
    acts, errors = replacement.features(run), replacement.errors(run)
    T, L = tokens.shape[1], lm.n_layers
    scales = torch.ones(len(graph.nodes), dtype=torch.float64, requires_grad=True)
    ids = {key: id for id, key in enumerate(graph.nodes.keys())}
    # where a position is left to the model, its own output stands in the error's place
    kept = NODE_KINDS.index("kept")
    error_of = [
        [ids[key] for p in range(T) for key in ((1, layer, p, 0), (kept, layer, p, 0)) if key in ids]
        for layer in range(L)
    ]
    read = transcoder.settings.read
    seen = {}

    def written(layer, sites):
        seen[layer] = sites[read]
        l = transcoder.layers.index(layer)
        y = torch.zeros_like(sites["mlp_out"])
        for source in range(max(0, l - transcoder.reach + 1), l + 1):
            a = acts[source][0]
            scaled = torch.zeros_like(a)
            for p, f in a.nonzero().tolist():
                scaled[p, f] = a[p, f] * scales[ids[0, transcoder.layers[source], p, f]]
            y = y + scaled @ transcoder.W_dec[source][:, l - source]
        y = y + transcoder.b_dec[l]
        if len(transcoder.W_skip):
            y = y + sites[read] @ transcoder.W_skip[l].T
        return y * ~run.masked[..., None] + errors[l] * scales[error_of[layer]][:, None]

    def scale_tokens(module, args, output):
        return output * scales[graph.nodes.ids("embedding")][:, None]

    def scale_positions(module, args, output):
        return output * scales[graph.nodes.ids("position")][:, None]

    handles = [lm._embedding.register_forward_hook(scale_tokens)]
    if lm._positions is not None:
        handles.append(lm._positions.register_forward_hook(scale_positions))
    try:
        with lm.freeze_attention(run.patterns), lm.freeze_norms(run.denominators), lm.overwrite(written):
            logits = lm.before_softcap(lm(tokens))[0]
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for node in graph.nodes:
        if node.kind == "feature":
            l = transcoder.layers.index(node.layer)
            value = transcoder.preactivation(seen[node.layer][0, node.position], l)[node.index]
        elif node.kind == "logit":
            value = logits[node.position, node.index] - logits[node.position].mean()
        else:
            continue
        rows.append(torch.autograd.grad(value, scales, retain_graph=True)[0])
    return torch.stack(rows), logits.detach(), run


KINDS = [
    {"reach": "1", "activation": "jumprelu"},
    {"reach": "all", "activation": "relu", "skip": True},
    {"reach": "2", "activation": "batchtopk", "read": "mlp_in"},
    {"reach": "all", "activation": "topk", "skip": True, "read": "mlp_in"},
]


def check_edges(lm, kind):
    """Identities 1, 2 and 3: the frozen map is linear, so a derivative is the effect of scaling a source."""
    replacement = ReplacementModel(lm, random_transcoder(lm, **kind))
    graph = trace(replacement, PROMPT, max_logits=3)
    expected, logits, run = autograd_rows(replacement, graph)
    assert graph.n_features > 5
    torch.testing.assert_close(logits, lm.before_softcap(run.logits)[0], rtol=0, atol=CLOSE)
    counted = ~graph.nodes.mask("bias")
    torch.testing.assert_close(graph.rows[:, counted], expected[:, counted], rtol=0, atol=CLOSE)
    assert graph.accounting["largest_violation"] < CLOSE
    # a feature's activation is its pre-activation, and a logit's value what the model says
    values = graph.nodes.activation[graph.row_ids]
    torch.testing.assert_close(graph.rows.sum(1), values, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(v) for v in kind.values()))
def test_edges_are_autograds_and_sum_to_what_the_model_computes(family, kind, tiny):
    check_edges(tiny, kind)


@pytest.mark.slow
def test_edges_of_every_kind_of_transcoder(family, tiny):
    """All that KINDS leaves out: each activation with each reach, site and skip."""
    for reach, activation, skip, read in product(
        ("1", "2", "all"), ("relu", "jumprelu", "topk", "batchtopk"), (False, True), ("resid", "mlp_in")
    ):
        check_edges(tiny, {"reach": reach, "activation": activation, "skip": skip, "read": read})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(v) for v in kind.values()))
def test_short_and_partly_silent_prompts(family, kind, tiny):
    """Length 1, the token 0 alone, and a last position at which no feature fires: the account is complete."""
    replacement = ReplacementModel(tiny, random_transcoder(tiny, **kind))
    for prompt in ([0], [7], [0, 0]):
        graph = trace(replacement, prompt)
        assert graph.tokens == prompt and graph.accounting["largest_violation"] < CLOSE
        assert (graph.n_features == 0) == (len(prompt) == 1)  # position 0 keeps the model's own output
        assert graph.prune().accounting["active_features"] == graph.n_features
    transcoder = replacement.transcoder
    run = replacement.clean(torch.tensor([PROMPT]))
    for l, layer in enumerate(transcoder.layers):
        last = transcoder.preactivation(run.read[layer][0, -1], l)
        transcoder.b_enc[l] -= last.clamp(min=0) + 0.01
    graph = trace(replacement, PROMPT)
    features = graph.nodes.mask("feature")
    assert graph.n_features > 0 and (graph.nodes.position[features] < len(PROMPT) - 1).all()
    assert graph.accounting["largest_violation"] < CLOSE


@pytest.fixture(params=["1", "2", "all"])
def traced(request, tiny):
    """A replacement model with skip and biases, and its graph, per reach."""
    replacement = ReplacementModel(tiny, random_transcoder(tiny, reach=request.param, skip=True))
    return replacement, trace(replacement, PROMPT, max_logits=4)


def normalised(graph):
    """A^ over all nodes."""
    adjacency = graph.adjacency.abs()
    return adjacency / adjacency.sum(1, keepdim=True).clamp(min=1e-300)


def test_nothing_flows_back_and_influence_is_the_neumann_sum(family, traced):
    """Identity 4."""
    graph = traced[1]
    nodes = graph.nodes
    target, source = graph.adjacency.nonzero(as_tuple=True)
    assert (nodes.position[source] <= nodes.position[target]).all()
    between = nodes.mask("feature")[source] & nodes.mask("feature")[target]
    assert between.any() and (nodes.layer[source] < nodes.layer[target])[between].all()
    assert (nodes.layer[source] <= nodes.layer[target]).all()
    eye = torch.eye(len(nodes), dtype=torch.float64)
    inverse = torch.linalg.inv(eye - normalised(graph)) - eye
    torch.testing.assert_close(graph.influence(), graph.weights @ inverse, rtol=0, atol=1e-12)


def with_relu_mlps(lm, transcoder, monkeypatch):
    """Put in place of the model's MLPs the ReLU networks that a per-layer transcoder of `mlp_in` is, with no norm after
    them, which no transcoder is."""
    nothing = torch.zeros(1, 1, lm.d_model, dtype=torch.float64)
    for l, parts in enumerate(lm.layers):
        scores_too = isinstance(parts.mlp(nothing), tuple)  # some blocks of experts give their router's as well

        def forward(x, l=l, scores_too=scores_too):
            a = torch.relu(x @ transcoder.W_enc[l].T + transcoder.b_enc[l])
            y = a @ transcoder.W_dec[l][:, 0] + transcoder.b_dec[l]
            return (y, None) if scores_too else y

        monkeypatch.setattr(parts.mlp, "forward", forward)
        if parts.post_mlp_norm is not None:
            monkeypatch.setattr(parts.post_mlp_norm.module, "forward", lambda x: x)
            monkeypatch.setattr(parts, "post_mlp_norm", None)


def test_a_relu_mlp_is_its_own_transcoder(family, tiny_models, monkeypatch):
    """Identity 5: zero error, scores 1, KL 0, and the graph is the neuron graph."""
    lm = tiny_models.make_tiny(family)
    transcoder = random_transcoder(lm, reach="1", activation="relu", read="mlp_in")
    with_relu_mlps(lm, transcoder, monkeypatch)
    replacement = ReplacementModel(lm, transcoder)
    monkeypatch.setattr(replacement, "masked_positions", lambda tokens, *rest, **named: torch.zeros_like(tokens) > 0)
    tokens = torch.tensor(PROMPT)[None]
    replaced, clean = (logits.log_softmax(-1) for logits in (replacement.replaced_logits(tokens), lm(tokens)))
    assert (clean.exp() * (clean - replaced)).sum(-1).abs().max() < 1e-9
    graph = trace(replacement, PROMPT, max_logits=3)
    assert graph.rows[:, graph.nodes.mask("error")].abs().max() < 1e-12
    scores = graph.scores()
    assert scores["replacement_score"] == pytest.approx(1) and scores["completeness"] == pytest.approx(1)
    neurons: dict = {}
    with lm.freeze_norms(), lm.freeze_attention(), lm.capture(("mlp_in",)) as sites:
        lm(tokens)
    for l, x in sites.mlp_in.items():
        acts = torch.relu(x[0] @ transcoder.W_enc[l].T + transcoder.b_enc[l])
        neurons |= {(l, p, f): float(acts[p, f]) for p, f in acts.nonzero().tolist()}
    nodes = [graph.nodes[id] for id in graph.nodes.ids("feature")]
    found = {(node.layer, node.position, node.index): node.activation for node in nodes}
    assert found == pytest.approx(neurons, abs=CLOSE)
    expected = autograd_rows(replacement, graph)[0]
    counted = ~graph.nodes.mask("bias")
    torch.testing.assert_close(graph.rows[:, counted], expected[:, counted], rtol=0, atol=CLOSE)


def feature_edges(lm, transcoder, change):
    """Edges among features of a prompt whose recording was changed, with their targets' and sources' places."""
    recording = record(lm, torch.tensor(PROMPT))
    change(recording)
    keep = torch.zeros(len(PROMPT), dtype=torch.bool)
    features = active_features(lm, transcoder, recording, keep, torch.float64)
    sources = find_sources(lm, transcoder, recording, features, keep, torch.float64)
    targets = feature_targets(lm, transcoder, recording, features, torch.float64)
    order = (targets.position - targets.layer * 100).argsort()
    found = (
        FrozenModel(lm, recording, sources, torch.float64)
        .edges(targets.select(order), Places(targets.layer[order].tolist(), targets.position[order].tolist()))
        .features
    )
    rows = torch.empty(len(order), len(order), dtype=torch.float64)
    rows[order] = found.T[:, sources.run_order.argsort()]
    return rows, features


@pytest.mark.parametrize("attention", ["off", "uniform"])
def test_edges_in_closed_form(family, attention, tiny):
    """Identity 6: virtual weights times activations, through what uniform attention copies; no norm divides."""
    transcoder = random_transcoder(tiny, reach="all")
    T, D = len(PROMPT), tiny.d_model
    one, nothing = torch.ones(T, 1, dtype=torch.float64), torch.zeros(1, D, dtype=torch.float64)
    weights = torch.tril(torch.ones(T, T, dtype=torch.float64)) / torch.arange(1, T + 1)[:, None]
    weights = weights * (attention == "uniform")

    def change(recording):
        for layer, pattern in enumerate(recording.patterns):
            recording.patterns[layer] = weights.expand_as(pattern)
        recording.denominators.update(dict.fromkeys(recording.denominators, one))

    def without_shift(norm, x):
        return x if norm is None else norm.frozen(x, one[:1]) - norm.frozen(nothing, one[:1])

    def attended(parts, x):
        W_V = parts.W_V.unflatten(0, (parts.n_kv_heads, -1)).repeat_interleave(parts.n_heads // parts.n_kv_heads, 0)
        written = weights @ without_shift(parts.attn_norm, x) @ W_V.flatten(0, 1).T @ parts.W_O.T
        return without_shift(parts.post_attn_norm, written)

    rows, f = feature_edges(tiny, transcoder, change)
    expected = torch.zeros_like(rows)
    for s in range(len(rows)):
        x = torch.zeros(T, D, dtype=torch.float64)
        for layer, parts in enumerate(tiny.layers):
            copied = attended(parts, x)
            mine = (f.layer == layer).nonzero().squeeze(1)
            read = x if parts.parallel else x + copied
            expected[mine, s] = (read[f.position[mine]] * transcoder.W_enc[layer][f.index[mine]]).sum(1)
            x = x + copied
            if layer >= f.layer[s]:
                x[f.position[s]] += f.activation[s] * transcoder.W_dec[int(f.layer[s])][f.index[s], layer - f.layer[s]]
    assert expected.any()
    torch.testing.assert_close(rows, expected, rtol=0, atol=CLOSE)


def test_silent_features_explain_nothing(family, tiny):
    """Identity 7; the logits are still accounted for."""
    transcoder = random_transcoder(tiny, activation="relu")
    for bias in transcoder.b_enc:
        bias.fill_(-1e6)
    graph = trace(ReplacementModel(tiny, transcoder), PROMPT)
    assert graph.n_features == 0
    assert set(graph.scores().values()) == {0} and len(graph.scores()) == 5
    assert graph.accounting["largest_violation"] < CLOSE
    assert graph.prune().n_features == 0


def test_rescaled_and_permuted_features_give_the_same_graph(family, tiny):
    """Identity 8."""
    lm = tiny
    transcoder = random_transcoder(lm, activation="jumprelu", reach="all")
    other = random_transcoder(lm, activation="jumprelu", reach="all")
    random = torch.Generator().manual_seed(1)
    shuffled = [torch.randperm(FEATURES, generator=random) for _ in range(lm.n_layers)]
    for l, order in enumerate(shuffled):
        u = torch.rand(FEATURES, generator=random, dtype=torch.float64) + 0.5
        other.W_dec[l].copy_((transcoder.W_dec[l] * u[:, None, None])[order])
        other.W_enc[l].copy_((transcoder.W_enc[l] / u[:, None])[order])
        other.b_enc[l].copy_((transcoder.b_enc[l] / u)[order])
        other.log_theta[l].copy_((transcoder.log_theta[l] - u.log())[order])
    x = torch.randn(20, lm.n_layers, lm.d_model, generator=random, dtype=torch.float64)
    torch.testing.assert_close(transcoder(x), other(x), rtol=0, atol=1e-12)
    first, second = (trace(ReplacementModel(lm, one), PROMPT) for one in (transcoder, other))
    where = {key: id for id, key in enumerate(second.nodes.keys())}
    ids = []
    keys = first.nodes.keys()
    for code, layer, position, index in keys:
        index = shuffled[layer].tolist().index(index) if code == 0 else index
        ids.append(where[code, layer, position, index])
    assert len(set(ids)) == len(second.nodes)
    torch.testing.assert_close(normalised(first), normalised(second)[ids][:, ids], rtol=0, atol=1e-9)


@pytest.mark.parametrize("read", ["resid", "mlp_in"])
def test_a_plt_inside_a_clt_is_the_same_graph(family, read, tiny):
    """Identity 9."""
    lm = tiny
    plt, clt = (random_transcoder(lm, reach=reach, read=read) for reach in ("1", "all"))
    for l in range(lm.n_layers):
        for name in ("W_enc", "b_enc", "b_dec", "log_theta"):
            getattr(clt, name)[l].copy_(getattr(plt, name)[l])
        clt.W_dec[l].zero_()
        clt.W_dec[l][:, 0] = plt.W_dec[l][:, 0]
    first, second = (trace(ReplacementModel(lm, one), PROMPT) for one in (plt, clt))
    assert first.nodes.keys() == second.nodes.keys()
    torch.testing.assert_close(first.rows, second.rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("kind", [{"reach": "1"}, {"reach": "all", "read": "mlp_in"}], ids=str)
def test_direct_interventions_move_targets_by_their_edges(kind, activation, family, tiny):
    """Identity 3 for what a user calls: `direct` is the graph's local replacement model, skip included."""
    replacement = ReplacementModel(tiny, random_transcoder(tiny, activation=activation, skip=True, **kind))
    graph = trace(replacement, PROMPT, max_logits=2)
    nodes, sources = graph.nodes, range(0, graph.n_features, 5)
    changes = [[Intervention(n.layer, n.position, n.index, times=1.5)] for n in map(nodes.__getitem__, sources)]
    for id, result in zip(sources, replacement.intervene_many(PROMPT, changes, "direct")):
        moved = tiny.before_softcap(result.logits[-1]) - tiny.before_softcap(result.clean_logits[-1])
        for logit in graph.logits:
            expected = 0.5 * graph.edge(logit.id, id)
            assert float(moved[logit.token] - moved.mean()) == pytest.approx(expected, abs=CLOSE)
        for later in range(graph.n_features - 1, id, -9):
            place = nodes[later].layer, nodes[later].position, nodes[later].index
            change = result.preactivation(*place) - result.preactivation(*place, clean=True)
            assert float(change) == pytest.approx(0.5 * graph.edge(later, id), abs=CLOSE)


def test_scaling_a_source_moves_targets_by_its_edge(family, tiny):
    """Identity 3, measured: the local replacement model with one activation scaled."""
    replacement = ReplacementModel(tiny, random_transcoder(tiny, reach="all", skip=True))
    graph = trace(replacement, PROMPT, max_logits=3)
    run = replacement.clean(torch.tensor(PROMPT)[None])
    clean = tiny.before_softcap(replacement.local_logits(run))[0, -1]
    for id in range(0, graph.n_features, 7):
        node = graph.nodes[id]
        acts = [a.clone() for a in replacement.features(run)]
        acts[node.layer][0, node.position, node.index] *= 1.5
        moved = tiny.before_softcap(replacement.local_logits(run, acts))[0, -1] - clean
        for logit in graph.logits:
            expected = 0.5 * graph.edge(logit.id, id)
            assert float(moved[logit.token] - moved.mean()) == pytest.approx(expected, abs=CLOSE)
