"""Where the time of an evaluation goes: the whole, and the model's forward passes alone, in one run.

    python -m benchmarks.evaluation RUN [--json] [--tokens N] [--prompts N] [--pairs N]

RUN is a trained run or any transcoder folder. `forward_share` is the share of the whole that the language model's own
forward passes take, hooks left out: each pass is timed inside the model.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from crosslace.launch.verbs.evaluate import evaluated
from crosslace.launch.workspace.job import start
from crosslace.launch.workspace.sources import open_corpus, open_replacement


class Stopwatch:
    """Times every forward pass of a module."""

    def __init__(self, module: torch.nn.Module):
        self.seconds, self.passes, self._began = 0.0, 0, 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
        self.passes += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=500)
    chosen = parser.parse_args()
    words = [f"run={chosen.run}", *(f"eval.{name}={getattr(chosen, name)}" for name in ("tokens", "prompts", "pairs"))]
    job = start("eval", words)
    model = open_replacement(job, Path(chosen.run))
    watch = Stopwatch(model.lm.model)
    corpus = open_corpus(job, model.lm)
    began = time.perf_counter()
    evaluated(model, corpus, job.section("eval"), job.progress)
    whole = time.perf_counter() - began
    figures = {
        "tokens": chosen.tokens,
        "prompts": chosen.prompts,
        "pairs": chosen.pairs,
        "threads": torch.get_num_threads(),
        "seconds": round(whole, 2),
        "forward_passes": watch.passes,
        "forward_share": round(watch.seconds / whole, 3),
    }
    print(json.dumps(figures) if chosen.json else "\n".join(f"{name:<16}{value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
