"""`crosslace VERB [overrides]`: find the verb, check its settings, run it, and say how it ended.

    words -> flags apart (`flags`) -> `workspace.start`: a Job of checked settings -> the verb's `run(job)` -> Closing
    an exception -> a sentence, an exit code, perhaps a traceback in the run's error.log (`failures`)

Nothing heavy is imported before the verb is known, so that help answers at once.
"""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module

from ...conf import VERBS
from ...data.errors import UserError
from .failures import failure_of, keep_traceback, patience
from .flags import read_flags

DEBUG = {f"debug={yes}" for yes in ("true", "1", "yes", "on")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (see `failures`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) went away: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        return _end(error, words)


def _run(words: list[str]) -> int:
    from .help import overview, verb_help

    if len(words) > 1 and words[0] == "help":
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        overview()
        return 0
    if words[0] in ("-V", "--version"):
        from ... import __version__

        print(f"crosslace {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb in ("completion", "complete"):
        from .completion import candidates, script

        print(script(rest[0] if rest else "") if verb == "completion" else "\n".join(candidates(rest[0])), end="")
        return 0
    if verb not in VERBS:
        from ...conf.describe import closest

        near = closest(verb, list(VERBS))
        guess = f"did you mean {near}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"`{verb}` is not a verb; {guess}")
    flags = read_flags(rest)
    if flags.help:
        verb_help(verb)
        return 0

    from ..workspace import recorded, start

    find = lambda: import_module(f"...{VERBS[verb].module}", __package__).run
    if flags.multirun:
        from ..sweeps import run_each

        return run_each(verb, flags.words, find())
    from ...data.pages import keep_pages

    keep_pages()
    job = start(verb, flags.words)
    if flags.cfg:
        print(job.config.as_yaml(), end="")
        return 0
    try:
        with job.progress, recorded(job.config.values.get("run") if job.is_main else None, words):
            closing = find()(job)
    finally:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from ...train.parallel import leave

            leave()
    if closing is None:
        return 0
    if job.is_main:
        closing.show()
    return closing.code


def _end(error: BaseException, words: Sequence[str]) -> int:
    failure = failure_of(error, words)
    sentence = failure.sentence
    if failure.traced:
        sentence += f" ({keep_traceback(error, words)})"
    elif DEBUG & {word.lower() for word in words}:
        traceback.print_exception(error)
    time.sleep(patience(error))
    print(f"crosslace: {sentence}", file=sys.stderr)
    return failure.code
