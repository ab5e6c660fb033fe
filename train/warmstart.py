"""Starting from something: a finished transcoder, or the MLP's own neurons."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.errors import UserError
from .normalisation import Normalisation
from .transcoder import Transcoder


class Neurons(NamedTuple):
    """One layer's MLP as features: what each neuron reads at the transcoder's site and what it adds to mlp_out."""

    W_in: Tensor
    """[N, D]; for a gated MLP the gate's rows; a norm's weight is folded in where the site lies before it."""
    b_in: Tensor
    """[N]"""
    W_out: Tensor
    """[N, D]"""
    b_out: Tensor
    """[D]"""


@torch.no_grad()
def start_from(transcoder: Transcoder, source: Transcoder, normalisation: Normalisation) -> None:
    """Copy a finished transcoder (raw activations) into a new one (normalised): other reach, more features, another
    activation. Features that the source lacks keep their fresh encoders and write nothing at first, and so do layers
    that it does not reach: with the same activation the result is exact at step 0."""
    if source.d_model != transcoder.d_model:
        raise UserError(f"init is {source.d_model} wide and this store {transcoder.d_model}: they are of other models")
    if source.settings.read != transcoder.settings.read:
        raise UserError(f"init reads {source.settings.read} and this transcoder {transcoder.settings.read}")
    missing = [layer for layer in transcoder.layers if layer not in source.layers]
    if missing:
        raise UserError(f"init does not cover layer {missing[0]}; it covers {', '.join(map(str, source.layers))}")
    for l, layer in enumerate(transcoder.layers):
        s = source.layers.index(layer)
        n, fresh = source.features[s], transcoder.features[l]
        if n > fresh:
            raise UserError(f"init has {n} features in layer {layer}, and transcoder.features={fresh} is fewer")
        scale_in, scale_out = normalisation.in_scale[l], normalisation.out_scale
        transcoder.W_enc[l][:n] = source.W_enc[s].to(transcoder.device) / scale_in
        transcoder.b_enc[l][:n] = source.b_enc[s].to(transcoder.device)
        transcoder.b_dec[l].copy_(source.b_dec[s].to(transcoder.device) * scale_out[l])
        transcoder.W_dec[l].zero_()
        for offset in range(transcoder.reach_at(l)):
            target = transcoder.layers[l + offset]
            if target in source.layers[s : s + source.reach_at(s)]:
                written = source.W_dec[s][:, source.layers.index(target) - s].to(transcoder.device)
                transcoder.W_dec[l][:n, offset] = written * scale_out[l + offset]
        if len(transcoder.log_theta) and len(source.log_theta):
            transcoder.log_theta[l][:n] = source.log_theta[s].to(transcoder.device)
        if len(transcoder.W_skip):
            transcoder.W_skip[l].zero_()
            if len(source.W_skip):
                skip = source.W_skip[s].to(transcoder.device)
                transcoder.W_skip[l].copy_(skip * scale_out[l] / scale_in)


@torch.no_grad()
def start_from_neurons(transcoder: Transcoder, neurons: Sequence[Neurons], normalisation: Normalisation) -> None:
    """Make the MLPs' neurons the first features, the most influential ones where there are more than features."""
    if len(neurons) != transcoder.n_layers:
        raise UserError(f"init=mlp gave neurons of {len(neurons)} layers for {transcoder.n_layers}")
    for l, mlp in enumerate(neurons):
        n = min(len(mlp.W_in), transcoder.features[l])
        best = (mlp.W_in.norm(dim=1) * mlp.W_out.norm(dim=1)).topk(n).indices
        scale_in, scale_out = normalisation.in_scale[l], normalisation.out_scale[l]
        transcoder.W_enc[l][:n] = mlp.W_in[best].to(transcoder.W_enc[l]) / scale_in
        transcoder.b_enc[l][:n] = mlp.b_in[best].to(transcoder.b_enc[l])
        transcoder.W_dec[l].zero_()
        transcoder.W_dec[l][:n, 0] = mlp.W_out[best].to(transcoder.W_dec[l]) * scale_out
        transcoder.b_dec[l].copy_(mlp.b_out.to(transcoder.b_dec[l]) * scale_out)
