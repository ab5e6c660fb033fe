"""What each address answers about runs, graphs and features, and how edits are kept."""

import json
import mimetypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...data.errors import UserError
from ..across import load_held
from ..attribution import load_heads
from ..features import DashboardReader, Labels, labels_path
from ..graph import Graph, plain_label
from ..replacement import MODES
from .kept import edit_kept, read_kept
from .payload import MOST_FEATURES, MOST_LINKS, graph_payload
from .picture import render_graph_svg
from .runs import Run, Runs, inside, traced_steps
from .security import PICTURE_POLICY, json_object, refusal

STATIC = Path(__file__).parent / "static"
FEATURES_LIMIT, LINKS_LIMIT = 5_000, 200_000
mimetypes.add_type("text/javascript", ".js")  # some systems say otherwise, and browsers then run nothing


class Api:
    """The reading half of the viewer, and the edits that are kept."""

    def __init__(self, runs: Runs):
        self.found = runs

    def routes(self) -> list[Route]:
        return [
            Route("/api/runs", answer(self.runs)),
            Route("/api/graph", answer(self.graph)),
            Route("/api/kept", answer(self.kept)),
            Route("/api/kept", answer(self.edit), methods=["POST"]),
            Route("/api/feature", answer(self.feature)),
            Route("/api/labels", answer(self.labels)),
            Route("/api/picture", answer(self.picture)),
            Route("/api/neuronpedia", answer(self.neuronpedia)),
            Route("/api/neuronpedia", answer(self.take_qparams), methods=["POST"]),
        ]

    def runs(self, ask: "Ask") -> Response:
        return JSONResponse(
            {"root": self.found.root.name, "runs": [run.summary() for run in self.found.all().values()]}
        )

    def graph(self, ask: "Ask") -> Response:
        run, folder, shown = looked_at(self.found, ask)
        sizes = (
            ask.whole("features", MOST_FEATURES, FEATURES_LIMIT),
            ask.whole("links", MOST_LINKS, LINKS_LIMIT),
        )
        payload = _payload(*_state(run, shown), ask.share("node", 0.95), ask.share("edge", 0.98), *sizes)
        more = {
            "kept": read_kept(folder),
            "live": run.has_transcoder,
            "modes": list(MODES),
            "steps": run.steps,
            "traced": sorted(traced_steps(run.root, folder)),
            "attention": load_heads(shown),
            "seeds": load_held(shown),
        }
        text = payload[:-1] + "," + json.dumps(more, ensure_ascii=False)[1:]
        return Response(text.encode("utf-8", "replace"), media_type="application/json")

    def kept(self, ask: "Ask") -> Response:
        _, folder = self.found.graph(ask.text("run"), ask.text("slug"))
        return JSONResponse(read_kept(folder))

    def edit(self, ask: "Ask") -> Response:
        run, folder = self.found.graph(ask.text("run"), ask.text("slug"))
        own = inside(run.root, labels_path(run.folder))
        if not own:
            raise UserError("the labels of this run lie outside the folder that is shown")
        return JSONResponse(edit_kept(folder, run.folder, ask.body.get("changes"), ask.body.get("start")))

    def feature(self, ask: "Ask") -> Response:
        run = self.found.run(ask.text("run"))
        layer, feature = ask.whole("layer"), ask.whole("feature")
        if run.features is None:
            raise UserError(f"run {run.name!r} has no feature dashboards; `crosslace features run=...` writes them")
        return JSONResponse(feature_answer(run, layer, feature))

    def labels(self, ask: "Ask") -> Response:
        """Labels that hold a text, each with its features and how strongly they fire at most."""
        run = self.found.run(ask.text("run"))
        if run.features is None:
            raise UserError(f"run {run.name!r} has no feature dashboards; `crosslace features run=...` writes them")
        return JSONResponse(labelled(run, ask.text("q").strip().lower()))

    def picture(self, ask: "Ask") -> Response:
        run, folder = self.found.graph(ask.text("run"), ask.text("slug"))
        picture = _picture(*_state(run, folder), ask.text("theme", "auto"))
        return Response(picture, media_type="image/svg+xml", headers={"Content-Security-Policy": PICTURE_POLICY})

    def neuronpedia(self, ask: "Ask") -> Response:
        from .exchange import with_qparams

        run, folder, shown = looked_at(self.found, ask)
        data = with_qparams(*_load(*_state(run, shown)), read_kept(folder), folder.name)
        name = f"{folder.name}.json"
        return JSONResponse(data, headers={"Content-Disposition": f'attachment; filename="{ascii_name(name)}"'})

    def take_qparams(self, ask: "Ask") -> Response:
        from .exchange import changes_of

        run, folder = self.found.graph(ask.text("run"), ask.text("slug"))
        graph, _ = _load(*_state(run, folder))
        return JSONResponse(edit_kept(folder, run.folder, changes_of(ask.body.get("qParams"), graph)))


