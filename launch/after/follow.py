"""The verbs that follow a training, each as its own command would be; what is done already is not done again."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ...conf import SOURCES, VERBS
from ..settings import compose_config
from ..terminal import Closing
from ..verbs import evaluate, features
from ..workspace import Job, following, recorded, runs
from .checkpoints import over_checkpoints

ALONE = ("trace", "checkpoints")
"""Of several processes, the first does these."""


def words_for(job: Job, verb: str, folder: Path) -> list[str]:
    """The command's own words that this verb takes too."""
    kept = [word for word in job.later if word.partition("=")[0].partition(".")[0] in VERBS[verb].sections]
    kept += [word for word in job.words if word.partition("=")[0].partition(".")[0] in ("experiment", *SOURCES)]
    if verb == "trace":  # the prompts that `eval` measures
        count = compose_config("eval", words_for(job, "eval", folder)).values["eval"]["prompts"]
        kept += ["prompts=auto", f"count={max(1, count)}"]
    return [f"run={folder}", *kept]


def refuse_unready(job: Job) -> None:
    """Check the settings of all that follows before the training begins."""
    for verb in job.section("then").do:
        if verb != "checkpoints":
            compose_config(verb, words_for(job, verb, Path(job.top.run))).check()


def follow(job: Job, folder: Path, leave_out: Sequence[str] = ()) -> Closing:
    """One after another; what to look at then. Of several processes all measure, and the first alone makes graphs."""
    then = job.section("then")
    for verb in then.do:
        if verb in leave_out or (verb in ALONE and not job.is_main):
            continue
        if verb == "checkpoints":
            closing = over_checkpoints(job, folder, then.graph)
        else:
            words = words_for(job, verb, folder)
            part = following(job, verb, words, verb in ALONE)
            if is_done(verb, part, folder):
                closing = Closing(f"{verb}: done already")
            else:
                with recorded(str(folder) if job.is_main else None, [verb, *words]):
                    closing = import_module(f"...{VERBS[verb].module}", __package__).run(part)
        closing.next = []
        if job.is_main:
            closing.show()
    return Closing("all of it is done", next=[f"crosslace view run={folder}", f"crosslace report run={folder}"])


def is_done(verb: str, part: Job, folder: Path) -> bool:
    """Whether the folder holds this verb's result, made with these settings. (A trace looks at each of its graphs.)"""
    if verb == "eval":
        return evaluate.settings_of(folder) == evaluate.asked(part)
    asked = {name: part.config.values[name] for name in features.KEPT}
    return verb == "features" and runs.saved_settings(folder / "features") == asked
