# pyright: reportMissingImports=false
"""One training by Llamascopium's own trainer and initializer: `python in_llamascopium.py JOB.json`, in its environment.

`kind` plt trains one of its transcoders a layer, one after the other, clt its cross-layer transcoder.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from job import Clock, begin, finish
from llamascopium.initializer import Initializer, InitializerConfig
from llamascopium.models.clt import CLTConfig
from llamascopium.models.sae import SAEConfig
from llamascopium.trainer import Trainer, TrainerConfig
from safetensors.torch import load_file, save_file


class Mlp(torch.nn.Module):
    """down(silu(gate x) * up x): what its start from an MLP asks for an answer."""

    def __init__(self, weights, l):
        super().__init__()
        self.gate, self.up, self.down = (weights.get(f"{l}.{name}") for name in ("gate", "up", "down"))

    def forward(self, x):
        if self.gate is None:
            return torch.nn.functional.gelu(x @ self.up.T) @ self.down.T
        return (torch.nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T


def stream(x, y, places, names, batch, steps, device):
    """Its batches: every hook point's rows by name, with tokens, which it counts."""
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        rows = {"tokens": torch.zeros(batch, dtype=torch.long), "mask": torch.ones(batch, dtype=torch.bool)}
        rows = {name: tensor.to(device) for name, tensor in rows.items()}
        for l, (name_in, name_out) in zip(places, names):
            rows[name_in] = torch.from_numpy(x[l, part].astype(np.float32)).to(device)
            rows[name_out] = torch.from_numpy(y[l, part].astype(np.float32)).to(device)
        yield rows


def main(path):
    job, x, y = begin(path)
    recipe = job["recipe"]
    L, _, D = x.shape
    k, batch, steps, clt = job["k"], job["batch"], job["steps"], recipe["kind"] == "clt"
    device = job["device"]
    names = [(f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out") for layer in job["layers"]]
    sizes = {"d_model": D, "expansion_factor": job["features"] / D, "dtype": torch.float32, "device": device}
    out = Path(job["out"]) / "weights"
    clock = Clock()
    groups = [list(range(L))] if clt else [[l] for l in range(L)]
    for places in groups:
        hooks = [names[l] for l in places]
        if clt:
            config = CLTConfig(
                hook_points_in=[a for a, _ in hooks], hook_points_out=[b for _, b in hooks],
                act_fn="topk", top_k=k, **sizes,
            )  # fmt: skip
            start = InitializerConfig(init_encoder_with_decoder_transpose=False)
        else:
            config = SAEConfig(
                hook_point_in=hooks[0][0], hook_point_out=hooks[0][1], act_fn="topk", top_k=k, **sizes
            )  # fmt: skip
            start = InitializerConfig(
                bias_init_method="geometric_median", init_encoder_bias_with_mean_hidden_pre=True,
                init_encoder_with_decoder_transpose=False, grid_search_init_norm=True,
            )  # fmt: skip

        rows = functools.partial(stream, x, y, places, hooks, batch, steps, device)
        initializer = Initializer(start)
        norms = {}
        for (name_in, name_out), l in zip(hooks, places):
            for name, values in ((name_in, x), (name_out, y)):
                first = torch.from_numpy(values[l, : 8 * batch].astype(np.float32))
                norms[name] = float(first.norm(dim=-1).mean())
        if recipe.get("start") == "mlp" and not clt:
            model = initializer.initialize_sae_from_config(config, rows(), norms)
            weights = load_file(f"{job['rows']}/mlps.safetensors", device)
            first = model.normalize_activations(next(rows()))
            model.init_tc_with_mlp(first, Mlp(weights, places[0]))
            model = initializer.initialization_search(model, next(rows()))
        else:
            model = initializer.initialize_sae_from_config(config, rows(), norms)
        trainer = Trainer(
            TrainerConfig(
                amp_dtype=torch.float32, lr=recipe.get("lr", 4e-4), initial_k=recipe.get("first_k", 1) * k,
                k_warmup_steps=0.1 if recipe.get("first_k") else 0, l1_coefficient=None,
                lr_warm_up_steps=recipe.get("warmup", 5000), total_training_tokens=batch * steps,
                log_frequency=10**9, eval_frequency=10**9, n_checkpoints=0, skip_metrics_calculation=True,
                exp_result_path=str(out / "results"),
            )
        )  # fmt: skip
        trainer.fit(model, rows())
        with clock:  # saving is no part of the training
            name = out / ("clt" if clt else f"layer_{job['layers'][places[0]]}")
            name.mkdir(parents=True)
            held = {key: value.contiguous() for key, value in model.full_state_dict().items()}
            save_file(held, name / "sae_weights.safetensors")
            model.cfg.save_hyperparameters(name)
    finish(job["out"], clock.read())


if __name__ == "__main__":
    main(sys.argv[1])
