# pyright: reportMissingImports=false
"""One training by sparsify's own coder, optimizers and rates: `python in_sparsify.py JOB.json`, in its environment.

Its trainer reads a language model; this loop gives its coders the rows of the file instead, and does at each step what
its trainer does: biases from the first batch, the loss FVU, no step on decoders' norms (transcoders), the optimizer.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Clock, begin, finish
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.muon import Muon
from sparsify.sign_sgd import SignSGD
from transformers import get_linear_schedule_with_warmup


def optimizers_of(coders, name, scale, features, steps, warmup) -> tuple[list[Any], list[Any]]:
    """Its three choices at `scale` times their default rates."""
    base = {"signum": 5e-3, "adam": 2e-4}.get(name, 0) / (features / 2**14) ** 0.5 * scale
    groups = [{"params": list(coder.parameters()), "lr": base} for coder in coders]
    if name == "signum":
        wrapped = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        wrapped.train()
        return [wrapped], []
    if name == "adam":
        adam = torch.optim.Adam(groups)
        return [adam], [get_linear_schedule_with_warmup(adam, warmup, steps)]
    every = [parameter for coder in coders for parameter in coder.parameters()]
    matrices = [parameter for parameter in every if parameter.ndim >= 2]
    vectors = [parameter for parameter in every if parameter.ndim < 2]
    pair = [Muon(matrices, lr=2e-3 * scale, ddp=False), torch.optim.Adam(vectors, lr=2e-3 * scale)]
    return pair, [get_linear_schedule_with_warmup(one, w, steps) for one, w in zip(pair, (0, warmup))]


def main(path):
    job, x, y = begin(path)
    recipe = job["recipe"]
    config = SparseCoderConfig(num_latents=job["features"], k=job["k"], transcode=True)
    clock, device = Clock(), job["device"]
    coders = [SparseCoder(x.shape[-1], config, device=device, dtype=torch.float32) for _ in range(len(x))]
    warmup = recipe.get("warmup", 1000)
    warmup = round(warmup * job["steps"]) if isinstance(warmup, float) else warmup
    optimizers, schedulers = optimizers_of(
        coders, recipe["optimizer"], recipe.get("scale", 1.0), job["features"], job["steps"], warmup
    )
    for step in range(job["steps"]):
        part = slice(step * job["batch"], (step + 1) * job["batch"])
        for l, coder in enumerate(coders):
            inputs, outputs = (torch.from_numpy(rows[l, part].astype(np.float32)).to(device) for rows in (x, y))
            if step == 0:
                coder.encoder.bias.data = -inputs.mean(0) @ coder.encoder.weight.data.T
                coder.b_dec.data = outputs.mean(0)
            coder(inputs, outputs).fvu.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        for each in schedulers:
            each.step()
    for each in optimizers:
        if isinstance(each, ScheduleFreeWrapper):
            each.eval()
    cost = clock.read()
    for layer, coder in zip(job["layers"], coders):
        coder.save_to_disk(Path(job["out"]) / "weights" / f"layers.{layer}.mlp")
    finish(job["out"], cost)


if __name__ == "__main__":
    main(sys.argv[1])
