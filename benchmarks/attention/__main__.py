"""Seconds that a graph's heads and a head's explanation take, beside the trace itself.

    python -m benchmarks.attention [--json] [--layers 30] [--width 576] [--tokens 64] [--features 2000] [--edges 500]

A random Llama-shaped model (SmolLM2's shape by default: 30 layers, width 576, 9 query and 3 key heads) with a random
per-layer transcoder whose thresholds are set so that so many features fire in all, float32. `trace` is the graph;
`heads` splits its strongest edges over all heads of all layers; `look_*` explains one head at a query at the prompt's
end, at the middle layer and at the last one, where sweeps are longest. Each is the best of `--repeat` times. On a
machine that others use too, `*_cpu_s`, seconds of processors, are what can be compared.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from crosslace.circuit.attribution import strongest_heads
from crosslace.circuit.model import ReplacementModel
from crosslace.data.models import LanguageModel
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder import Transcoder

from ..attribution import memory


def build(arguments: argparse.Namespace) -> tuple[ReplacementModel, torch.Tensor]:
    """Model, transcoder and prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_heads,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    lm = LanguageModel(LlamaForCausalLM(config).float())
    prompt = torch.randint(0, arguments.vocabulary, (arguments.tokens,))
    D, L = arguments.width, arguments.layers
    transcoder = Transcoder(TranscoderSettings(features=1024, reach="1", activation="jumprelu"), D, L, seed=0)
    transcoder.requires_grad_(False)
    replacement = ReplacementModel(lm, transcoder)
    read = replacement.clean(prompt[None]).read
    for l in range(L):
        torch.nn.init.normal_(transcoder.W_enc[l], std=D**-0.5)
        torch.nn.init.normal_(transcoder.W_dec[l], std=0.1 * D**-0.5)
        h = transcoder.preactivation(read[l][0, 1:], l).flatten()
        transcoder.log_theta[l].fill_(h.topk(max(2, arguments.features // L + 1)).values[-1].clamp(min=1e-6).log())
    return replacement, prompt


def best(result: dict[str, Any], name: str, repeat: int, run: Callable[[], Any]) -> Any:
    """Note the shortest of several times, by the clock and of the processors; gives what came of it."""
    times, found = [], None
    for _ in range(repeat):
        started, worked = time.perf_counter(), time.process_time()
        found = run()
        times.append((time.perf_counter() - started, time.process_time() - worked))
    result |= {f"{name}_s": min(times)[0], f"{name}_cpu_s": min(cpu for _, cpu in times)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (
        *(("layers", 30), ("width", 576), ("heads", 9), ("key-heads", 3), ("vocabulary", 49152)),
        *(("tokens", 64), ("features", 2000), ("edges", 500), ("repeat", 3)),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    replacement, prompt = build(arguments)
    replacement.trace(prompt[:8])  # warmed up
    loaded = memory("VmRSS")
    result: dict[str, Any] = {"layers": arguments.layers, "width": arguments.width, "tokens": arguments.tokens}
    graph = best(result, "trace", arguments.repeat, lambda: replacement.trace(prompt))
    traced = memory("VmHWM")
    small = graph.prune()
    found = best(result, "heads", arguments.repeat, lambda: strongest_heads(replacement, small, arguments.edges)[0])
    result |= {"features": graph.n_features, "edges": len(found)}
    result |= {"sources": len({one.source for one in found}), "targets": len({one.target for one in found})}
    result["ratio"] = result["heads_cpu_s"] / result["trace_cpu_s"]
    for layer in (arguments.layers // 2, arguments.layers - 1):
        best(result, f"look_{layer}", arguments.repeat, lambda l=layer: replacement.attention(prompt, l, 0))
    result |= {"trace_peak": traced - loaded, "peak": memory("VmHWM") - loaded, "threads": torch.get_num_threads()}
    shown = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items())
    print(json.dumps(result) if arguments.json else "  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
