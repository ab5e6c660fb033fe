"""One command at work: its settings, where it reports, and the folders it may write to.

words -> `start`: composed settings (`launch/settings`), on the base of the run's own (`runs`) -> Job
Job -> `process`: this one among several (`processes`) -> model, text, stores (`sources`) -> the verb's work
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...conf import VERBS
from ...data.errors import UserError
from ..settings import Config, compose_config, single_values, tidy
from ..terminal import Unseen, Watched
from . import runs
from .processes import LONG, Process, agree, this_process
from .provenance import versions


@dataclass
class Job:
    """What a verb is given."""

    verb: str
    config: Config
    words: list[str] = field(default_factory=list)
    """The overrides, tidied."""
    later: list[str] = field(default_factory=list)
    """Those of the verbs that follow a training."""
    progress: Watched = field(default_factory=Watched)

    @property
    def top(self) -> Any:
        """The verb's own settings."""
        return self.config.top()

    def section(self, name: str) -> Any:
        """The settings of one group."""
        return self.config.section(name)

    @cached_property
    def process(self) -> Process:
        """Rank and device of this process. Whatever computes asks for it first."""
        sections, values = VERBS[self.verb].sections, self.config.values
        timeout = self.section("parallel").timeout if "parallel" in sections else LONG
        name = "trainer" if "trainer" in sections else "model"
        process = this_process(values.get(name, {}).get("device", "auto"), f"{name}.device", timeout)
        agree(runs.flat(values) | versions())
        return process

    @property
    def is_main(self) -> bool:
        """Does this process speak for the job? (Under torchrun only the first does.)"""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def store_path(self) -> str:
        """The store named on the command line or by the run: a folder, or an fsspec URL."""
        path = self.config.values["store"]["path"]
        if not path:
            raise UserError("store is missing; it takes a folder of cached activations, such as store=stores/world")
        return path


FOLLOWED = ("train", "sweep")
LATER = ("eval", "features", "labels", "trace")
"""Groups of settings that a training does not take, and what follows it does."""
READERS = ("eval", "features", "trace", "steer", "export", "publish")
"""Verbs that read a run, whose settings are then their base."""


def start(verb: str, words: Sequence[str]) -> Job:
    """Compose and check the settings of a command; a run's own settings are the base of what reads the run."""
    if not sys.stderr.isatty():
        # Read by Hugging Face's libraries when they are imported: no bars in a log file.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if verb in ("report", "runs", "seeds", "store"):
        plain = [word for word in words if "=" not in word]
        words = [word for word in words if "=" in word]
        listed = ",".join(f"'{name}'" for name in plain)
        if verb in ("runs", "store") and len(plain) == 1:
            words = [*words, f"{'run' if verb == 'runs' else 'path'}='{plain[0]}'"]
        elif plain and verb == "store":
            raise UserError(f"crosslace store takes one path, and not {', '.join(plain)}")
        elif plain:
            words = [*words, f"{'compare' if verb == 'runs' else 'runs'}=[{listed}]"]
    if verb == "demo" and not any(word.startswith("experiment=") for word in words):
        real = any(word in ("model=smollm2", "model.name=smollm2") for word in words)
        words = [f"experiment={'smollm2_demo' if real else 'demo'}", *words]
    later: list[str] = []
    if verb in FOLLOWED and any(word.startswith(("then=", "then.do=", "experiment=")) for word in words):
        own = VERBS[verb].sections
        later = [word for word in words if (head := re.split("[.=]", word)[0]) in LATER and head not in own]
        words = [word for word in words if word not in later]
    if verb == "sweep":
        words = tidy(verb, words, several=True)
        config = compose_config(verb, single_values(words))
    else:
        config = compose_config(verb, words)
    config.top()  # what is missing is said first
    if verb in READERS and config.values["run"]:
        folder = Path(config.values["run"])
        if not folder.is_dir():
            raise UserError(f"there is no run at {folder}; `crosslace train ... run={folder}` would make one")
        config.base_on(runs.saved_settings(folder))
    if verb == "train" and config.values["run"]:
        config.go_on_with(runs.saved_settings(Path(config.values["run"])))
    config.check()
    job = Job(verb, config, list(words), later)
    return job if job.is_main else replace(job, progress=Watched(Unseen()))


def following(job: Job, verb: str, words: Sequence[str], alone: bool = False) -> Job:
    """A command that goes on where another ended, on its line of progress; `alone`, as this process, with nothing asked
    of the others, which may have ended."""
    part = start(verb, words)
    part.progress = job.progress
    if alone:
        part.process = job.process
    return part
