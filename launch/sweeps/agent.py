"""`crosslace sweep ... print=wandb`: the sweep as `wandb sweep` takes it, for `wandb agent` to run."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from ..settings import choices
from ..workspace import Job

GOALS = {"min": "minimize", "max": "maximize"}


def print_for_agent(job: Job) -> None:
    """Write the configuration to standard output, to be kept in a file."""
    print(yaml.safe_dump(agent_sweep(job), sort_keys=False, allow_unicode=True), end="")


def agent_sweep(job: Job) -> dict[str, Any]:
    """A grid of the settings that vary; each of an agent's runs is `crosslace train` in a folder named by its id, which
    the agent puts into the environment alone."""
    fixed, varied = choices(job.words)
    goal, _, figure = job.top.objective.partition(" ")
    words = [word for word in fixed if not word.startswith(("wandb.mode=", "wandb.name="))]
    folder = f'run={shlex.quote(job.top.run)}/"$WANDB_RUN_ID"'
    script = f'exec crosslace train {shlex.join(words)} wandb.mode=online {folder} "$@"'
    return {
        "name": Path(job.top.run).name,
        "project": job.section("wandb").project,
        "program": "crosslace",
        "method": "grid",
        "metric": {"name": f"held_out/{figure}", "goal": GOALS[goal]},
        "command": ["sh", "-c", script, "crosslace", "${args_no_hyphens}"],
        "parameters": {key: {"values": [typed(text) for text in texts]} for key, texts in varied.items()},
    }


def typed(text: str) -> Any:
    """A value as the agent gives it back: numbers as numbers (YAML takes 1e-3 for a word), null as the word."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text if text == "null" else yaml.safe_load(text)
