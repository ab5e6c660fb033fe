"""The transcoder as it stood at a checkpoint of its run: for looking at how features came to be."""

import json
from pathlib import Path

import torch

from ..data.errors import UserError
from ..data.store import ActivationStore
from .run import Checkpoints, HeldOut, calibrated_thresholds
from .settings import TOPK, TrainerSettings, TranscoderSettings
from .transcoder import Normalisation, Reading, Transcoder


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(path.name[5:]) for path in Checkpoints(run / "checkpoints").paths())


def transcoder_at(run: Path, step: int, rows: ActivationStore | None = None) -> Transcoder:
    """The transcoder of a checkpoint, on raw activations as the run's export is. Its thresholds are found on held-out
    `rows`, as the export's are; without any the activation's own are kept, and batchtopk has none."""
    checkpoints, finished = Checkpoints(run / "checkpoints"), Transcoder.load(run / "transcoder", lazy_decoders=True)
    path = checkpoints.folder / f"step-{step}"
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        settings, trained = TranscoderSettings(**state["transcoder"]), TrainerSettings(**state["trainer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no checkpoint that this version reads ({error})") from error
    if settings.activation == "topk":
        settings = finished.settings  # its k was the trainer's target
    L, D = finished.n_layers, finished.d_model
    transcoder = Transcoder(settings, D, finished.layers, seed=None, meta=finished.meta).requires_grad_(False)
    scales = Normalisation(torch.ones(L), torch.ones(L), torch.zeros(L, D))
    tensors: dict[str, torch.Tensor] = {f"weights/{name}": weight for name, weight in transcoder.named_parameters()}
    checkpoints.load(path, tensors | {f"normalisation/{name}": scale for name, scale in scales._asdict().items()})
    target = trained.per_layer("target_l0", L)
    if target is None and settings.activation in TOPK:
        target = [float(k) for k in settings.ks(L)]
    thresholds = None
    if rows is not None and target is not None and settings.activation != "topk":
        held_out = HeldOut(rows, scales, Reading(rows, settings.read, finished.layers), finished.layers)
        tokens = max(trained.calibrate_tokens, trained.eval_tokens)
        inputs = (x for x, _, _ in held_out.pairs(tokens, transcoder.device))
        thresholds = calibrated_thresholds(transcoder, inputs, held_out.rows(tokens), target)
    elif settings.activation == "batchtopk":
        raise UserError(
            f"the thresholds of step {step} are found on the run's held-out rows, and its store is not known: "
            "config.yaml's store.path names it"
        )
    return transcoder.folded(scales.in_scale, scales.out_scale, thresholds)
