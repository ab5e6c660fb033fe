"""How a command that fails ends: one sentence, an exit code, and the traceback of what is no mistake of the user's.

Exit codes: 0 done; 1 a defect of ours, or a part of a sweep that failed; 2 bad input or circumstances; 75 interrupted
by a signal such as a cluster's SIGTERM, with a checkpoint to go on from; 130 stopped by Ctrl-C.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...conf import VERBS
from ...data.errors import UserError, out_of_room

_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class Failure(NamedTuple):
    """What is said of an exception, and the exit code."""

    sentence: str
    code: int
    traced: bool
    """Whether its traceback is kept."""


def failure_of(error: BaseException, words: Sequence[str]) -> Failure:
    """Judge an exception."""
    first = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, UserError):
        return Failure(str(error), 2, False)
    if isinstance(error, KeyboardInterrupt):
        return Failure("stopped; what was finished is kept, and the same command goes on from there", 130, False)
    if is_out_of_memory(error):
        return Failure(f"out of memory: {what_helps(words)}", 2, True)
    if isinstance(error, OSError) and (sentence := about_the_disk(error)) is not None:
        return Failure(sentence, 2, False)
    if isinstance(error, ImportError):
        return Failure(f"a package that this needs is not installed or cannot be loaded: {first}", 2, True)
    return Failure(f"this is a defect of ours, {type(error).__name__}: {first}", 1, True)


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator, the CPU's, Python's own, or a mapping that finds no room."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)


def what_helps(words: Sequence[str]) -> str:
    """The settings that need less memory, and what counts it beforehand."""
    verb = words[0] if words else ""
    helps = VERBS[verb].smaller if verb in VERBS else ""
    planned = "; `crosslace train --plan` with the same settings says beforehand what a training takes"
    return (helps or "use a smaller model, or model.dtype=bfloat16") + planned


def about_the_disk(error: OSError) -> str | None:
    """A disk that is full or closed, in a sentence."""
    where = f" ({error.filename})" if error.filename else ""
    if out_of_room(error):
        return f"no space is left on the disk{where}; free some, and give the same command again to go on"
    if error.errno in _CLOSED:
        return f"cannot write there{where}: the folder is read-only for you; name another"
    return None


def keep_traceback(error: BaseException, words: Sequence[str]) -> str:
    """Append the traceback to the run's error.log, or print it where there is no run; where it is, for the sentence."""
    from ..workspace import append_error

    text = "".join(traceback.format_exception(error))
    run = next((word.partition("=")[2].strip("'\"") for word in words if word.startswith("run=")), "")
    if run and Path(run).is_dir() and (path := append_error(Path(run), words, text)) is not None:
        return f"{path} has the traceback"
    print(text, file=sys.stderr, end="")
    return "its traceback stands above"


def patience(error: BaseException) -> float:
    """Seconds before a process speaks up: of several that fail, one should, and torchrun ends the others with it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0.0
    from ...train.parallel import FirstFailure, PeerLost

    if isinstance(error, PeerLost):
        return 10.0
    return 0.0 if isinstance(error, FirstFailure) or os.environ.get("RANK", "0") == "0" else 5.0