def looked_at(found: Runs, ask: "Ask") -> tuple[Run, Path, Path]:
    """The run, the graph's folder, and the folder of what is shown: the graph, or its prompt at a checkpoint."""
    run, folder = found.graph(ask.text("run"), ask.text("slug"))
    if not (step := ask.optional("step")):
        return run, folder, folder
    shown = traced_steps(run.root, folder).get(step)
    if shown is None:
        raise UserError(f"the prompt has not been traced at step {step} yet")
    return run, folder, shown


def feature_answer(run: Run, layer: int, feature: int) -> dict[str, Any]:
    """A feature's dashboard and what it is called; its neighbours with their labels."""
    reader, labels = DashboardReader(run.folder / "features"), Labels.load(run.folder)
    label, record = labels.label(layer, feature), reader.record(layer, feature)
    for side in ("inputs", "outputs"):
        record[side] = [[*near, labels.get(*near[:2]) or ""] for near in record.get(side, [])]
    return {
        "record": record,
        "label": label.text if label else "",
        "source": label.source if label else "",
        "features": reader.features,
    }


def labelled(run: Run, text: str, most: int = 12) -> list[dict[str, Any]]:
    """The features of each label that holds a text, the shortest labels first."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for place, label in Labels.load(run.folder).items():
        if text and text in label.text.lower():
            groups.setdefault(plain_label(label.text), []).append(place)
    reader = DashboardReader(run.folder / "features")
    return [
        {"label": name, "features": [[*place, reader.record(*place)["act_max"]] for place in sorted(groups[name])[:40]]}
        for name in sorted(groups, key=lambda name: (len(name), name))[:most]
    ]


class Ask:
    """What a request asks for, each value checked."""

    def __init__(self, request: Request, body: dict[str, Any]):
        self.query, self.body = request.query_params, body

    def text(self, name: str, default: str = "", most: int = 500) -> str:
        value = self.query.get(name, self.body.get(name, default))
        if not isinstance(value, str) or len(value) > most:
            raise UserError(f"{name} takes a text of at most {most} characters")
        return value

    def whole(self, name: str, default: int | None = None, most: int = 10**9) -> int:
        text = str(self.query.get(name, self.body.get(name, "" if default is None else default)))
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise UserError(f"{name}={text[:80]} is not a whole number")
        return min(int(text), most)

    def optional(self, name: str) -> int | None:
        """A whole number, or None where none is given."""
        return self.whole(name) if self.query.get(name, self.body.get(name, "")) not in ("", None) else None

    def share(self, name: str, default: float) -> float:
        text = self.query.get(name)
        try:
            share = default if text is None else float(text)
        except ValueError as error:
            raise UserError(f"{name}={text} is not a number") from error
        if not 0 <= share <= 1:
            raise UserError(f"{name}={text} takes a number from 0 to 1")
        return share


def answer(work: Callable[[Ask], Response]) -> Callable:
    """An endpoint. Work happens in a thread, so that the server stays responsive; whatever goes wrong is a sentence."""

    async def endpoint(request: Request) -> Response:
        body = json_object(await request.body()) if request.method == "POST" else {}
        if body is None:
            return refusal(400, "the request holds no JSON object")
        try:
            return await run_in_threadpool(work, Ask(request, body))
        except UserError as error:
            return refusal(404 if request.method == "GET" else 400, str(error))

    return endpoint


def ascii_name(name: str) -> str:
    """A file's name as a header may carry it."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)


State = tuple[Path, int, Path, int]
"""A graph and its labels, and when each was written: what an answer depends on."""


def _state(run: Run, folder: Path) -> State:
    labels = labels_path(run.folder)
    if not inside(run.root, labels):
        raise UserError("the labels of this run lie outside the folder that is shown")
    written = labels.stat().st_mtime_ns if labels.exists() else 0
    return folder, (folder / "graph.json").stat().st_mtime_ns, labels, written


def load_graph(run: Run, folder: Path) -> tuple[Graph, Labels]:
    """A graph and the run's labels, as they are now."""
    return _load(*_state(run, folder))


@lru_cache(maxsize=2)
def _graph(folder: Path, written: int) -> Graph:
    return Graph.load(folder)


def _load(folder: Path, written: int, labels: Path, labels_written: int) -> tuple[Graph, Labels]:
    return _graph(folder, written), Labels.load(labels)


@lru_cache(maxsize=8)
def _payload(
    folder: Path, written: int, labels: Path, labels_written: int, node: float, edge: float, features: int, links: int
) -> str:
    graph, names = _load(folder, written, labels, labels_written)
    return json.dumps(graph_payload(graph, names, node, edge, features, links), ensure_ascii=False)


@lru_cache(maxsize=16)
def _picture(folder: Path, written: int, labels: Path, labels_written: int, theme: str) -> str:
    graph, names = _load(folder, written, labels, labels_written)
    return render_graph_svg(graph, names, theme=theme)
