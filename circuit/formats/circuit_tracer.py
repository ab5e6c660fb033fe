"""circuit-tracer folders, both ways."""

from pathlib import Path

from ...train.transcoder import Transcoder


def export_circuit_tracer(
    transcoder: Transcoder, folder: str | Path, model_name: str | None = None, post_norm: bool = False
) -> Path:
    """Write a raw-reading transcoder as a folder that circuit-tracer loads."""
    raise NotImplementedError


def import_circuit_tracer(folder: str | Path, device: str = "cpu") -> Transcoder:
    """Read a circuit-tracer folder as a transcoder on raw activations."""
    raise NotImplementedError
