"""SAELens transcoders, both ways."""

from pathlib import Path

from ...train.transcoder import Transcoder


def export_saelens(transcoder: Transcoder, folder: str | Path, model_name: str | None = None) -> Path:
    """Write a per-layer transcoder as one SAELens folder a layer."""
    raise NotImplementedError


def import_saelens(folder: str | Path, device: str = "cpu") -> Transcoder:
    """Read one SAELens transcoder, or a folder of them, one a layer."""
    raise NotImplementedError
