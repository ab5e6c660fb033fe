"""What there is to see under a folder. Names from a request are looked up in this list, never joined to a path."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEPTH = 3  # runs/demo/clt, seen from a folder above


@dataclass
class Run:
    """One run folder: its graphs and whether its features have dashboards."""

    name: str
    folder: Path
    graphs: dict[str, Path] = field(default_factory=dict)

    @property
    def features(self) -> bool:
        return (self.folder / "features" / "index.json.gz").is_file()

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": _read(self.folder / "transcoder" / "transcoder.json").get("kind", ""),
            "features": self.features,
            "graphs": [_graph_summary(slug, folder) for slug, folder in sorted(self.graphs.items())],
        }


def find_runs(root: Path) -> dict[str, Run]:
    """Every run at or below `root`, by its name relative to it; a link that leads out of `root` is not followed."""
    root = root.resolve()
    runs = {}
    for folder in _folders(root, root, DEPTH):
        graphs = {
            path.name: path
            for path in _inside(root, folder / "graphs")
            if (path / "graph.json").is_file() and (path / "graph.safetensors").is_file()
        }
        if graphs or (folder / "transcoder").is_dir() or (folder / "features").is_dir():
            name = folder.relative_to(root).as_posix() if folder != root else root.name
            runs[name] = Run(name, folder, graphs)
    return runs


def _folders(root: Path, folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth and not (folder / "transcoder").is_dir() and not (folder / "graphs").is_dir():
        for inner in _inside(root, folder):
            yield from _folders(root, inner, depth - 1)


def _inside(root: Path, folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.resolve().is_relative_to(root))


def _graph_summary(slug: str, folder: Path) -> dict[str, Any]:
    """From graph.json alone: the list of graphs must not load their edges."""
    header = _read(folder / "graph.json")
    metadata = header.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    prompt = metadata.get("prompt") or "".join(map(str, header.get("token_strings", [])))
    return {"slug": slug, "prompt": str(prompt), "scores": header.get("scores", {})}


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file; one that is missing or damaged says nothing here, and is reported when it is opened."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
