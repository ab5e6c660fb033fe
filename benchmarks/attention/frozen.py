"""What graphs of a run miss by freezing attention, and how much of it queries and keys predict.

This is `faithfulness.attention` of `crosslace eval`, by itself.

    python -m benchmarks.attention.frozen RUN [--prompts 10] [--features 8] [--json]
"""

import argparse
import json
import time

from crosslace.circuit.judge import EvalSettings
from crosslace.circuit.judge.frozen_attention import frozen_attention
from crosslace.circuit.model import ReplacementModel
from crosslace.launch.verbs.evaluate import prompts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rm = ReplacementModel.load(arguments.run)
    chosen = prompts_of(rm, EvalSettings(prompts=arguments.prompts))[0]
    assert chosen is not None
    prompts, started = chosen.prompts[: arguments.prompts], time.process_time()
    found = frozen_attention(rm, [rm.lm.tokenize(prompt).tolist() for prompt in prompts], arguments.features)
    result = {"run": arguments.run, "set": chosen.label, "prompts": len(prompts), **found}
    result["cpu_s"] = time.process_time() - started
    print(json.dumps(result) if arguments.json else "  ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
