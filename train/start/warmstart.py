"""Starting from something: a finished transcoder, or the MLP's own neurons."""

from collections.abc import Iterable

import torch

from ...data.errors import UserError
from ..parallel import SINGLE, Collectives
from ..transcoder import Normalisation, Transcoder, own_slice
from .neurons import Neurons

FRESH_SHARE = 0.1
"""How often features that the source lacks fire at first, against the usual feature: at the usual rate they would take
their share of the L0 from those that can write."""


@torch.no_grad()
def start_from(part: Transcoder, source: Transcoder, normalisation: Normalisation, comm: Collectives = SINGLE) -> None:
    """Copy a finished transcoder (raw activations) into a new one (normalised): other reach, more features, another
    activation. Features that the source lacks keep their fresh encoders and write nothing at first, and so do layers
    that it does not reach: with the same activation the result is exact at step 0. `part` is this rank's, and takes its
    own share of the source alone."""
    _check_source(part, source, comm)
    for l, layer in enumerate(part.layers):
        s = source.layers.index(layer)
        first = part.features[l] * comm.feature_rank
        rows = slice(first, min(source.features[s], first + part.features[l]))
        n = max(0, rows.stop - rows.start)
        scale_in, scale_out = normalisation.in_scale[l], normalisation.out_scale
        part.W_enc[l][:n] = source.W_enc[s][rows].to(part.device) / scale_in
        part.b_enc[l][:n] = source.b_enc[s][rows].to(part.device)
        part.b_dec[l].copy_(own_slice(source.b_dec[s], comm).to(part.device) * scale_out[l])
        written = slice(0, source.features[s]) if comm.slices > 1 else rows
        part.W_dec[l].zero_()
        for offset in range(part.reach_at(l)):
            target = part.layers[l + offset]
            if target in source.layers[s : s + source.reach_at(s)]:
                own = own_slice(source.W_dec[s][written, source.layers.index(target) - s], comm).to(part.device)
                part.W_dec[l][: len(own), offset] = own * scale_out[l + offset]
        if len(part.log_theta) and len(source.log_theta):
            part.log_theta[l][:n] = source.log_theta[s][rows].to(part.device)
        if len(part.W_skip):
            part.W_skip[l].zero_()
            if len(source.W_skip):
                skip = own_slice(source.W_skip[s].T, comm).T.to(part.device)
                part.W_skip[l].copy_(skip * scale_out[l] / scale_in)


def _check_source(part: Transcoder, source: Transcoder, comm: Collectives) -> None:
    if source.d_model != part.d_model:
        raise UserError(f"init is {source.d_model} wide and this store {part.d_model}: they are of other models")
    if source.settings.read != part.settings.read:
        raise UserError(f"init reads {source.settings.read} and this transcoder {part.settings.read}")
    if len(source.W_skip) and not len(part.W_skip):
        raise UserError("init has a skip, without which its features do not fit: set transcoder.skip=true")
    missing = [layer for layer in part.layers if layer not in source.layers]
    if missing:
        raise UserError(f"init does not cover layer {missing[0]}; it covers {', '.join(map(str, source.layers))}")
    for l, layer in enumerate(part.layers):
        there, fresh = source.features[source.layers.index(layer)], part.features[l] * comm.feature_ranks
        if there > fresh:
            raise UserError(f"init has {there} features in layer {layer}, and transcoder.features={fresh} is fewer")


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
