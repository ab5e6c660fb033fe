"""A transcoder's features cut over the feature ranks, and put together again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data.errors import SettingsError
from .collectives import Collectives
from .transcoder import Transcoder, TranscoderSettings

SHARDED = ("W_enc", "b_enc", "W_dec", "log_theta")


def is_sharded(name: str) -> bool:
    """Whether this parameter (or what belongs to it) is cut along its features."""
    return name.split(".")[0] in SHARDED


def part_settings(settings: TranscoderSettings, n_layers: int, comm: Collectives) -> TranscoderSettings:
    """The settings of this rank's part."""
    if comm.feature_ranks == 1:
        return settings
    sizes = settings.sizes(n_layers)
    for size in sizes:
        if size % comm.feature_ranks:
            raise SettingsError(
                f"transcoder.features={size} does not divide into parallel.features={comm.feature_ranks} equal parts"
            )
    return replace(settings, features_per_layer=[size // comm.feature_ranks for size in sizes])


def new_part(
    settings: TranscoderSettings, d_model: int, layers: Sequence[int], seed: int, meta: dict[str, Any],
    comm: Collectives,
) -> Transcoder:  # fmt: skip
    """This rank's part of a new transcoder, of which no rank holds the whole."""
    own = part_settings(settings, len(layers), comm)
    part = Transcoder(own, d_model, layers, seed=None, meta=meta)
    part.reset_parameters(seed, comm.feature_rank, comm.feature_ranks)
    return part


@torch.no_grad()
def part_of(whole: Transcoder, comm: Collectives) -> Transcoder:
    """This rank's F/m features of each layer; b_dec and W_skip are on every rank."""
    if comm.feature_ranks == 1:
        return whole
    settings = part_settings(whole.settings, whole.n_layers, comm)
    part = Transcoder(
        settings, whole.d_model, whole.layers, seed=None, device=whole.device, dtype=whole.dtype, meta=whole.meta
    )
    for name, parameter in part.named_parameters():
        source = whole.get_parameter(name)
        if is_sharded(name):
            source = source.narrow(0, comm.feature_rank * parameter.shape[0], parameter.shape[0])
        parameter.copy_(source)
    return part


@torch.no_grad()
def whole_of(part: Transcoder, comm: Collectives) -> Transcoder:
    """All features, gathered on every rank: what is exported and evaluated."""
    if comm.feature_ranks == 1:
        return part
    settings = replace(part.settings, features_per_layer=[size * comm.feature_ranks for size in part.features])
    whole = Transcoder(
        settings, part.d_model, part.layers, seed=None, device=part.device, dtype=part.dtype, meta=part.meta
    )
    for name, parameter in whole.named_parameters():
        source = part.get_parameter(name)
        parameter.copy_(comm.gather_features(source.detach()) if is_sharded(name) else source)
    return whole
