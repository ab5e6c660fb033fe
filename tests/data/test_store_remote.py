"""A store on a server that answers each request after 50 ms, as one across a country does."""

import asyncio
import importlib.util
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.layout.place import Place
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.writer import write_store
from fsspec.asyn import AsyncFileSystem

LATENCY = 0.05
ROWS, L, D = 3 * 4096, 6, 128


class Objects(ThreadingHTTPServer):
    """Files of a folder, whole or in ranges."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked = folder, []


class Answer(BaseHTTPRequestHandler):
    server: Objects

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(LATENCY)
        path, asked = self.server.folder / self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append(self.path)
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1 if last else None] if first else data[-int(last) :]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


class Plain(AsyncFileSystem):
    """The least of a client: ranges over HTTP, one connection each."""

    protocol = "plain"
    cachable = False

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        host, _, name = str(self._strip_protocol(path)).partition("/")
        reader, writer = await asyncio.open_connection(*host.split(":"))
        ranged = ""
        if start is not None and start < 0:
            ranged = f"Range: bytes={start}"
        elif start is not None:
            ranged = f"Range: bytes={start}-{'' if end is None else end - 1}"
        writer.write(f"GET /{name} HTTP/1.0\r\n{ranged}\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        if b" 404 " in head.split(b"\r\n")[0]:
            raise FileNotFoundError(path)
        return body


@pytest.fixture(scope="module")
def content() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {site: torch.randn(ROWS, L, D, generator=generator).half() for site in ("resid", "mlp_out")}


@pytest.fixture(scope="module")
def server(content, tmp_path_factory) -> Iterator[Objects]:
    folder = tmp_path_factory.mktemp("served")
    layout = StoreLayout(("resid", "mlp_out"), tuple(range(L)), D, "float16", shard_rows=1024)
    number = torch.arange(ROWS)
    write_store(folder / "s", content, number, number, number, layout, shuffle_rows=4096)
    objects = Objects(folder)
    threading.Thread(target=objects.serve_forever, daemon=True).start()
    yield objects
    objects.shutdown()


@pytest.mark.parametrize("protocol", ["plain", "http"])
def test_a_batch_of_4096_rows_is_there_in_a_second(server, content, protocol, monkeypatch):
    """Two round trips, the indices of its shards and then its blocks; and only of what is asked for."""
    if protocol == "http" and importlib.util.find_spec("aiohttp") is None:
        pytest.skip("fsspec's http needs aiohttp")
    fsspec.register_implementation("plain", Plain, clobber=True)
    url = f"{protocol}://127.0.0.1:{server.server_address[1]}/s"
    rounds, fill = [0], Place.fill

    def counted(self: Place, reads: Any) -> None:
        rounds[0] += bool(reads)
        fill(self, reads)

    monkeypatch.setattr(Place, "fill", counted)
    seconds = []
    for step in range(2):
        store = ActivationStore.open(url)  # nothing is known of its shards yet
        server.asked.clear()
        rounds[0] = 0
        begun = time.perf_counter()
        batch = store.batch(0, step, 4096)
        seconds.append(time.perf_counter() - begun)
        assert rounds[0] == 2
        assert not any(f"/{name}/" in path for path in server.asked for name in ("token", "position", "document"))
        assert torch.equal(batch.resid, content["resid"][batch.token.long()])
        assert rounds[0] == 4  # the column has come now
    assert min(seconds) < 1, seconds
    narrow = ActivationStore.open(url, layers=[2], sites=["mlp_out"])
    server.asked.clear()
    narrow.batch(0, 0, 4096)
    assert server.asked and not any("/resid/" in path for path in server.asked)


@pytest.mark.slow
def test_s3_is_written_and_read(content, monkeypatch):
    """A bucket of moto's, 50 ms away, through s3fs: the store is written there, and a batch read within a second."""
    from werkzeug.serving import make_server

    served, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    inner, asked = served.DomainDispatcherApplication(served.create_backend_app), []

    def late(environ: Any, start_response: Any) -> Any:
        time.sleep(LATENCY)
        asked.append(environ["REQUEST_METHOD"])
        return inner(environ, start_response)

    server = make_server("127.0.0.1", 0, late, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("rows")
        layout = StoreLayout(("resid", "mlp_out"), tuple(range(L)), D, "float16", shard_rows=1024)
        number = torch.arange(ROWS)
        write_store("s3://rows/s", content, number, number, number, layout, shuffle_rows=4096)
        store = ActivationStore.open("s3://rows/s")
        store.batch(0, 0, 4096)
        asked.clear()
        begun = time.perf_counter()
        batch = store.batch(0, 1, 4096)
        seconds = time.perf_counter() - begun
        assert "GET" in asked and torch.equal(batch.resid, content["resid"][batch.token.long()])
        assert seconds < 1, seconds
    finally:
        server.shutdown()
