"""The identities of SPEC 4 on a tiny random model of every family, in float64."""

from itertools import product

import pytest
import torch
from crosslace.circuit.attribution import trace
from crosslace.circuit.backward import FrozenModel, Places
from crosslace.circuit.linear import record
from crosslace.circuit.replacement import ReplacementModel
from crosslace.circuit.sources import active_features, find_sources
from crosslace.circuit.targets import feature_targets
from crosslace.train.transcoder import Transcoder, TranscoderSettings

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


def tolerance(family, tiny_models):
    return 1e-9 if family in tiny_models.EXACT_FAMILIES else 1e-6


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
    error_of = [[ids[1, layer, position, 0] for position in range(T)] for layer in range(L)]
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
        return y * ~run.keep[..., None] + errors[l] * scales[error_of[layer]][:, None]

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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(v) for v in kind.values()))
def test_edges_are_autograds_and_sum_to_what_the_model_computes(family, kind, tiny, tiny_models):
    """Identities 1, 2 and 3: the frozen map is linear, so a derivative is the effect of scaling a source."""
    close = tolerance(family, tiny_models)
    replacement = ReplacementModel(tiny, random_transcoder(tiny, **kind))
    graph = trace(replacement, PROMPT, max_logits=3)
    expected, logits, run = autograd_rows(replacement, graph)
    assert graph.n_features > 10
    torch.testing.assert_close(logits, tiny.before_softcap(run.logits)[0], rtol=0, atol=close)
    counted = ~graph.nodes.mask("bias")
    torch.testing.assert_close(graph.rows[:, counted], expected[:, counted], rtol=0, atol=close)
    assert graph.accounting["largest_violation"] < close
    values = graph.nodes.activation[graph.targets]
    torch.testing.assert_close(graph.rows.sum(1), values, rtol=0, atol=close)


@pytest.fixture(params=["1", "2", "all"])
def traced(request, make_tiny):
    """A replacement model with skip and biases, and its graph, per reach."""
    lm = make_tiny("gemma2")
    replacement = ReplacementModel(lm, random_transcoder(lm, reach=request.param, skip=True))
    return replacement, trace(replacement, PROMPT, max_logits=4)


def normalised(graph):
    """A^ over all nodes."""
    adjacency = graph.adjacency.abs()
    return adjacency / adjacency.sum(1, keepdim=True).clamp(min=1e-300)


def test_nothing_flows_back_and_influence_is_the_neumann_sum(traced):
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


def test_a_relu_mlp_is_its_own_transcoder(make_tiny, tiny_models):
    """Identity 5: zero error, scores 1, and the graph is the neuron graph."""
    lm = tiny_models.make_tiny("gpt2", activation_function="relu")
    settings = TranscoderSettings(features=24, reach="1", activation="relu", read="mlp_in")
    transcoder = Transcoder(settings, lm.d_model, lm.n_layers, seed=None, dtype=torch.float64)
    with torch.no_grad():
        for l, block in enumerate(lm.model.transformer.h):
            transcoder.W_enc[l].copy_(block.mlp.c_fc.weight.T)
            transcoder.b_enc[l].copy_(block.mlp.c_fc.bias)
            transcoder.W_dec[l].copy_(block.mlp.c_proj.weight[:, None])
            transcoder.b_dec[l].copy_(block.mlp.c_proj.bias)
    replacement = ReplacementModel(lm, transcoder)
    replacement.keep_mask = lambda tokens, *rest, **named: torch.zeros_like(tokens, dtype=torch.bool)
    graph = trace(replacement, PROMPT)
    tokens = torch.tensor(PROMPT)[None]
    torch.testing.assert_close(replacement.replaced_logits(tokens), lm(tokens), rtol=0, atol=1e-12)
    assert graph.rows[:, graph.nodes.mask("error")].abs().max() < 1e-12
    scores = graph.scores()
    assert scores["replacement_score"] == pytest.approx(1) and scores["completeness"] == pytest.approx(1)
    neurons = replacement.features(replacement.clean(tokens))
    assert graph.n_features == sum(int((acts > 0).sum()) for acts in neurons)


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
        .edges(targets.select(order), Places.of(targets.select(order)))
        .features
    )
    rows = torch.empty(len(order), len(order), dtype=torch.float64)
    rows[order] = found.T[:, sources.run_order.argsort()]
    return rows, features


