"""One graph's page as one file: it opens from disk or in a notebook, asks nobody anything, and can be handed on.

The page's modules travel in it as data, under the names by which they import each other; what the server would have
answered lies beside them.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from ..across import load_held
from ..attribution import load_heads
from ..features import DashboardReader, Labels
from ..graph import Graph
from .api import STATIC, feature_answer
from .kept import empty, read_kept
from .payload import graph_payload
from .runs import Run

MOST_DASHBOARDS = 150
POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:"
IMPORT = re.compile(r'(?<=from ")\.{1,2}/[^"]+(?=")')
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title} · Crosslace</title>
<link rel="icon" href="data:,"><style>{style}</style></head>
<body><div id="app"></div><script type="application/json" id="crosslace-data">{data}</script>
<script type="importmap">{imports}</script><script type="module">import "crosslace/app.js";</script></body></html>
"""


def save_page(run: Run, slug: str, path: str | Path) -> Path:
    """Write the page of one of a run's graphs, with what is kept of it and the dashboards of its strongest features."""
    folder = run.graphs().get(slug)
    if folder is None:
        known = ", ".join(run.graphs()) or "none"
        raise UserError(f"run {run.name!r} has no graph {slug!r}; it has {known}")
    graph, path = Graph.load(folder), Path(path)
    more = {"kept": read_kept(folder), "attention": load_heads(folder), "seeds": load_held(folder)}
    payload = graph_payload(graph, Labels.load(run.folder)) | more
    page = page_of(payload, run.name, slug, _dashboards(run, payload))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(page, "utf-8")
    aside.replace(path)
    return path


def page_of(payload: dict[str, Any], run: str, slug: str, features: dict[str, Any] | None = None) -> str:
    """The page as text. Whatever a graph holds stays data: no `<` of it reaches the page as one."""
    graph = {"kept": empty()} | payload | {"live": False}
    data = json.dumps({"run": run, "slug": slug, "graph": graph, "features": features or {}}, ensure_ascii=True)
    return PAGE.format(
        policy=POLICY,
        title=html.escape(slug),
        style=(STATIC / "style.css").read_text("utf-8"),
        data=data.replace("<", "\\u003c"),
        imports=json.dumps({"imports": _modules()}),
    )


class ShownGraph:
    """A graph's page in a notebook's output."""

    def __init__(self, page: str, height: int):
        self.page, self.height = page, height

    def _repr_html_(self) -> str:
        frame = 'sandbox="allow-scripts allow-downloads" style="width: 100%; border: 0; height:'
        return f'<iframe srcdoc="{html.escape(self.page)}" {frame} {self.height}px"></iframe>'


def show_graph(graph: Graph, labels: Labels | None = None, height: int = 900) -> ShownGraph:
    """The graph's page, for a notebook to show."""
    payload = graph_payload(graph, labels)
    return ShownGraph(page_of(payload, "", str(payload["prompt"])[-60:].strip() or "graph"), height)


def _modules() -> dict[str, str]:
    """Each of our modules as data, by the name that the others import it by."""
    found = {}
    for path in sorted(STATIC.rglob("*.js")):
        name = path.relative_to(STATIC).as_posix()
        text = IMPORT.sub(lambda match, here=path: _absolute(here, match[0]), path.read_text("utf-8"))
        found[f"crosslace/{name}"] = f"data:text/javascript;base64,{base64.b64encode(text.encode()).decode()}"
    return found


def _absolute(here: Path, name: str) -> str:
    return f"crosslace/{(here.parent / name).resolve().relative_to(STATIC.resolve()).as_posix()}"


def _dashboards(run: Run, payload: dict[str, Any]) -> dict[str, Any]:
    """The dashboards of the strongest features, as the server would answer."""
    if run.features is None:
        return {}
    reader = DashboardReader(run.folder / "features")
    features = [node for node in payload["nodes"] if node["kind"] == "feature"]
    features.sort(key=lambda node: -node["influence"])
    places = list(dict.fromkeys((node["layer"], node["index"]) for node in features))[:MOST_DASHBOARDS]
    there = [(l, i) for l, i in places if l < len(reader.features) and i < reader.features[l]]
    return {f"{layer}/{index}": feature_answer(run, layer, index) for layer, index in there}
