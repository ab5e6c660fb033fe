"""`sweep.stack=true`: combinations that share store and batch train side by side, on one pass over the data.

The batch of each step is fetched once; the trainings take it in turn. None of them knows of the others: each has its
own weights, moments, counters, random numbers, metrics and checkpoints, and becomes the run that it would be alone.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...conf import SOURCES
from ...data.errors import UserError
from ..verbs import train
from ..workspace import Job, open_stores, recorded


def groups(parts: dict[Path, Job], folders: Sequence[Path]) -> list[list[Path]]:
    """Folders whose trainings can go together: the same rows, in the same batches, on one device."""
    found: dict[str, list[Path]] = {}
    shared: dict[str, Any]
    for folder in folders:
        values = parts[folder].config.values
        shared = {"path": values["store"]["path"]}
        if values["store"]["mode"] != "disk":
            shared = {name: values[name] for name in ("store", *SOURCES)}
        alone = str(folder) if values["trainer"]["on_divergence"] == "rewind" else None  # it may go back in the rows
        one = {
            **shared,
            "alone": alone,
            "batch": values["trainer"]["batch"],
            "device": values["trainer"]["device"],
            "at": at(folder),
        }
        found.setdefault(json.dumps(one, sort_keys=True, default=str), []).append(folder)
    return list(found.values())


def at(folder: Path) -> int:
    """The step from which a training goes on."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def train_together(parts: dict[Path, Job], folders: Sequence[Path]) -> dict[Path, Exception]:
    """Train all of them; what ended some of them. One that fails leaves the others alone."""
    from ...data.store import SharedStore
    from ...train.parallel import SINGLE
    from ...train.run import StopRequest

    first = parts[folders[0]]
    if first.process.count > 1:
        raise UserError("stack=true trains in one process; start the sweep without torchrun")
    failed: dict[Path, Exception] = {}
    running: dict[Path, tuple[ExitStack, Any]] = {}

    def end(folder: Path, error: Exception | None) -> None:
        """Close one training's files, with the error that ended it."""
        kept, _ = running.pop(folder)
        try:
            kept.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as explained:
            error = explained
        if error is not None:
            failed[folder] = error

    with open_stores(first) as (store, held_out), StopRequest() as stop, ExitStack() as all_of_them:
        shared = SharedStore(store.source)
        for folder in folders:
            part, kept = parts[folder], all_of_them.enter_context(ExitStack())
            try:
                kept.enter_context(recorded(str(folder), ["train", *part.words], share=1 / len(folders)))
                trainer = kept.enter_context(train.prepared(part, folder, (shared, held_out), SINGLE))
                running[folder] = kept, trainer.steps(stop) if trainer is not None else iter(())
            except Exception as error:
                running[folder] = kept, iter(())
                end(folder, error)
        while running:
            for folder, (_, steps) in list(running.items()):
                try:
                    next(steps)
                except StopIteration:
                    end(folder, None)
                except Exception as error:
                    end(folder, error)
        if stop.signalled:
            raise KeyboardInterrupt
    return failed
