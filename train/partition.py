"""A transcoder's features cut over the feature ranks, and put together again."""

from dataclasses import replace

import torch

from ..data.errors import SettingsError
from .collectives import Collectives
from .transcoder import Transcoder

SHARDED = ("W_enc", "b_enc", "W_dec", "log_theta")


def is_sharded(name: str) -> bool:
    """Whether this parameter (or what belongs to it) is cut along its features."""
    return name.split(".")[0] in SHARDED


@torch.no_grad()
def part_of(whole: Transcoder, comm: Collectives) -> Transcoder:
    """This rank's F/m features of each layer; b_dec and W_skip are on every rank."""
    if comm.feature_ranks == 1:
        return whole
    for size in whole.features:
        if size % comm.feature_ranks:
            raise SettingsError(
                f"transcoder.features={size} does not divide into parallel.features={comm.feature_ranks} equal parts"
            )
    sizes = [size // comm.feature_ranks for size in whole.features]
    settings = replace(whole.settings, features_per_layer=sizes)
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
