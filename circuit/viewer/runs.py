"""What there is to see under a folder. Names from a request are looked up in this list, never joined to a path, and
what is opened must lie inside the folder once links are resolved.

The folders are walked when the list is asked for; a run that is known is looked at alone.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...data.errors import UserError
from ...train.snapshot import checkpoint_steps

DEPTH = 3  # runs/demo/clt, seen from a folder above
FRESH = 2.0  # seconds for which a walk holds


@dataclass(frozen=True)
class Run:
    """One run folder: its graphs and whether its features have dashboards."""

    name: str
    folder: Path
    root: Path

    @property
    def features(self) -> Path | None:
        """The folder of its dashboards, if there is one; no file in it may be a link that leads out."""
        folder = self.folder / "features"
        if not (folder / "index.json.gz").is_file() or not inside(self.root, folder):
            return None
        return folder if all(inside(self.root, path) for path in folder.iterdir()) else None

    @property
    def has_transcoder(self) -> bool:
        """Whether prompts can be traced."""
        path = self.folder / "transcoder" / "transcoder.json"
        return path.is_file() and inside(self.root, path)

    @property
    def steps(self) -> list[int]:
        """Checkpoints that can be looked through."""
        there = self.has_transcoder and inside(self.root, self.folder / "checkpoints")
        return checkpoint_steps(self.folder) if there else []

    @property
    def store(self) -> str | None:
        """The store that its settings name: a folder or a URL."""
        try:
            settings = yaml.safe_load((self.folder / "config.yaml").read_text("utf-8"))
            return str(settings["store"]["path"]) or None
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            return None

    def graphs(self) -> dict[str, Path]:
        """Its graphs by name."""
        return {
            path.name: path for path in inner_folders(self.root, self.folder / "graphs") if is_graph(self.root, path)
        }

    def summary(self) -> dict[str, Any]:
        """The run and its graphs, as the list shows them."""
        described = self.folder / "transcoder" / "transcoder.json"
        return {
            "name": self.name,
            "kind": _read(described).get("kind", "") if self.has_transcoder else "",
            "features": self.features is not None,
            "live": self.has_transcoder,
            "graphs": [_graph_summary(slug, folder) for slug, folder in sorted(self.graphs().items())],
        }


class Runs:
    """Every run at or below a folder, by its name relative to it."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._found: dict[str, Run] = {}
        self._walked = -FRESH

    def all(self) -> dict[str, Run]:
        """The runs, found anew where the last walk is older than a moment."""
        if time.monotonic() - self._walked >= FRESH:
            self._found = {run.name: run for run in _walk(self.root, self.root, DEPTH)}
            self._walked = time.monotonic()
        return self._found

    def run(self, name: str) -> Run:
        """One run. The folders are walked only where it is not known yet."""
        run = self._found.get(name)
        if run is None or not _is_run(run.folder):
            run = self.all().get(name)
        if run is None:
            raise UserError(f"there is no run {name!r} here")
        return run

    def graph(self, name: str, slug: str) -> tuple[Run, Path]:
        """A run and the folder of one of its graphs."""
        run = self.run(name)
        folder = run.graphs().get(slug)
        if folder is None:
            raise UserError(f"run {name!r} has no graph {slug!r}")
        return run, folder


def traced_steps(root: Path, graph: Path) -> dict[int, Path]:
    """Traces of a graph's prompt with the run's checkpoints, kept beside it; those of an earlier graph do not count."""
    written = (graph / "graph.json").stat().st_mtime_ns
    return {
        int(path.name[5:]): path
        for path in inner_folders(root, graph / "steps")
        if path.name[5:].isdecimal() and is_graph(root, path) and (path / "graph.json").stat().st_mtime_ns >= written
    }


def inside(root: Path, path: Path) -> bool:
    """Whether a file or folder lies inside the root once links are resolved."""
    return path.resolve().is_relative_to(root)


def is_graph(root: Path, folder: Path) -> bool:
    """Whether a folder holds a graph whose files lie inside the root."""
    files = [folder / "graph.json", folder / "graph.safetensors"]
    more = [folder / "view.json", folder / "heads.json"]
    return all(file.is_file() for file in files) and all(inside(root, file) for file in (*files, *more))


def inner_folders(root: Path, folder: Path) -> list[Path]:
    """The folders in a folder that lie inside the root."""
    if not folder.is_dir() or not inside(root, folder):
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and inside(root, path))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("transcoder", "features", "graphs"))


def _walk(root: Path, folder: Path, depth: int) -> Iterator[Run]:
    if (folder / "zarr.json").is_file():  # a store: thousands of folders, and no run among them
        return
    if _is_run(folder):
        yield Run(folder.relative_to(root).as_posix() if folder != root else root.name, folder, root)
        return
    if depth:
        for inner in inner_folders(root, folder):
            yield from _walk(root, inner, depth - 1)


def _graph_summary(slug: str, folder: Path) -> dict[str, Any]:
    """From graph.json alone: the list of graphs must not load their edges."""
    header = _read(folder / "graph.json")
    metadata = header.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    prompt = metadata.get("prompt") or "".join(map(str, header.get("token_strings", [])))
    return {
        "slug": slug,
        "prompt": str(prompt),
        "scores": header.get("scores", {}),
        "made": (folder / "graph.json").stat().st_mtime,
        "kept": (folder / "view.json").is_file(),
    }


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file; one that is missing or damaged says nothing here, and is reported when it is opened."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
