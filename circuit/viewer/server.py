"""The viewer: a small local server over a run folder, or a folder of runs. It reads, and changes nothing.

It listens on this machine alone unless told otherwise, answers only requests that were addressed to it (a page on the
web cannot reach it through a name of its own), and its pages run no script but their own.
"""

import socket
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...data.errors import UserError, check_range
from ..features import DashboardReader, Labels, labels_path
from ..graph import Graph
from .payload import graph_payload
from .picture import render_graph_svg
from .runs import Run, find_runs

STATIC = Path(__file__).parent / "static"
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class ViewSettings:
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone by default. Whoever reaches another address can read the run."""

    port: int = 8765
    """Port to listen on; 0 takes any that is free."""

    open: bool = True
    """Open the page in the browser."""

    def __post_init__(self) -> None:
        check_range("view.port", self.port, low=0, high=65535)


def serve(
    folder: str | Path, settings: ViewSettings = ViewSettings(), announce: Callable[[str], None] | None = None
) -> None:
    """Serve until interrupted; `announce` is told the page's address once it can be opened."""
    app = build_app(folder, settings.host)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))

    def ready() -> None:
        if announce is not None:
            announce(address)
        if settings.open:
            webbrowser.open(address)

    with listener:
        # The socket listens already: a browser that is quicker than the server waits a moment.
        ready()
        server.run(sockets=[listener])


def _listen(settings: ViewSettings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise UserError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}); "
            "choose another with view.port=..., or view.port=0 for any that is free"
        ) from error
    return listener


def build_app(folder: str | Path, host: str = "127.0.0.1") -> ASGIApp:
    """The application over a run folder or a folder of runs."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name a run, or a folder of runs")
    if not find_runs(root):
        raise UserError(f"{root} holds no run: no transcoder/, features/ or graphs/ in it or in its folders")
    pages = Pages(root)
    routes = [
        Route("/", pages.index),
        Route("/api/runs", pages.answer(pages.runs)),
        Route("/api/graph", pages.answer(pages.graph)),
        Route("/api/feature", pages.answer(pages.feature)),
        Route("/api/picture", pages.answer(pages.picture)),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Guard(Starlette(routes=routes), {*LOCAL_NAMES, f"[{host}]" if ":" in host else host})


class Guard:
    """Answers only requests that name this server as their host, and sets the headers that hold pages to their own."""

    def __init__(self, app: ASGIApp, names: set[str]):
        self.app, self.names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        named = Headers(scope=scope).get("host", "").lower()
        name = named.rpartition(":")[0] if named.rpartition(":")[2].isdigit() else named
        if name in self.names:
            await self.app(scope, receive, guarded)
        else:
            refusal = PlainTextResponse("this server answers to its own address alone", status_code=421)
            await refusal(scope, receive, guarded)


class Pages:
    """What each address answers. Work on tensors happens in a thread, so that the server stays responsive."""

    def __init__(self, root: Path):
        self.root = root

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    def answer(self, work: Callable[[Request], Response]) -> Callable:
        async def endpoint(request: Request) -> Response:
            try:
                return await run_in_threadpool(work, request)
            except UserError as error:
                return JSONResponse({"error": str(error)}, status_code=404)

        return endpoint

    def runs(self, request: Request) -> Response:
        runs = find_runs(self.root)
        return JSONResponse({"root": self.root.resolve().name, "runs": [run.summary() for run in runs.values()]})

    def graph(self, request: Request) -> Response:
        run, folder = self._graph(request)
        return JSONResponse(
            _payload(*_state(run, folder), _share(request, "node", 0.95), _share(request, "edge", 0.98))
        )

    def picture(self, request: Request) -> Response:
        run, folder = self._graph(request)
        theme = request.query_params.get("theme", "auto")
        return Response(_picture(*_state(run, folder), theme), media_type="image/svg+xml")

    def feature(self, request: Request) -> Response:
        run = self._run(request)
        layer, feature = _whole(request, "layer"), _whole(request, "feature")
        reader = DashboardReader(run.folder / "features")
        label = Labels.load(run.folder).label(layer, feature)
        return JSONResponse(
            {
                "record": reader.record(layer, feature),
                "label": label.text if label else "",
                "source": label.source if label else "",
                "features": reader.features,
            }
        )

    def _run(self, request: Request) -> Run:
        name = request.query_params.get("run", "")
        run = find_runs(self.root).get(name)
        if run is None:
            raise UserError(f"there is no run {name!r} here")
        return run

    def _graph(self, request: Request) -> tuple[Run, Path]:
        run, slug = self._run(request), request.query_params.get("slug", "")
        if slug not in run.graphs:
            raise UserError(f"run {run.name!r} has no graph {slug!r}")
        return run, run.graphs[slug]


State = tuple[Path, int, Path, int]
"""A graph and its labels, and when each was written: what an answer depends on."""


def _state(run: Run, folder: Path) -> State:
    labels = labels_path(run.folder)
    written = labels.stat().st_mtime_ns if labels.exists() else 0
    return folder, (folder / "graph.json").stat().st_mtime_ns, labels, written


@lru_cache(maxsize=4)
def _load(folder: Path, written: int, labels: Path, labels_written: int) -> tuple[Graph, Labels]:
    return Graph.load(folder), Labels.load(labels)


@lru_cache(maxsize=16)
def _payload(folder: Path, written: int, labels: Path, labels_written: int, node: float, edge: float) -> dict[str, Any]:
    graph, names = _load(folder, written, labels, labels_written)
    return graph_payload(graph, names, node, edge)


@lru_cache(maxsize=16)
def _picture(folder: Path, written: int, labels: Path, labels_written: int, theme: str) -> str:
    graph, names = _load(folder, written, labels, labels_written)
    return render_graph_svg(graph, names, theme=theme)


def _share(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    try:
        share = default if text is None else float(text)
    except ValueError as error:
        raise UserError(f"{name}={text} is not a number") from error
    if not 0 <= share <= 1:
        raise UserError(f"{name}={text} takes a number from 0 to 1")
    return share


def _whole(request: Request, name: str) -> int:
    text = request.query_params.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text} is not a whole number")
    return int(text)
