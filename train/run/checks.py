"""What is refused before work starts, and what may not change between a run and its resumption."""

from pathlib import Path
from typing import Any

import torch

from ...data.errors import SettingsError, UserError
from ...data.store import ActivationStore
from ..parallel import Collectives
from ..settings import TOPK, TrainerSettings, TranscoderSettings, changes
from ..transcoder import check_readable


def check_run(
    settings: TrainerSettings,
    transcoder: TranscoderSettings,
    store: ActivationStore,
    held_out: ActivationStore,
    layers: list[int],
    device: torch.device,
    comm: Collectives,
) -> None:
    """Settings against the store, the device and the mesh."""
    for name, rows in (("training", len(store)), ("held-out", len(held_out))):
        if rows == 0:
            raise UserError(f"the store has no {name} rows; cache it again with more tokens")
    for layer in layers:
        if layer not in store.layers or layer not in held_out.layers:
            raise SettingsError(
                f"transcoder.layers names layer {layer}, and the store holds {', '.join(map(str, store.layers))}"
            )
    for rows in (store, held_out):
        check_readable(rows, transcoder.read)
    if held_out.d_model != store.d_model:
        raise UserError(f"the held-out rows are {held_out.d_model} wide and the training rows {store.d_model}")
    models = [part.attributes.get("model", {}).get("fingerprint") for part in (store, held_out)]
    if None not in models and models[0] != models[1]:
        raise UserError(f"the training rows are of model {models[0]} and the held-out rows of {models[1]}")
    store.steps_per_epoch(settings.batch)
    check_sparsity(settings, transcoder, len(layers))
    if settings.precision == "fp16" and device.type == "cpu":
        raise SettingsError("trainer.precision=fp16 needs a GPU; on a CPU it takes float32 or bf16")
    if settings.optimizer == "muon" and comm.feature_ranks > 1:
        raise SettingsError("trainer.optimizer=muon needs each matrix whole: use adam or adamw with parallel.features")
    pieces = settings.accumulate * comm.data_ranks
    if settings.batch % pieces:
        raise SettingsError(
            f"trainer.batch={settings.batch} does not divide into {pieces} equal parts "
            f"(trainer.accumulate x parallel.data)"
        )


def check_sparsity(settings: TrainerSettings, transcoder: TranscoderSettings, n_layers: int) -> None:
    """How many features may be active, against how many there are and what the activation can do."""
    sizes = transcoder.sizes(n_layers)
    targets = settings.per_layer("target_l0", n_layers)
    topk_kind = transcoder.activation in TOPK
    ks = [float(k) if topk_kind else 0.0 for k in transcoder.ks(n_layers)]
    for size, wanted in zip(sizes, targets or ks, strict=True):
        if wanted > size:
            name = "transcoder.k" if targets is None else "trainer.target_l0"
            raise SettingsError(f"{name}={wanted:g} is more than the {size} features of a layer")
    together = transcoder.activation == "batchtopk" and transcoder.k_scope == "all"
    if together and len(set(targets or ks)) > 1:
        name = "transcoder.k_per_layer" if targets is None else "trainer.target_l0_per_layer"
        raise SettingsError(f"{name} needs transcoder.k_scope=layer: with all, the layers share their sum out")
    if transcoder.activation == "topk" and any(target != round(target) for target in targets or []):
        raise SettingsError("trainer.target_l0 must be a whole number for topk, which keeps as many at each token")
    if transcoder.activation == "relu" and settings.sparsity in ("l0", "target"):
        raise SettingsError(
            f"trainer.sparsity={settings.sparsity} needs thresholds to learn: relu takes tanh or l1, or use jumprelu"
        )


def store_identity(store: ActivationStore) -> dict[str, Any]:
    """What tells a store from another."""
    model = store.attributes.get("model", {})
    return {"rows": len(store), "d_model": store.d_model, "model": model.get("fingerprint"),
            "seed": store.attributes.get("seed"), "dtype": str(store.dtype)}  # fmt: skip


def check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse, by name, settings that would change the result of a run that has begun."""
    changed = []
    for section, values in now.items():
        before = saved[section]
        settings = {"trainer": TrainerSettings, "transcoder": TranscoderSettings}.get(section)
        common = [name for name in values if name in before and before[name] != values[name]]
        names = common if settings is None else changes(settings, before, values)
        changed += [f"{section}.{name} was {before[name]} and is {values[name]}" for name in names]
    if changed:
        raise SettingsError(
            f"{folder} has begun with other settings: {'; '.join(changed)}. Give the old values, or another run"
        )
