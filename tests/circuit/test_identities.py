"""The identities of SPEC 4 on a tiny random model of every family, in float64."""

from itertools import product

import pytest
import torch
from crosslace.circuit.attribution import trace
from crosslace.circuit.replacement import ReplacementModel
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
