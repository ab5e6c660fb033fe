"""What int8 costs: a transcoder trained on an int8 store against one trained on the same rows in float32.

    python -m benchmarks.int8 --store stores/world-float32 [--json]

`--store` is a float32 store with a held-out split. Its rows are written again as float32 and as int8, with one channel
of every layer's `resid` forty times as large; both transcoders start from the same weights, see the same batches, and
are judged on the same float32 held-out rows. `rise` is the relative rise in NMSE.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from crosslace.data.layout.layout import StoreLayout
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.writer import write_store

OUTLIER = 40.0
SITES = ("resid", "mlp_out")


def rows_of(store: ActivationStore, limit: int) -> dict[str, torch.Tensor]:
    """The first rows of a store, in memory, with the outlier channel."""
    parts = []
    for batch in store.rows_in_order(8192):
        parts.append({site: batch.sites[site].float() for site in SITES})
        if sum(len(part["resid"]) for part in parts) >= limit:
            break
    rows = {site: torch.cat([part[site] for part in parts])[:limit].contiguous() for site in SITES}
    rows["resid"][..., 0] *= OUTLIER
    return rows


def train(store: ActivationStore, held_out: dict[str, torch.Tensor], features: int, steps: int, batch: int) -> float:
    """NMSE on held-out rows of a per-layer top-k transcoder, both in plain torch so that nothing else differs."""
    torch.manual_seed(0)
    n_layers, width, k = store.n_layers, store.d_model, 16
    statistics = store.statistics
    mean_in, mean_out = statistics.mean["resid"], statistics.mean["mlp_out"]
    # one scalar per layer and site so that E|x|^2 = D
    size_in = (statistics.mean_square["resid"] / width).sqrt()[:, None]
    size_out = (statistics.mean_square["mlp_out"] / width).sqrt()[:, None]
    encoder = torch.nn.Parameter(torch.randn(n_layers, width, features) / width**0.5)
    decoder = torch.nn.Parameter(encoder.detach().transpose(1, 2).clone() * 0.1)
    bias = torch.nn.Parameter(torch.zeros(n_layers, 1, features))
    offset = torch.nn.Parameter((mean_out / size_out)[:, None].clone())
    optimiser = torch.optim.Adam([encoder, decoder, bias, offset], lr=1e-3)

    def predict(x: torch.Tensor) -> torch.Tensor:
        x = ((x.float() - mean_in) / size_in).transpose(0, 1)
        values, places = (x @ encoder + bias).relu().topk(k, dim=-1)
        return torch.zeros(*x.shape[:2], features).scatter(2, places, values) @ decoder + offset

    with store.loader(batch, steps=steps) as loader:
        for rows in loader:
            target = (rows.mlp_out.float() / size_out).transpose(0, 1)
            loss = (predict(rows.resid) - target).square().mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    error = total = 0.0
    with torch.no_grad():
        for start in range(0, len(held_out["resid"]), 4096):
            y = held_out["mlp_out"][start : start + 4096]
            guess = predict(held_out["resid"][start : start + 4096]).transpose(0, 1) * size_out
            error += (guess - y).square().sum().item()
            total += y.square().sum().item()
    return error / total


def main() -> None:
    parser = argparse.ArgumentParser(description="What int8 costs in NMSE.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    train_rows = rows_of(ActivationStore.open(options.store), options.rows)
    held_out = rows_of(ActivationStore.open(options.store, "held_out"), options.rows)
    count, n_layers, width = train_rows["resid"].shape
    number = torch.arange(count)
    found: dict[str, Any] = {"L": n_layers, "D": width, "rows": count, "features": options.features}
    with tempfile.TemporaryDirectory(prefix="crosslace-bench-") as folder:
        for dtype in ("float32", "int8"):
            path = Path(folder, dtype)
            write_store(
                path, train_rows, number, number, number, StoreLayout(SITES, tuple(range(n_layers)), width, dtype)
            )
            store = ActivationStore.open(path)
            found[dtype] = train(store, held_out, options.features, options.steps, options.batch)
    found["rise"] = found["int8"] / found["float32"] - 1
    print(json.dumps(found) if options.json else "\n".join(f"{key:10} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
