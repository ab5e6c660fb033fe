"""Neuronpedia graph JSON, both ways."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..graph import Graph
    from ..labels import Labels


def graph_to_neuronpedia(graph: "Graph", slug: str, labels: "Labels | None" = None, **options: Any) -> dict[str, Any]:
    raise NotImplementedError


def write_neuronpedia(
    graph: "Graph", path: str | Path, slug: str | None = None, labels: "Labels | None" = None, **options: Any
) -> Path:
    raise NotImplementedError


def read_neuronpedia(path: str | Path) -> "Graph":
    raise NotImplementedError
