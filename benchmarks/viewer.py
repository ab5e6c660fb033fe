"""How long the viewer takes: from a graph on disk to its page, and to draw it again as the slider moves.

python -m benchmarks.viewer [--json] [--features 2000,8000]
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from crosslace.circuit.graph import DenseRows, Graph, Nodes
from crosslace.circuit.viewer.payload import graph_payload
from crosslace.circuit.viewer.picture import render_graph_svg
from crosslace.circuit.viewer.server import ViewSettings, serve

L, T = 12, 48
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def random_graph(features: int, seed: int = 0) -> Graph:
    """A dense random graph of that many features: heavier than any that was traced."""
    random = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randint(high, (features,), generator=random) for high in (L, T, 10_000)], 1)
    place = torch.unique(place, dim=0)
    grid, position = torch.cartesian_prod(torch.arange(L), torch.arange(T)), torch.arange(T)
    none, last = torch.zeros(L * T, dtype=torch.long), torch.full((5,), T - 1)
    nodes = Nodes.join(
        [
            Nodes.of("feature", place[:, 0], place[:, 1], place[:, 2], torch.rand(len(place), generator=random)),
            Nodes.of("error", grid[:, 0], grid[:, 1], none),
            Nodes.of("embedding", position * 0 - 1, position, position),
            Nodes.of("logit", last * 0 + L, last, torch.arange(5)),
        ]
    )
    targets = torch.cat([torch.arange(len(place)), torch.arange(len(nodes) - 5, len(nodes))])
    rows = torch.randn(len(targets), len(nodes), generator=random)
    rows *= torch.rand(rows.shape, generator=random) ** 8
    rows *= (nodes.layer[targets][:, None] > nodes.layer) & (nodes.position[targets][:, None] >= nodes.position)
    shares = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.01])
    words = [f" word{i}" for i in range(T)]
    graph = Graph(
        DenseRows(rows), nodes, shares, list(range(T)), words, rows.new_zeros(len(rows)), {"prompt": "".join(words)}
    )
    nodes.labels.update({len(nodes) - 5 + i: f" token{i}" for i in range(5)})
    return graph


def timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def measure(features: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        random_graph(features).save(run / "graphs" / "big")
        graph, load_s = timed(lambda: Graph.load(run / "graphs" / "big"))
        payload, payload_s = timed(lambda: graph_payload(graph))
        _, picture_s = timed(lambda: render_graph_svg(graph))
        found = {
            "features": graph.n_features,
            "edges": int((graph.rows != 0).sum()),
            "shown": payload["size"]["shown"],
            "load_s": load_s,
            "payload_s": payload_s,
            "payload_bytes": len(json.dumps(payload)),
            "picture_s": picture_s,
        }
        return found | in_browser(run)


def in_browser(run: Path) -> dict[str, float]:
    """From the click to the drawn page, and one move of the slider; nothing where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return {}
    from playwright.sync_api import sync_playwright

    told, address = threading.Event(), []

    def announce(where: str) -> None:
        address.append(where)
        told.set()

    threading.Thread(target=serve, args=(run, ViewSettings(port=0, open=False), announce), daemon=True).start()
    told.wait(30)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page()
        page.goto(address[0])
        page.wait_for_selector("a.card")
        started = time.perf_counter()
        page.get_by_text("big").first.click()
        page.wait_for_selector("svg.graph", timeout=120_000)
        page_s = time.perf_counter() - started
        redraw_ms = page.evaluate(
            """() => {
                const slider = document.querySelector('input[type=range]');
                const times = [0.9, 0.7, 0.5, 0.8].map((share) => {
                    const started = performance.now();
                    slider.value = share;
                    slider.dispatchEvent(new Event('input'));
                    document.querySelector('svg.graph').getBBox();
                    return performance.now() - started;
                });
                return times.sort((a, b) => a - b)[2];
            }"""
        )
        browser.close()
    return {"page_s": page_s, "redraw_s": redraw_ms / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--features", default="500,2000,8000", help="sizes of the random graphs, e.g. 500,2000")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for size in arguments.features.split(","):
        found = measure(int(size))
        if arguments.json:
            print(json.dumps(found), flush=True)
        else:
            print(
                "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