@pytest.mark.parametrize("attention", ["off", "uniform"])
def test_edges_in_closed_form(attention, make_tiny):
    """Identity 6: virtual weights times activations, through what uniform attention copies."""
    lm = make_tiny("qwen2")
    transcoder = random_transcoder(lm, reach="all")
    T = len(PROMPT)
    weights = torch.tril(torch.ones(T, T, dtype=torch.float64)) / torch.arange(1, T + 1)[:, None]

    def change(recording):
        for layer, pattern in enumerate(recording.patterns):
            recording.patterns[layer] = torch.zeros_like(pattern) if attention == "off" else weights.expand_as(pattern)
            recording.denominators[layer, "attn_norm"] = torch.ones(T, 1, dtype=torch.float64)

    rows, f = feature_edges(lm, transcoder, change)
    expected = torch.zeros_like(rows)
    copies = []
    for parts in lm.layers:
        W_V = parts.W_V.unflatten(0, (parts.n_kv_heads, -1)).repeat_interleave(2, 0).flatten(0, 1)
        copies.append(parts.W_O @ W_V @ torch.diag(parts.attn_norm.weight))
    for t, s in product(range(len(rows)), repeat=2):
        x = torch.zeros(T, lm.d_model, dtype=torch.float64)
        written, read = int(f.layer[s]), int(f.layer[t])
        for layer in range(written, read):
            decoder = transcoder.W_dec[written][f.index[s], layer - written]
            x[f.position[s]] += f.activation[s] * decoder
            if attention == "uniform":
                x = x + weights @ x @ copies[layer + 1].T
        expected[t, s] = x[f.position[t]] @ transcoder.W_enc[read][f.index[t]]
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-10)


def test_silent_features_explain_nothing(family, tiny):
    """Identity 7; the logits are still accounted for."""
    transcoder = random_transcoder(tiny, activation="relu")
    for bias in transcoder.b_enc:
        bias.fill_(-1e6)
    graph = trace(ReplacementModel(tiny, transcoder), PROMPT)
    assert graph.n_features == 0
    assert graph.scores() == {"replacement_score": 0, "completeness": 0, "completeness_ct": 0}
    assert graph.accounting["largest_violation"] < 1e-6
    assert graph.prune().n_features == 0


def test_rescaled_and_permuted_features_give_the_same_graph(make_tiny):
    """Identity 8."""
    lm = make_tiny("llama")
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
    first, second = (trace(ReplacementModel(lm, one), PROMPT) for one in (transcoder, other))
    where = {key: id for id, key in enumerate(second.nodes.keys())}
    ids = []
    keys = first.nodes.keys()
    for code, layer, position, index in keys:
        index = int((shuffled[layer] == index).nonzero()) if code == 0 else index
        ids.append(where[code, layer, position, index])
    assert len(set(ids)) == len(second.nodes)
    torch.testing.assert_close(normalised(first), normalised(second)[ids][:, ids], rtol=0, atol=1e-9)


def test_a_plt_inside_a_clt_is_the_same_graph(make_tiny):
    """Identity 9."""
    lm = make_tiny("gpt2")
    plt, clt = (random_transcoder(lm, reach=reach, read="mlp_in") for reach in ("1", "all"))
    for l in range(lm.n_layers):
        for name in ("W_enc", "b_enc", "b_dec", "log_theta"):
            getattr(clt, name)[l].copy_(getattr(plt, name)[l])
        clt.W_dec[l].zero_()
        clt.W_dec[l][:, 0] = plt.W_dec[l][:, 0]
    first, second = (trace(ReplacementModel(lm, one), PROMPT) for one in (plt, clt))
    assert first.nodes.keys() == second.nodes.keys()
    torch.testing.assert_close(first.rows, second.rows, rtol=0, atol=1e-12)


def test_scaling_a_source_moves_targets_by_its_edge(make_tiny):
    """Identity 3, measured: the local replacement model with one activation scaled."""
    lm = make_tiny("gpt_neox:sequential")
    replacement = ReplacementModel(lm, random_transcoder(lm, reach="all"))
    graph = trace(replacement, PROMPT, max_logits=3)
    run = replacement.clean(torch.tensor(PROMPT)[None])
    clean = replacement.local_logits(run)[0, -1]
    for id in range(0, graph.n_features, 7):
        node = graph.nodes[id]
        acts = [a.clone() for a in replacement.features(run)]
        acts[node.layer][0, node.position, node.index] *= 1.5
        moved = replacement.local_logits(run, acts)[0, -1] - clean
        for logit in graph.logits:
            expected = 0.5 * graph.edge(logit.id, id)
            assert float(moved[logit.token] - moved.mean()) == pytest.approx(expected, abs=1e-9)
