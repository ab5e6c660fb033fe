"""Where a foreign transcoder reads and writes, in TransformerLens's names, against what the model's family has.

Two hooks may sit side by side and hold different numbers: `ln2.hook_normalized` lies before an RMS norm's gain and
`mlp.hook_in` after it; `mlp.hook_out` lies before a post-norm and `hook_mlp_out` after it; `hook_resid_pre` is what the
MLP reads only where it stands beside attention. What can be folded into the weights is, the rest is refused.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import UserError
from ...data.models import LanguageModel

READS = {"hook_resid_mid": "resid", "hook_resid_pre": "resid", "mlp.hook_in": "mlp_in", "ln2.hook_normalized": "mlp_in"}
"""Hook -> our site."""
WRITES = ("hook_mlp_out", "mlp.hook_out")


class Hooks(NamedTuple):
    """Where a transcoder reads and writes."""

    read: str
    write: str


def check_hooks(lm: LanguageModel, hooks: Hooks, layers: list[int]) -> None:
    """Refuse a transcoder that would be read at another place than it was trained at."""
    name = lm.name or "this model"
    for layer in layers:
        parts = lm.layers[layer]
        if hooks.read == "hook_resid_mid" and parts.parallel:
            raise UserError(
                f"the transcoder reads hook_resid_mid, which {name} has not: its MLPs stand beside attention"
            )
        if hooks.read == "hook_resid_pre" and not parts.parallel:
            raise UserError(
                f"the transcoder reads hook_resid_pre, the stream before attention; the MLPs of {name} read it after"
            )
        if hooks.write == "mlp.hook_out" and parts.post_mlp_norm is not None:
            raise UserError(
                f"the transcoder writes mlp.hook_out, which lies before the norm that {name} puts on its MLPs' output;"
                " a norm cannot be folded into decoders"
            )
        if hooks.read == "ln2.hook_normalized" and parts.mlp_norm is None:
            raise UserError(f"the transcoder reads ln2.hook_normalized, but {name} has no norm before its MLPs")


def folded_gain(lm: LanguageModel, layer: int, W: Tensor) -> tuple[Tensor, Tensor | float]:
    """A weight [n, D] that reads a norm before its gain, as one that reads after it, and what to add for its bias."""
    norm = lm.layers[layer].mlp_norm
    assert norm is not None
    gain = norm.weight.to(W.device, torch.promote_types(W.dtype, torch.float32))
    if not bool((gain != 0).all()):
        raise UserError(
            f"the norm before layer {layer}'s MLP has gains of zero: what was read before it is lost after it"
        )
    folded = W.to(gain.dtype) / gain
    return folded.to(W.dtype), 0.0 if norm.bias is None else -(folded @ norm.bias.to(folded))
