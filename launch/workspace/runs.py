"""Run folders: one training each, never overwritten."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ...data.errors import UserError

FREE = ("wandb", "tensorboard", "parallel", "store.path")
"""Sections and settings in which a resumed run may differ from the first call; those of the trainer say it themselves
(`train.settings.free`). A store that was moved is the same one: the trainer looks at what it holds."""
LOCK = ".lock"
BESIDE = ("wandb", "tensorboard", "error.log", "sweep.log", ".queued", LOCK)
"""What may stand in a folder before a run is there."""


def saved_settings(run: Path) -> dict[str, Any]:
    """The settings a run was made with; empty for a bare transcoder folder."""
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: it is no YAML; put the run's settings back or name another run") from error
    return saved if isinstance(saved, dict) else {}


def claim(run: Path, settings: dict[str, Any]) -> bool:
    """Make a new run's folder, or take up one that the same settings began; True when it is taken up.

    Never touches what another training made: a run with other settings is refused, with what differs.
    """
    writable(run)
    config = run / "config.yaml"
    if config.is_file():
        differing = differences(saved_settings(run), settings)
        if differing:
            shown = "; ".join(differing[:3]) + ("; ..." if len(differing) > 3 else "")
            raise UserError(
                f"{run} holds a run with other settings ({shown}); name another run, or resume it with those settings"
            )
        write_yaml(config, saved_settings(run) | settings)
        return True
    if run.exists() and any(path.name not in BESIDE for path in run.iterdir()):
        raise UserError(f"{run} holds other files and no run; name another folder for this run")
    run.mkdir(parents=True, exist_ok=True)
    write_yaml(config, settings)
    return False


def refuse_other(path: Path, saved: dict[str, Any] | None, settings: dict[str, Any], overwrite: bool) -> None:
    """Refuse to write over a result that was made with other settings; `saved` is None where nothing is known of it."""
    if overwrite or not path.exists():
        return
    differing = ["its settings are not known"] if saved is None else differences(saved, settings)
    if differing:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(differing[:3])}); "
            "keep it and take those settings, or replace it with overwrite=true"
        )


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """One training at a time in a run's folder; a lock of one that died is free again."""
    with (run / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another training is at work in {run}: wait for it, or name another run") from error
        except OSError:
            pass  # a file system without locks
        yield


def held(run: Path) -> bool:
    """Whether a training is at work in the folder just now."""
    try:
        with (run / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def release(run: Path) -> None:
    """Give up a folder that was claimed just now, where its training was refused before it wrote anything."""
    if {path.name for path in run.iterdir()} <= {"config.yaml", *BESIDE}:
        for name in ("config.yaml", LOCK):
            (run / name).unlink(missing_ok=True)
        if not any(run.iterdir()):
            run.rmdir()


def writable(folder: Path) -> None:
    """Refuse a folder that cannot be written before any work is done."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing}; name a folder that you may write to")


def differences(saved: dict[str, Any], settings: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, as sentences' parts."""
    from ...train.settings import TrainerSettings, changes

    found = []
    for key in settings:
        if prefix + key in FREE or key not in saved:
            continue
        old, new = saved[key], settings[key]
        if key == "trainer" and not prefix:
            found += [f"trainer.{name} was {old[name]}, not {new[name]}" for name in changes(TrainerSettings, old, new)]
        elif isinstance(new, dict) and isinstance(old, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new and f"{prefix}{key}" != "model.device":
            found.append(f"{prefix}{key} was {old}, not {new}")
    return found


def below(folder: Path) -> list[Path]:
    """The folder itself where it is a run, and every run below it; stores and graphs are not searched."""
    found = []
    for path, folders, files in os.walk(folder):
        if "config.yaml" in files and "zarr.json" not in files:
            found.append(Path(path))
        skipped = ("checkpoints", "features", "graphs", "plots", "transcoder", "wandb", "tensorboard", "launcher")
        folders[:] = [] if "zarr.json" in files else sorted(name for name in folders if name not in skipped)
    return found


def state_of(run: Path) -> tuple[str, str]:
    """finished, running, failed, interrupted or begun; and why, or how far it came."""
    if held(run):
        return "running", ""
    log, checkpoints = run / "error.log", run / "checkpoints"
    steps = [int(path.name[5:]) for path in checkpoints.glob("step-*") if path.name[5:].isdigit()]
    if (run / "transcoder" / "transcoder.json").is_file():
        return ("finished", "") if (run / "eval.json").is_file() else ("finished", "not evaluated")
    if log.is_file() and log.stat().st_mtime >= (run / "config.yaml").stat().st_mtime:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "failed", lines[-1][:80] if lines else ""
    return ("interrupted", f"at step {max(steps)}") if steps else ("begun", "")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def write_yaml(path: Path, settings: dict[str, Any]) -> None:
    """Write settings whole or not at all."""
    write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def write_json(path: Path, values: Any) -> None:
    """Write JSON whole or not at all; a figure that is not finite becomes null, as JSON has none."""
    write_text(path, json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """A JSON file, or a sentence about why it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    if isinstance(values, float) and (values != values or values in (float("inf"), float("-inf"))):
        return None
    return values


def slug_of(prompt: str) -> str:
    """A graph's short name from its prompt."""
    words = re.findall(r"[A-Za-z0-9]+", prompt.lower())
    return "-".join(words[-6:]) or "graph"


def transcoder_folder(run: Path) -> Path:
    """The transcoder of a run, or the folder itself where it is one."""
    for folder in (run / "transcoder", run):
        if (folder / "transcoder.json").is_file():
            return folder
    raise UserError(f"{run} holds no transcoder yet; `crosslace train ... run={run}` makes one, and goes on if cut off")
