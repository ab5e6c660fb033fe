"""circuit-tracer on a case of benchmarks/attribution.py: run by another environment's interpreter, needs no network.

PYTHON attribution_reference.py FOLDER EDGES BATCH [lazy] [nodes=N]

lazy: decoders stay in their files, as ours do. nodes: keep so many features, and write no edges.
"""

import json
import sys
import time
from pathlib import Path

import torch
import yaml
from circuit_tracer import attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from safetensors.torch import load_file, save_file
from transformer_lens.config.HookedTransformerConfig import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import LlamaForCausalLM


class Words:
    """As much of a tokenizer as circuit-tracer asks for."""

    padding_side = "right"
    bos_token = "<bos>"

    def __init__(self, first: int, size: int):
        self.bos_token_id, self.all_special_ids, self.vocab_size = first, [first], size

    def decode(self, ids: object, *more: object, **named: object) -> str:
        return str(ids)


def load(folder: Path, first: int, lazy: bool) -> TransformerLensReplacementModel:
    """The model of a folder with its transcoder."""
    hf = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    c = hf.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads,
        n_key_value_heads=None if c.num_key_value_heads == c.num_attention_heads else c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_adjacent_pairs=False,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        model_name="random-llama",
        device="cpu",
        dtype=torch.float32,
    )
    model = TransformerLensReplacementModel(config)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    theirs = folder / "theirs"
    described = yaml.safe_load((theirs / "config.yaml").read_text())
    hooks = {key: described[key] for key in ("feature_input_hook", "feature_output_hook")}
    new = {"device": torch.device("cpu"), "dtype": torch.float32, "lazy_decoder": lazy, "lazy_encoder": False}
    if described["model_kind"] == "transcoder_set":
        paths = {l: str(theirs / f"layer_{l}.safetensors") for l in range(c.num_hidden_layers)}
        transcoders = load_transcoder_set(paths, scan="local", **hooks, **new)
    else:
        transcoders = load_clt(str(theirs), scan="local", **hooks, **new)
    model._configure_replacement_model(transcoders)
    model.tokenizer = Words(first, c.vocab_size)
    return model


def memory(entry: str) -> float:
    """MiB of this process, by its entry in Linux's status: VmRSS now, VmHWM at its highest. (`getrusage` would give
    that of the process which started it, where that was larger.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def main() -> None:
    folder, edges, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    prompt = load_file(folder / "prompt.safetensors")["tokens"]
    model = load(folder, int(prompt[0]), "lazy" in sys.argv[4:])
    nodes = next((int(word[6:]) for word in sys.argv[4:] if word.startswith("nodes=")), None)
    options = {"max_n_logits": 10, "desired_logit_prob": 0.95, "batch_size": batch, "max_feature_nodes": nodes}
    loaded = memory("VmRSS")
    attribute(prompt[: min(8, len(prompt) // 2)], model, **options)
    started, cpu = time.perf_counter(), time.process_time()
    graph = attribute(prompt, model, **options)
    traced = time.perf_counter()
    scores = compute_graph_scores(graph)
    prune_graph(graph)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    found = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "trace_seconds": traced - started,
        "peak": peak,
        "loaded": loaded,
        "beyond": peak - loaded,
        **dict(zip(("replacement_score", "completeness"), map(float, scores))),
    }
    if nodes is not None:
        print(json.dumps(found))
        return
    # edges without the rows that have no input and without errors at position 0, which are zero there
    n, T, L = len(graph.selected_features), len(prompt), model.cfg.n_layers
    columns = torch.ones(graph.adjacency_matrix.shape[1], dtype=torch.bool)
    columns[n : n + L * T : T] = False
    rows = torch.cat([graph.adjacency_matrix[:n], graph.adjacency_matrix[n + L * T + T :]])
    features = graph.active_features[graph.selected_features]
    tensors = {"edges": rows[:, columns], "features": features, "logits": graph.logit_token_ids}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, edges)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
