"""A transcoder's features cut over the feature ranks, and put together again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...data.errors import SettingsError
from ..parallel import Collectives
from ..settings import TranscoderSettings
from .transcoder import Transcoder

BY_FEATURE = ("W_enc", "b_enc", "W_dec", "log_theta")
BY_WIDTH = {"W_dec": 2, "b_dec": 0, "W_skip": 0}
"""What writes, where decoders are cut along their width (`parallel.exchange=actives`), and its dimension D."""


def cut_dim(name: str, comm: Collectives) -> int | None:
    """The dimension along which this parameter (or what belongs to it) is cut; None: every rank holds it whole."""
    kind = name.split(".")[0]
    if comm.slices > 1 and kind in BY_WIDTH:
        return BY_WIDTH[kind]
    return 0 if kind in BY_FEATURE else None


def part_settings(settings: TranscoderSettings, n_layers: int, d_model: int, comm: Collectives) -> TranscoderSettings:
    """The settings of this rank's part."""
    if comm.feature_ranks == 1:
        return settings
    sizes = settings.sizes(n_layers)
    for size in sizes:
        if size % comm.feature_ranks:
            raise SettingsError(
                f"transcoder.features={size} does not divide into parallel.features={comm.feature_ranks} equal parts"
            )
    if d_model % comm.slices:
        raise SettingsError(
            f"a width of {d_model} does not divide into parallel.features={comm.slices} equal slices: take "
            "parallel.exchange=reconstructions"
        )
    return replace(settings, features_per_layer=[size // comm.feature_ranks for size in sizes])


def new_part(
    settings: TranscoderSettings, d_model: int, layers: Sequence[int], seed: int | None, meta: dict[str, Any],
    comm: Collectives, decoders: bool = True,
) -> Transcoder:  # fmt: skip
    """This rank's part of a new transcoder, of which no rank holds the whole; zeros where there is no `seed`."""
    own = part_settings(settings, len(layers), d_model, comm)
    part = Transcoder(own, d_model, layers, seed=None, meta=meta, slices=comm.slices)
    if seed is not None:
        part.reset_parameters(seed, comm.feature_rank, comm.feature_ranks, decoders)
    return part


@torch.no_grad()
def part_of(whole: Transcoder, comm: Collectives) -> Transcoder:
    """What this rank holds of each parameter."""
    if comm.feature_ranks == 1:
        return whole
    settings = part_settings(whole.settings, whole.n_layers, whole.d_model, comm)
    part = Transcoder(
        settings, whole.d_model, whole.layers, seed=None, device=whole.device, dtype=whole.dtype, meta=whole.meta,
        slices=comm.slices,
    )  # fmt: skip
    for name, parameter in part.named_parameters():
        source, dim = whole.get_parameter(name), cut_dim(name, comm)
        if dim is not None:
            source = source.narrow(dim, comm.feature_rank * parameter.shape[dim], parameter.shape[dim])
        parameter.copy_(source)
    return part
