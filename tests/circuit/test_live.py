"""What freezing attention leaves out, to first order: held against small steps of a source, attention live."""

import pytest
import torch
from crosslace.circuit.attribution.qk import LiveAttention
from crosslace.circuit.judge.frozen_attention import frozen_attention

PROMPT = [5, 0, 9, 3, 0, 7]
STEP = 0.01


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "olmo2", "gpt_oss"])
def test_the_first_order_effect_is_the_slope_of_small_steps(family, make_replacement):
    """Embeddings scaled a little up and down; norms frozen, on queries and keys too, and MLP outputs."""
    replacement = make_replacement(family, reach="all", activation="relu")
    lm, tokens = replacement.lm, torch.tensor(PROMPT)
    live = LiveAttention(replacement, tokens)
    nodes = [node for node in live.prompt.sources.nodes(live.prompt.recording) if node.kind == "embedding"][1:5]
    run = replacement.clean(tokens[None])
    inner: dict = {}
    at = None

    def scaled(step):
        def embed(module, args, output):
            output = output.clone()
            output[..., at, :] *= 1 + step
            return output

        def kept(norm):
            def hook(module, args, output):
                return norm.frozen(args[0], inner.setdefault(id(module), norm.denominator(args[0])))

            return hook

        norms = [norm for parts in lm.layers for norm in (parts.query_norm, parts.key_norm) if norm]
        handles = [norm.module.register_forward_hook(kept(norm)) for norm in norms]
        handles.append(lm._embedding.register_forward_hook(embed))
        seen = []
        handles.append(lm.final_norm.module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0])))
        with lm.freeze_norms(run.denominators), lm.overwrite(lambda layer, sites: run.mlp_out[layer]):
            lm(tokens[None])
        for handle in handles:
            handle.remove()
        return seen[0]

    at = 0
    scaled(0.0)  # the clean denominators of query and key norms
    found, frozen = live.carry(nodes, live=True), live.carry(nodes, live=False)
    for node, change, straight in zip(nodes, found, frozen):
        at = node.position
        near, far = (scaled(by) - scaled(-by) for by in (STEP, 2 * STEP))
        slope = (8 * near - far) / (12 * STEP)
        missed = (slope - straight).abs().max()
        assert float(missed) > 1e-2, "attention matters here"
        torch.testing.assert_close(change, slope, rtol=0, atol=1e-4)  # most families' softmax is float32


def test_what_graphs_miss_is_measured_and_predicted(make_replacement):
    """On a model whose features are made small, the first order is nearly all of it."""
    replacement = make_replacement("gpt2", reach="all", activation="relu")
    for weight in replacement.transcoder.W_dec:
        weight.data *= 0.01
    found = frozen_attention(replacement, [PROMPT], per_prompt=12)
    assert found["effects"] >= 12 and 0 < found["missed"] < 2 and found["explained"] > 0.99
