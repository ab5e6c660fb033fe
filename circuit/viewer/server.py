"""The viewer: a small local server over a run folder, or a folder of runs.

    request --security: who asks?--> api: a route --runs: graphs and features from files--> JSON for static/*.js
                                                  --kept: what people add--------------> view.json beside the graph
                                                  --live: trace, steer, with the model-> a new graph, or next tokens

It listens on this machine alone unless told otherwise, and answers whoever opened the address that it printed
(`security`). It reads runs (`api`), keeps what people add (`kept`), and works on prompts with the run's model (`live`).
"""

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ...data.errors import UserError, check_range
from ..model import ReplacementModel
from .api import STATIC, Api
from .live import Live
from .runs import Runs
from .security import Guard, bracketed, refusal

OpenModel = Callable[[Path], ReplacementModel]


@dataclass(frozen=True)
class ViewSettings:
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone by default."""

    port: int = 8765
    """Port to listen on; 0 takes any that is free."""

    open: bool = True
    """Open the page in the browser."""

    names: list[str] = field(default_factory=list)
    """Other names under which the server may be asked, such as `node17.cluster`."""

    def __post_init__(self) -> None:
        check_range("view.port", self.port, low=0, high=65535)


class Viewer:
    """A server that runs beside other work, as in a notebook: `address` opens it, `stop` ends it."""

    def __init__(
        self, folder: str | Path, settings: ViewSettings = ViewSettings(), open_model: OpenModel | None = None
    ):
        token = secrets.token_urlsafe(24)
        self.live = Live(Runs(_checked(Path(folder))), open_model)
        app = _build(self.live, settings, token)
        self._listener = _listen(settings)
        host, port = self._listener.getsockname()[:2]
        self.address = f"http://{bracketed(host)}:{port}/?token={token}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))

    def run(self) -> None:
        """Serve until interrupted."""
        with self._listener:
            self._server.run(sockets=[self._listener])
        self.live.close()

    def start(self) -> "Viewer":
        """Serve in a thread."""
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def stop(self) -> None:
        """End the server."""
        self._server.should_exit = True


def serve(
    folder: str | Path,
    settings: ViewSettings = ViewSettings(),
    announce: Callable[[str], None] | None = None,
    open_model: OpenModel | None = None,
) -> None:
    """Serve until interrupted; `announce` is told the page's address once it can be opened, and `open_model` opens the
    model of a run's folder."""
    viewer = Viewer(folder, settings, open_model)
    # The socket listens already: a browser that is quicker than the server waits a moment.
    if announce is not None:
        announce(viewer.address)
    if settings.open:
        webbrowser.open(viewer.address)
    viewer.run()


def build_app(folder: str | Path, settings: ViewSettings = ViewSettings(), token: str | None = None) -> ASGIApp:
    """The application over a run folder or a folder of runs; `token` is what its address must carry."""
    return _build(Live(Runs(_checked(Path(folder)))), settings, token or secrets.token_urlsafe(24))


def _checked(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name a run, or a folder of runs")
    if not Runs(root).all():
        raise UserError(f"{root} holds no run: no transcoder/, features/ or graphs/ in it or in its folders")
    return root


def _build(live: Live, settings: ViewSettings, token: str) -> ASGIApp:
    routes = [
        Route("/", index),
        *Api(live.found).routes(),
        *live.routes(),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: not_there, Exception: defect})
    return Guard(app, token, settings.host, settings.names)


async def index(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


async def not_there(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return refusal(status, "there is no such page" if status == 404 else "this is not how the page is asked")


async def defect(request: Request, error: Exception) -> Response:
    """A defect of ours: Starlette logs the traceback, the page gets a sentence."""
    return refusal(500, f"the viewer failed ({type(error).__name__}: {str(error)[:300]})")


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
