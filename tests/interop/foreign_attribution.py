# pyright: reportMissingImports=false
"""Run by another environment's interpreter: circuit-tracer's own attribution of each case folder, no network.

PYTHON foreign_attribution.py FOLDER...
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from circuit_tracer import attribute
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from safetensors.torch import load_file, save_file
from transformer_lens.config.HookedTransformerConfig import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
from transformers import AutoModelForCausalLM


class Words:
    """As much of a tokenizer as circuit-tracer asks for: the prompt's first token counts as special."""

    padding_side, bos_token = "right", "<bos>"

    def __init__(self, first, size):
        self.bos_token_id, self.all_special_ids, self.vocab_size = first, [first], size

    def decode(self, ids, *more, **named):
        return str(ids)


def described(c):
    """TransformerLens's description of the folder's model, and how its weights are renamed."""
    common = {"device": "cpu", "dtype": torch.float32, "d_vocab": c.vocab_size}
    if c.model_type == "gpt2":
        config = HookedTransformerConfig(
            n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
            d_mlp=c.n_inner or 4 * c.n_embd, act_fn="gelu_new", eps=c.layer_norm_epsilon, normalization_type="LN",
            positional_embedding_type="standard", original_architecture="GPT2LMHeadModel", model_name="random-gpt2",
            **common,
        )  # fmt: skip
        return config, convert_gpt2_weights
    d_head = c.hidden_size // c.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings, d_head=d_head,
        n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size,
        act_fn="silu", eps=c.rms_norm_eps, normalization_type="RMS", positional_embedding_type="rotary",
        rotary_dim=d_head, rotary_adjacent_pairs=False, rotary_base=10000, final_rms=True, gated_mlp=True,
        original_architecture="LlamaForCausalLM", model_name="random-llama", **common,
    )  # fmt: skip
    return config, convert_llama_weights


def load(folder, first):
    hf = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config, convert = described(hf.config)
    model = TransformerLensReplacementModel(config)
    model.load_and_process_state_dict(
        convert(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    theirs = folder / "exported"
    settings = yaml.safe_load((theirs / "config.yaml").read_text())
    hooks = {key: settings[key] for key in ("feature_input_hook", "feature_output_hook")}
    new = {"device": torch.device("cpu"), "dtype": torch.float32, "lazy_decoder": True, "lazy_encoder": False}
    if settings["model_kind"] == "transcoder_set":
        paths = {l: str(theirs / f"layer_{l}.safetensors") for l in range(config.n_layers)}
        transcoders = load_transcoder_set(paths, scan="local", **hooks, **new)
    else:
        transcoders = load_clt(str(theirs), scan="local", **hooks, **new)
    model._configure_replacement_model(transcoders)
    model.tokenizer = Words(first, config.d_vocab)
    return model


def changes(graph, length):
    """One active feature of layer 0 and one of layer 1, each away from the first position, and what it is set to."""
    chosen = []
    for layer in (0, 1):
        for (l, position, feature), value in zip(graph.active_features.tolist(), graph.activation_values.tolist()):
            if l == layer and position >= length // 2:
                chosen.append((l, position, feature, -2 * value))
                break
    return chosen, [(int(l), int(t), int(f), value) for l, t, f, value in chosen]


for name in sys.argv[1:]:
    folder = Path(name)
    prompt = load_file(folder / "prompt.safetensors")["tokens"]
    model = load(folder, int(prompt[0]))
    graph = attribute(prompt, model, max_n_logits=5, desired_logit_prob=0.8, batch_size=64)
    chosen, interventions = changes(graph, len(prompt))
    layers = range(model.cfg.n_layers)
    steered = {
        "steer": {"freeze_attention": False},
        "steer, attention frozen": {"freeze_attention": True},
        "constrained": {"constrained_layers": range(2), "freeze_attention": True},
        "direct": {"constrained_layers": layers, "freeze_attention": True},
    }
    tensors = {
        "adjacency": graph.adjacency_matrix,
        "features": graph.active_features[graph.selected_features],
        "activations": graph.activation_values[graph.selected_features],
        "logits": graph.logit_token_ids,
        "probabilities": graph.logit_probabilities,
        "scores": torch.tensor(compute_graph_scores(graph), dtype=torch.float64),
        "changes": torch.tensor(chosen, dtype=torch.float64),
    }
    for mode, how in steered.items():
        logits, _ = model.feature_intervention(prompt, interventions, **how)
        tensors[f"steered/{mode}"] = logits.squeeze(0).detach()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "theirs.safetensors")
print(json.dumps({"cases": len(sys.argv) - 1}))
