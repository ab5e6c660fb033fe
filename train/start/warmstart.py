"""Starting from something: a finished transcoder, or the MLP's own neurons."""

from collections.abc import Iterable

import torch

from ...data.errors import UserError
from ..parallel import SINGLE, Collectives
from ..transcoder import Normalisation, Transcoder, own_slice
from .neurons import Neurons


@torch.no_grad()
def start_from(transcoder: Transcoder, source: Transcoder, normalisation: Normalisation) -> None:
    """Copy a finished transcoder (raw activations) into a new one (normalised): other reach, more features, another
    activation. Features that the source lacks keep their fresh encoders and write nothing at first, and so do layers
    that it does not reach: with the same activation the result is exact at step 0."""
    if source.d_model != transcoder.d_model:
        raise UserError(f"init is {source.d_model} wide and this store {transcoder.d_model}: they are of other models")
    if source.settings.read != transcoder.settings.read:
        raise UserError(f"init reads {source.settings.read} and this transcoder {transcoder.settings.read}")
    if len(source.W_skip) and not len(transcoder.W_skip):
        raise UserError("init has a skip, without which its features do not fit: set transcoder.skip=true")
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
def start_from_neurons(
    part: Transcoder, neurons: Iterable[Neurons], normalisation: Normalisation, comm: Collectives = SINGLE
) -> None:
    """Make the MLPs' neurons the first features, the strongest ones where there are more than features; further ones
    keep their fresh encoders and write nothing at first, as do those in place of neurons that were silent on the rows.
    Activations count in units of what they write. `part` is this rank's."""
    for l, mlp in enumerate(neurons):
        whole = part.features[l] * comm.feature_ranks
        count = min(int((mlp.strength > 0).sum()), whole)
        best = mlp.strength.topk(count).indices.sort().values
        W_enc, first = part.W_enc[l], part.features[l] * comm.feature_rank
        scale_in, scale_out = normalisation.in_scale[l], normalisation.out_scale[l]
        written = mlp.W_out[best].to(W_enc) * scale_out
        norm = written.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_enc.dtype).tiny)
        own = slice(first, first + part.features[l])
        n = len(best[own])
        W_enc[:n] = (mlp.W_in[best].to(W_enc) / scale_in * norm)[own]
        part.b_enc[l][:n] = (mlp.b_in[best].to(W_enc) * norm[:, 0])[own]
        rows = own_slice(written / norm, comm) if comm.slices > 1 else (written / norm)[own]
        part.W_dec[l].zero_()
        part.W_dec[l][: len(rows), 0] = rows
        part.b_dec[l].copy_(own_slice(mlp.b_out.to(W_enc) * scale_out, comm))
