"""How long the viewer takes: from the click to the drawn page, and to answer a click, a hover, a move of the slider.

python -m benchmarks.viewer [--json] [--sizes 1500x50000,5000x200000]
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from crosslace.circuit.graph import DenseRows, Graph, Nodes
from crosslace.circuit.viewer import Viewer, ViewSettings
from crosslace.circuit.viewer.payload import graph_payload

L, T = 30, 60
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def random_graph(features: int, edges: int, seed: int = 0) -> Graph:
    """A random graph of that many features and about that many edges, over 30 layers and 60 tokens."""
    random = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randint(high, (2 * features,), generator=random) for high in (L, T, 10_000)], 1)
    place = torch.unique(place, dim=0)
    place = place[torch.randperm(len(place), generator=random)[:features].sort().values]
    grid, position = torch.cartesian_prod(torch.arange(L), torch.arange(T)), torch.arange(T)
    none, last = torch.zeros(L * T, dtype=torch.long), torch.full((5,), T - 1)
    nodes = Nodes.join(
        [
            Nodes.of("feature", place[:, 0], place[:, 1], place[:, 2], torch.rand(features, generator=random)),
            Nodes.of("error", grid[:, 0], grid[:, 1], none),
            Nodes.of("embedding", position * 0 - 1, position, position),
            Nodes.of("logit", last * 0 + L, last, torch.arange(5)),
        ]
    )
    targets = torch.cat([torch.arange(features), torch.arange(len(nodes) - 5, len(nodes))])
    rows = torch.randn(len(targets), len(nodes), generator=random)
    rows *= (nodes.layer[targets][:, None] > nodes.layer) & (nodes.position[targets][:, None] >= nodes.position)
    keep = 1.45 * edges / max(1, int((rows != 0).sum()))  # a third of them leads to no logit, and is not sent
    rows *= torch.rand(rows.shape, generator=random) < keep
    shares = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.01])
    words = [f" word{i}" for i in range(T)]
    left_out = rows.new_zeros(len(rows))
    graph = Graph(DenseRows(rows), nodes, shares, list(range(T)), words, left_out, {"prompt": "".join(words)})
    graph.metadata["pruned"] = {"node": 1.0, "edge": 1.0}  # all of it is sent
    nodes.labels.update({len(nodes) - 5 + i: f" token{i}" for i in range(5)})
    return graph


def timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def measure(features: int, edges: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        random_graph(features, edges).save(run / "graphs" / "big")
        graph, load_s = timed(lambda: Graph.load(run / "graphs" / "big"))
        payload, payload_s = timed(lambda: graph_payload(graph, most_features=5_000, most_links=200_000))
        found = {
            "features": graph.n_features,
            "edges": len(payload["links"]["weight"]),
            "load_s": load_s,
            "payload_s": payload_s,
            "payload_bytes": len(json.dumps(payload)),
        }
        return found | in_browser(run)


def in_browser(run: Path) -> dict[str, float]:
    """From the click to the drawn page (the server has not read the graph yet), then medians of what a hand does, all
    nodes shown. Nothing where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return {}
    from playwright.sync_api import sync_playwright

    viewer = Viewer(run, ViewSettings(port=0, open=False)).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(viewer.address)
        page.wait_for_selector("a.card")
        started = time.perf_counter()
        page.evaluate("location.hash = '#/graph?run=run&slug=big&big=1'")
        page.wait_for_selector(".box", timeout=120_000)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        open_s = time.perf_counter() - started
        page.get_by_role("slider", name="nodes: share of influence").fill("1")
        found = page.evaluate(HANDS)
        browser.close()
    viewer.stop()
    return {"open_s": open_s, **{name: value / 1000 for name, value in found.items()}}


HANDS = """async () => {
    const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const canvas = document.querySelector('.stage canvas:last-of-type'), box = canvas.getBoundingClientRect();
    const slider = document.querySelector('input[type=range]');
    const at = (n) => ({
        clientX: box.left + 60 + (n * 97) % (box.width - 80),
        clientY: box.top + 30 + (n * 53) % (box.height - 60), bubbles: true,
    });
    const median = async (work) => {
        const times = [];
        for (let n = 0; n < 15; n++) {
            await frame();
            const started = performance.now();
            work(n);
            await frame();
            times.push(performance.now() - started);
        }
        return times.sort((a, b) => a - b)[7];
    };
    await frame();
    const idle = await median(() => {});
    const hover = await median((n) => canvas.dispatchEvent(new MouseEvent('mousemove', at(n))));
    const click = await median((n) => canvas.dispatchEvent(new MouseEvent('click', at(n))));
    const slide = await median((n) => {
        slider.value = 0.95 - 0.02 * n;
        slider.dispatchEvent(new Event('input', { bubbles: true }));
    });
    return { idle_frame_s: idle, hover_s: hover, click_s: click, slider_s: slide };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1500x50000,5000x200000", help="features x edges, e.g. 500x5000")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for size in arguments.sizes.split(","):
        found = measure(*map(int, size.split("x")))
        if arguments.json:
            print(json.dumps(found), flush=True)
        else:
            print(
                "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
