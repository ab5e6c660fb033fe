"""Seconds and peak memory of an attribution graph with its scores and pruning, ours and circuit-tracer's.

    python -m benchmarks.attribution [--json] [--case plt:32:5970 ...] [--circuit-tracer PYTHON] [--ours PYTHON]
    python -m benchmarks.attribution --run RUN --prompt "..." [--circuit-tracer PYTHON]   a run's model and transcoder

A case is transcoder:tokens:active-features, on a random Llama-style model (L=8, D=256, 8 heads, F=2048 a layer,
float32) whose thresholds are set so that so many features fire. With `--circuit-tracer`, the interpreter of another
environment that has it, the same weights and prompt go through circuit-tracer in the same run, and the largest
difference between the two adjacency matrices is printed, relative to the largest edge, and both
programs' scores by circuit-tracer's definitions. Its batch is the one at which
it is fastest on the first case, unless `--reference-batch` says. On a machine that others use too, `cpu_seconds` say
more. Every measurement has a process of its own, warmed up on the first tokens; `peak` (MiB) is that process's, all
its libraries included, `loaded` what it took with model and transcoder loaded, and `beyond` the difference: what
tracing, scores and pruning take. A developer's environment holds packages that PyTorch and transformers import where
they find them (triton and scipy, 0.1 GB); to compare two programs that are installed alike, `--ours` names the
interpreter of an environment that holds Crosslace and what it needs (`pip install -e .`), as circuit-tracer's does.
Ours runs on a GPU where there is one, and its memory is then the GPU's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from crosslace.circuit.formats.circuit_tracer import export_circuit_tracer
from crosslace.circuit.model import ReplacementModel
from crosslace.data.device import find_device
from crosslace.data.models.language_model import LanguageModel
from crosslace.train.settings import TranscoderSettings
from crosslace.train.transcoder.transcoder import Transcoder
from safetensors.torch import load_file, save_file
from torch import Tensor

L, D, HEADS, F, VOCABULARY = 8, 256, 8, 2048, 512
REFERENCE_BATCHES = (64, 128, 256, 512)
CASES = ("plt:32:5970", "clt:32:5682", "plt:96:8000", "clt:96:8000")
WARM_UP = 8
REFERENCE = Path(__file__).with_name("attribution_reference.py")


def build(kind: str, tokens: int, active: int, folder: Path) -> None:
    """The model, the transcoder (in our form and circuit-tracer's) and the prompt of a case."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    prompt = torch.randint(0, VOCABULARY, (tokens,))
    settings = TranscoderSettings(features=F, reach="1" if kind == "plt" else "all", activation="jumprelu")
    transcoder = Transcoder(settings, D, L, seed=0).requires_grad_(False)
    replacement = ReplacementModel(LanguageModel(model), transcoder)
    read = replacement.clean(prompt[None]).read
    per_layer = max(1, active // L)
    for l in range(L):
        torch.nn.init.normal_(transcoder.W_enc[l], std=D**-0.5)
        torch.nn.init.normal_(transcoder.W_dec[l], std=0.1 * (D * transcoder.reach_at(l)) ** -0.5)
        h = transcoder.preactivation(read[l][0, 1:], l).flatten()
        # the widest gap nearby: rounding must not decide who fires
        tail = h.topk(per_layer + 10).values[-20:]
        gap = int((tail[:-1] - tail[1:]).argmax())
        transcoder.log_theta[l].fill_(tail[gap : gap + 2].mean().log())
    model.save_pretrained(folder / "model")
    transcoder.save(folder / "ours")
    export_circuit_tracer(transcoder, folder / "theirs", model_name="random-llama")
    save_file({"tokens": prompt}, folder / "prompt.safetensors")


def build_from(run: Path, prompt: str, folder: Path) -> dict[str, Any]:
    """The same for a run, which must be of a Llama model, and a prompt of one's own."""
    from crosslace.launch.workspace import start
    from crosslace.launch.workspace.sources import open_model

    lm = open_model(start("trace", [f"run={run}", f"prompt='{prompt}'"])).widened(own=True)
    transcoder = Transcoder.load(run / "transcoder")
    lm.model.save_pretrained(folder / "model")
    transcoder.save(folder / "ours")
    export_circuit_tracer(transcoder, folder / "theirs", model_name=Path(lm.name).name)
    tokens = lm.tokenize(prompt)
    save_file({"tokens": tokens}, folder / "prompt.safetensors")
    return {
        "transcoder": transcoder.kind,
        "skip": transcoder.settings.skip,
        "layers": transcoder.n_layers,
        "tokens": len(tokens),
        "prompt": prompt,
    }


def measure(folder: Path, edges: Path | None, fields: dict[str, Any]) -> dict[str, Any]:
    """Ours, in this process; `fields` are settings of the trace."""
    from transformers import LlamaForCausalLM

    device = find_device("auto")
    model = torch.nn.Module.to(LlamaForCausalLM.from_pretrained(folder / "model"), device)
    replacement = ReplacementModel(LanguageModel(model), Transcoder.load(folder / "ours", device, lazy_decoders=True))
    prompt = load_file(folder / "prompt.safetensors")["tokens"]
    loaded = memory("VmRSS", device.type)
    replacement.trace(prompt[: min(WARM_UP, len(prompt) // 2)], **fields).prune()
    started, cpu = clock(device), time.process_time()
    graph = replacement.trace(prompt, **fields)
    traced = clock(device)
    scores = graph.scores()
    graph.prune().scores()
    seconds = clock(device) - started
    peak = memory("VmHWM", device.type)
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "features": graph.accounting["active_features"],
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "trace_seconds": traced - started,
        "peak": peak,
        "loaded": loaded,
        "beyond": peak - loaded,
        "largest_violation": graph.accounting["largest_violation"],
        **{name: scores[name] for name in ("replacement_score_ct", "completeness_ct")},
    }
    if edges is not None:
        save_file(comparable(graph), edges)
    return found


def comparable(graph: Any) -> dict[str, Tensor]:
    """Edges and the nodes that circuit-tracer has too: no biases, no errors at position 0 (it sets them to zero)."""
    nodes = graph.nodes
    kept = ~nodes.mask("bias") & ~(nodes.mask("error", "kept") & (nodes.position == 0))
    features = nodes.mask("feature")
    places = torch.stack([nodes.layer[features], nodes.position[features], nodes.index[features]], 1)
    return {
        "edges": graph.rows[:, kept].cpu().contiguous(),
        "features": places,
        "logits": nodes.index[nodes.mask("logit")],
    }


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(entry: str, device: str = "cpu") -> float:
    """MiB of this process, by its entry in Linux's status: VmRSS now, VmHWM at its highest; on a GPU, of what it holds
    there. (`getrusage` would give that of the process which started it, where that was larger.)"""
    if device == "cuda":
        return (torch.cuda.memory_allocated() if entry == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def largest_difference(ours: Path, theirs: Path, without: int | None = None) -> float:
    """Between the two matrices, over the largest edge; logits are matched by token. `without` leaves out the embedding
    at position 0, so many sources behind the features: a skip passes there in circuit-tracer, and here the model's own
    output stands."""
    a, b = load_file(ours), load_file(theirs)
    if not torch.equal(a["features"], b["features"].long()):
        raise SystemExit("the two programs find different active features")
    n, order = len(a["features"]), [b["logits"].tolist().index(token) for token in a["logits"].tolist()]
    k = len(order)
    rows = torch.cat([b["edges"][:n], b["edges"][n:][order]])[:, : b["edges"].shape[1] - k]
    difference = (a["edges"][:, : a["edges"].shape[1] - k] - rows).abs()
    if without is not None:
        difference[:, n + without] = 0
    return float(difference.max() / a["edges"].abs().max())


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build a case, or with `--run` one of a prompt, measure it in processes of their own, compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.run:
            about = build_from(arguments.run, case, folder)
        else:
            kind, tokens, active = case.split(":")
            build(kind, int(tokens), int(active), folder)
            about = {"transcoder": kind, "tokens": int(tokens)}
        ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
        options = [f"--set={entry}" for entry in arguments.set or []]
        options += [f"--set=max_nodes={arguments.nodes}"] if arguments.nodes else []
        options += ["--edges", str(ours)] if arguments.circuit_tracer and not arguments.nodes else []
        found = in_process([arguments.ours, "-m", "benchmarks.attribution", "--measure", name, *options])
        result = {**about, **found}
        if arguments.circuit_tracer:
            reference = run_reference(folder, theirs, arguments)
            result |= {f"reference_{key}": value for key, value in reference.items()}
            result["ratio"] = reference["seconds"] / result["seconds"]
            result["cpu_ratio"] = reference["cpu_seconds"] / result["cpu_seconds"]
            result["peak_ratio"] = result["peak"] / reference["peak"]
            result["beyond_ratio"] = result["beyond"] / reference["beyond"]
            if not arguments.nodes:
                errors = about["layers"] * (about["tokens"] - 1) if about.get("skip") else None
                result["max_difference"] = largest_difference(ours, theirs, errors)
        return result


def run_reference(folder: Path, edges: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """circuit-tracer on a case; the first one says which batch it is fastest with, unless that is given."""
    tried = [arguments.reference_batch] if arguments.reference_batch else list(REFERENCE_BATCHES)
    runs = []
    for batch in tried:
        command = [arguments.circuit_tracer, str(REFERENCE), str(folder), str(edges), str(batch)]
        command += ["lazy"] if arguments.reference_lazy else []
        command += [f"nodes={arguments.nodes}"] if arguments.nodes else []
        runs.append({"batch": batch, **in_process(command)})
        if len(tried) > 1:
            print(
                f"circuit-tracer, batch {batch}: {runs[-1]['seconds']:.1f} s, {runs[-1]['peak']:.0f} MiB",
                file=sys.stderr,
            )
    best = min(runs, key=lambda run: run["seconds"])
    arguments.reference_batch = best["batch"]
    return best


def in_process(command: list[str]) -> dict[str, Any]:
    """The JSON object that a program prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", action="append", help="transcoder:tokens:active-features, e.g. clt:96:8000")
    parser.add_argument(
        "--run", type=Path, help="a run whose model and transcoder are measured, in place of random ones"
    )
    parser.add_argument("--prompt", action="append", help="with --run: a prompt to trace")
    parser.add_argument("--circuit-tracer", metavar="PYTHON", help="interpreter of an environment that has it")
    parser.add_argument(
        "--ours",
        metavar="PYTHON",
        default=sys.executable,
        help="interpreter that ours runs in; by default this one",
    )
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of ours, e.g. max_nodes=7500")
    parser.add_argument(
        "--reference-batch", type=int, help="circuit-tracer's; by default its fastest on the first case"
    )
    parser.add_argument(
        "--reference-lazy", action="store_true", help="circuit-tracer leaves decoders in their files too"
    )
    parser.add_argument(
        "--nodes",
        type=int,
        help="features that both keep: long prompts fit, and edges, of which each keeps its own, are not compared",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--edges", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        entries = (entry.split("=", 1) for entry in arguments.set or [])
        fields = {name: int(value) if value.isdigit() else value for name, value in entries}
        print(json.dumps(measure(arguments.measure, arguments.edges, fields)))
        return
    for case in arguments.prompt or arguments.case or CASES:
        result = run_case(case, arguments)
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            shown = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
            )
            print("  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
