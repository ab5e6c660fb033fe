"""`crosslace VERB [overrides]`: find the verb, check its settings, run it, and say how it ended.

Nothing heavy is imported before the verb is known, so that help answers at once.
Exit codes: 0 done, 1 a defect of ours, 2 bad input or circumstances, 130 stopped by the user.
"""

import errno
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module

from ...conf import VERBS
from ...data.errors import UserError, out_of_room

_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "debug=true" in [word.lower() for word in words]
    try:
        return _run(words)
    except UserError as error:
        return _end(str(error), 2, debug, error)
    except KeyboardInterrupt:
        return _end("stopped; what was finished is kept, and the same command goes on from there", 130, debug)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) went away: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (sentence := _about_the_disk(error)) is None:
            return _end(f"{type(error).__name__}: {error} (debug=true shows where)", 1, debug)
        return _end(sentence, 2, debug)
    except ImportError as error:
        return _end(f"a package that this needs is not installed or cannot be loaded: {error}", 2, debug)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return _end(f"this is a defect of ours, {type(error).__name__}: {first} (debug=true shows where)", 1, debug)


def _run(words: list[str]) -> int:
    from .help import overview, verb_help

    if not words or words[0] in ("-h", "--help", "help"):
        overview()
        return 0
    if words[0] in ("-V", "--version"):
        from ... import __version__

        print(f"crosslace {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        from ...conf.describe import closest

        near = closest(verb, list(VERBS))
        guess = f"did you mean {near}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"`{verb}` is not a verb; {guess}")
    if any(word in ("-h", "--help") for word in rest):
        verb_help(verb)
        return 0

    from ..workspace import start

    job = start(verb, rest)
    try:
        with job.progress:
            closing = import_module(f"...{VERBS[verb].module}", __package__).run(job)
    finally:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from ...train.parallel import leave

            leave()
    if closing is None:
        return 0
    if job.is_main:
        closing.show()
    return closing.code


def _about_the_disk(error: OSError) -> str | None:
    where = f" ({error.filename})" if error.filename else ""
    if out_of_room(error):
        return f"no space is left on the disk{where}; free some, and give the same command again to go on"
    if error.errno in _CLOSED:
        return f"cannot write there{where}: the folder is read-only for you; name another"
    return None


def _end(sentence: str, code: int, debug: bool, error: BaseException | None = None) -> int:
    if debug:
        traceback.print_exc()
    time.sleep(_patience(error))
    print(f"crosslace: {sentence}", file=sys.stderr)
    return code


def _patience(error: BaseException | None) -> float:
    """Seconds before a process speaks up: of several that fail, one should, and torchrun ends the others with it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0.0
    from ...train.parallel import FirstFailure, PeerLost

    if isinstance(error, PeerLost):
        return 10.0
    return 0.0 if isinstance(error, FirstFailure) or os.environ.get("RANK", "0") == "0" else 5.0
