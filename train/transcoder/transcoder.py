"""The transcoder: one class for every reach.

    h_l = x_l W_enc_l^T + b_enc_l        a_l = act(h_l)
    y^_t = sum over l <= t < l + reach of a_l W_dec_{l->t}  +  b_dec_t  (+ x_t W_skip_t^T)

`reach` 1 is a per-layer transcoder (PLT), `all` a cross-layer one (CLT), anything between a windowed one. `W_dec_l` is
[F, reach_l, D], contiguous, so that one feature's whole decoder is one row. Lists run over the layers that the
transcoder covers (`layers`), and reach counts along that list.

The stages are separate so that a step can fuse them: `preactivations` (one product per layer), `activate` (the active
set), `decode`. `loss/objective.py` composes them densely; `sparse/forward.py` without touching a zero.
"""

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ...data.errors import UserError
from ..parallel import SINGLE, Collectives
from ..settings import TOPK, TranscoderSettings
from .activations import SparseActs, batchtopk_threshold, jumprelu, keep_reaching, to_sparse, topk_threshold
from .stored_rows import StoredRows, read_weights

FORMAT_VERSION = 1
WEIGHTS_FILE, DESCRIPTION_FILE = "transcoder.safetensors", "transcoder.json"

# Rows that are drawn from one seed.
_DRAWN_TOGETHER = 64

Acts = Sequence[Tensor | SparseActs]


class Transcoder(nn.Module):
    """A sparse dictionary over the covered layers. Tensors in and out are [..., n_layers, d_model]."""

    def __init__(
        self,
        settings: TranscoderSettings,
        d_model: int,
        layers: int | Sequence[int],
        *,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        meta: dict[str, Any] | None = None,
        slices: int = 1,
    ) -> None:
        """`layers`: the model layers to cover (or how many, from 0). Weights are drawn from `seed`, or
        left at zero where it is None. `slices` > 1: a part of a transcoder whose decoders are cut along their width;
        it writes D / slices of all parts' features (slices.py)."""
        super().__init__()
        # `auto` is for a training, which knows what its store can give.
        self.settings = replace(settings, read="resid") if settings.read == "auto" else settings
        self.layers = list(range(layers)) if isinstance(layers, int) else list(layers)
        self.n_layers = len(self.layers)
        self.d_model = d_model
        self.slices, self.width = slices, d_model // slices
        self.features = settings.sizes(self.n_layers)
        self.reach = settings.reach_of(self.n_layers)
        self.meta: dict[str, Any] = dict(meta or {})

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.W_enc = nn.ParameterList([empty(n, d_model) for n in self.features])
        self.b_enc = nn.ParameterList([empty(n) for n in self.features])
        self.W_dec = nn.ParameterList(
            [empty(n * slices, self.reach_at(l), self.width) for l, n in enumerate(self.features)]
        )
        self.b_dec = nn.ParameterList([empty(self.width) for _ in self.features])
        thresholds = self.features if settings.activation == "jumprelu" else []
        self.log_theta = nn.ParameterList([empty(n) for n in thresholds])
        self.W_skip = nn.ParameterList([empty(self.width, d_model) for _ in self.features] if settings.skip else [])
        if seed is not None:
            self.reset_parameters(seed)

    # Shapes.

    def reach_at(self, l: int) -> int:
        """How many layers the features of covered layer `l` write to."""
        return min(self.reach, self.n_layers - l)

    @property
    def kind(self) -> str:
        """plt, clt or windowed."""
        if self.reach == 1:
            return "plt"
        return "clt" if self.reach == self.n_layers else "windowed"

    @property
    def device(self) -> torch.device:
        return self.b_dec[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.b_dec[0].dtype

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0, rank: int = 0, ranks: int = 1, decoders: bool = True) -> None:
        """Encoder U(+-1/sqrt F), decoder U(+-1/sqrt(L D)) or left at zero, biases zero, thresholds theta_init.

        Rows are drawn on the CPU, each block of them from a seed of its own: one of several parts of a transcoder draws
        its own rows alone, and gets what the whole would have there.
        """
        generator = torch.Generator()

        def uniform(name: str, parameter: Tensor, bound: float, dim: int = 0) -> None:
            own, first = len(parameter), 0 if dim else rank * len(parameter)
            width = list(parameter.shape[1:])
            if dim:
                width[dim - 1] *= ranks
            for block in range(first // _DRAWN_TOGETHER, -(-(first + own) // _DRAWN_TOGETHER)):
                begin = block * _DRAWN_TOGETHER
                generator.manual_seed(zlib.crc32(f"{seed}/{name}/{block}".encode()))
                noise = (2 * torch.rand((_DRAWN_TOGETHER, *width), generator=generator) - 1) * bound
                low, high = max(begin, first), min(begin + _DRAWN_TOGETHER, first + own)
                part = noise[low - begin : high - begin]
                size = parameter.shape[dim]
                parameter[low - first : high - first] = part.narrow(dim, rank * size, size) if dim else part

        for l, size in enumerate(self.features):
            uniform(f"W_enc.{l}", self.W_enc[l], 1 / math.sqrt(size * ranks))
            if decoders:
                bound = 1 / math.sqrt(self.n_layers * self.d_model)
                uniform(f"W_dec.{l}", self.W_dec[l], bound, dim=2 if self.slices > 1 else 0)
        for log_theta in self.log_theta:
            log_theta.fill_(math.log(self.settings.theta_init))

    def theta(self, l: int) -> Tensor:
        """[F]: the thresholds of covered layer `l`; zero where the activation has none."""
        if len(self.log_theta):
            return self.log_theta[l].exp()
        return torch.zeros_like(self.b_enc[l])

    def decoder_norms(self, l: int) -> Tensor:
        """[F]: the norm of each feature's decoder row, all its layers together, with gradient."""
        return torch.linalg.vector_norm(self.W_dec[l].float() if self.dtype.itemsize < 4 else self.W_dec[l], dim=(1, 2))

    def without_gradients(self, device: torch.device | str) -> "Transcoder":
        """The same weights on a device, to be used and not trained; this transcoder stays as it is."""

        def moved(weights: nn.Module) -> nn.Module:
            if isinstance(weights, nn.ParameterList):
                return nn.ParameterList(nn.Parameter(p.detach().to(device), requires_grad=False) for p in weights)
            rows = [copy(row) for row in weights.children()]
            for row in rows:
                row._buffers = dict(row._buffers)
            return nn.ModuleList(rows).to(device)

        other = copy(self)
        other._modules = {name: moved(weights) for name, weights in self._modules.items() if weights is not None}
        return other

    # Stages.

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """x [..., L, D] -> per layer h_l [..., F], in float32 or better whatever the autocast dtype."""
        return [self.preactivation(x[..., l, :], l) for l in range(self.n_layers)]

    def preactivation(self, x: Tensor, l: int) -> Tensor:
        """x [..., D] -> h_l [..., F]."""
        wide = torch.promote_types(x.dtype, self.W_enc[l].dtype)  # weights may be stored in fewer bits than x has
        h = F.linear(x.to(wide), self.W_enc[l].to(wide), self.b_enc[l].to(wide))
        return h.float() if h.dtype.itemsize < 4 else h

    def activate(
        self, h: list[Tensor], thresholds: Sequence[Tensor] | None = None, comm: Collectives = SINGLE
    ) -> list[Tensor]:
        """h_l [B, F] -> a_l [B, F]. `thresholds` ([], [F] or [B, 1] a layer) take the place of the activation's own;
        what a threshold cannot do, a shift does: relu has none, and below zero there is nothing left to let in."""
        if self.settings.activation in TOPK:
            chosen = self.select(h, comm) if thresholds is None else thresholds
            return [keep_reaching(h_BF, tau) for h_BF, tau in zip(h, chosen, strict=True)]
        if thresholds is not None:
            pairs = [(h_BF - self._shift(tau), tau) for h_BF, tau in zip(h, thresholds, strict=True)]
            relu = self.settings.activation == "relu"
            return [h_BF.relu() if relu else keep_reaching(h_BF, tau) for h_BF, tau in pairs]
        if self.settings.activation == "relu":
            return [h_BF.relu() for h_BF in h]
        return [
            jumprelu(h_BF, self.theta(l), self.settings.bandwidth, self.settings.ste_reaches_h)
            for l, h_BF in enumerate(h)
        ]

    def _shift(self, threshold: Tensor) -> Tensor:
        """What a calibrated threshold takes off the pre-activations: all of it for relu, else what is negative."""
        return threshold if self.settings.activation == "relu" else threshold.clamp_max(0)

    def select(self, h: list[Tensor], comm: Collectives = SINGLE, k: float | None = None) -> list[Tensor]:
        """The thresholds by which topk ([B, 1] a layer) or batchtopk ([] a layer) choose among these tokens."""
        ks = self.settings.ks(self.n_layers) if k is None else [k] * len(h)
        rows = h[0].shape[0] * comm.data_ranks
        if self.settings.activation == "topk":
            return [topk_threshold(h_BF, round(k_l), comm) for h_BF, k_l in zip(h, ks, strict=True)]
        if self.settings.k_scope == "layer":
            pairs = zip(h, ks, strict=True)
            return [batchtopk_threshold([h_BF], max(1, round(k_l * rows)), comm) for h_BF, k_l in pairs]
        return [batchtopk_threshold(h, max(1, round(sum(ks) * rows)), comm)] * len(h)

    def encode(self, x: Tensor, sparse: bool = False, thresholds: Sequence[Tensor] | None = None) -> Any:
        """x [B, L, D] -> per layer a_l: [B, F], or SparseActs with `sparse`."""
        acts = self.activate(self.preactivations(x), thresholds)
        return [to_sparse(acts_BF) for acts_BF in acts] if sparse else acts

    def encode_layer(self, x: Tensor, l: int) -> Tensor:
        """x [..., D] of covered layer `l` -> a_l [..., F], each token for itself."""
        if self.settings.activation == "batchtopk":
            raise UserError("a batchtopk transcoder has no activation for a lone token: fold it first")
        h = self.preactivation(x, l)
        if self.settings.activation == "jumprelu":
            return h * (h > self.theta(l))
        return (
            h.relu()
            if self.settings.activation == "relu"
            else keep_reaching(h, topk_threshold(h, self.settings.ks(self.n_layers)[l]))
        )

    def decode_from(self, l: int, acts: Tensor | SparseActs) -> Tensor:
        """What covered layer `l` writes: [B, reach_l, D], for dense or sparse activations."""
        decoders = self.W_dec[l]
        if isinstance(decoders, StoredRows):
            decoders, acts = decoders.used_by(acts)
        rows_FE = decoders.flatten(1)
        if isinstance(acts, SparseActs):
            weights = acts.values.to(rows_FE.dtype)
            written = F.embedding_bag(acts.indices, rows_FE, mode="sum", per_sample_weights=weights)
        else:
            written = acts @ rows_FE if torch.is_autocast_enabled(rows_FE.device.type) else acts.to(rows_FE) @ rows_FE
        return written.unflatten(-1, (self.reach_at(l), self.width))

    def decode_features(self, acts: Iterable[Tensor | SparseActs]) -> list[Tensor]:
        """Per target layer [B, D]: the features' part alone, no bias and no skip (so, what shards add up)."""
        written: list[Tensor | None] = [None] * self.n_layers
        for l, acts_l in enumerate(acts):
            part = self.decode_from(l, acts_l)
            # Layers add up in float32, whatever they are computed in.
            for offset, part_BD in enumerate((part.float() if part.dtype.itemsize < 4 else part).unbind(-2)):
                before = written[l + offset]
                written[l + offset] = part_BD if before is None else before + part_BD
        return [part.to(self.dtype) for part in written if part is not None]

    def decode(self, acts: Acts, x: Tensor | None = None) -> Tensor:
        """Activations of every layer -> y^ [B, L, D]; a transcoder with skip needs `x` too."""
        y = torch.stack(self.decode_features(acts), dim=-2) + torch.stack(list(self.b_dec))
        return y + self.skip(x) if len(self.W_skip) else y

    def skip(self, x: Tensor | None) -> Tensor:
        """[..., L, D]: x_t W_skip_t^T."""
        if x is None:
            raise ValueError("a transcoder with skip decodes from x as well: decode(acts, x)")
        return torch.stack([F.linear(x[..., l, :], self.W_skip[l]) for l in range(self.n_layers)], dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> y^ [B, L, D]."""
        return self.decode(self.encode(x), x)

    # Export.

    @torch.no_grad()
    def folded(
        self, in_scale: Tensor, out_scale: Tensor, thresholds: Sequence[Tensor | float] | None = None
    ) -> "Transcoder":
        """The same map on raw activations: reads x where this one reads x * in_scale, writes y^ / out_scale ([L] each).

        Pre-activations, and so thresholds, keep their values: the scales go into the encoder's and decoder's weights.
        batchtopk becomes jumprelu with the given `thresholds`, a number or [F] per layer (see `activate`); so does topk
        where they are given.
        """
        settings = replace(self.settings, theta_init=max(self.settings.theta_init, 1e-6))
        if self.settings.activation == "batchtopk" and thresholds is None:
            raise ValueError("batchtopk chooses among the tokens of a batch: give calibrated thresholds")
        if self.settings.activation in TOPK and thresholds is not None:
            settings = replace(settings, activation="jumprelu")
        other = Transcoder(
            settings, self.d_model, self.layers, seed=None, device=self.device, dtype=self.dtype, meta=self.meta,
            slices=self.slices,
        )  # fmt: skip
        scale_in, scale_out = in_scale.to(self.b_dec[0]), out_scale.to(self.b_dec[0])
        for l in range(self.n_layers):
            other.W_enc[l].copy_(self.W_enc[l] * scale_in[l])
            other.b_enc[l].copy_(self.b_enc[l])
            other.W_dec[l].copy_(self.W_dec[l] / scale_out[l : l + self.reach_at(l), None])
            other.b_dec[l].copy_(self.b_dec[l] / scale_out[l])
            if len(other.W_skip):
                other.W_skip[l].copy_(self.W_skip[l] * (scale_in[l] / scale_out[l]))
            if thresholds is not None:
                theta = torch.as_tensor(thresholds[l], dtype=torch.float64)
                other.b_enc[l].sub_(self._shift(theta))
                if len(other.log_theta):
                    other.log_theta[l].copy_(theta.clamp_min(1e-30).log().expand(self.features[l]))
            elif len(other.log_theta):
                other.log_theta[l].copy_(self.log_theta[l])
        return other

    def save(self, folder: str | Path, meta: dict[str, Any] | None = None) -> Path:
        """Write transcoder.safetensors and transcoder.json. A saved transcoder reads and writes raw activations."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        # aside and renamed: a transcoder that was loaded from here still reads the old file
        save_file(tensors, folder / f"{WEIGHTS_FILE}.tmp")
        (folder / f"{WEIGHTS_FILE}.tmp").replace(folder / WEIGHTS_FILE)
        self.describe(folder / DESCRIPTION_FILE, meta)
        return folder

    def describe(self, path: Path, meta: dict[str, Any] | None = None) -> None:
        """Write transcoder.json alone."""
        description = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "reach": self.reach,
            "activation": self.settings.activation,
            "sites": {"read": self.settings.read, "write": "mlp_out"},
            "d_model": self.d_model,
            "layers": self.layers,
            "features": self.features,
            "settings": asdict(self.settings),
            "meta": self.meta | (meta or {}),
        }
        path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        lazy_decoders: bool = False,
    ) -> "Transcoder":
        """Read what `save` wrote. On a CPU weights are mapped from the file: what is never used takes no memory.
        With `lazy_decoders` the decoders stay in the file, and a prompt's active features alone are read."""
        folder = Path(folder)
        try:
            description = json.loads((folder / DESCRIPTION_FILE).read_text())
            tensors = read_weights(folder / WEIGHTS_FILE, device, leave="W_dec." if lazy_decoders else None)
            if not isinstance(description, dict):
                raise json.JSONDecodeError(f"{DESCRIPTION_FILE} is no object", "", 0)
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no transcoder ({error})") from error
        except (json.JSONDecodeError, SafetensorError) as error:
            raise UserError(f"{folder} holds a damaged transcoder ({error}); write it again") from error
        if description.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{folder} has transcoder format {description.get('format_version')}; this version reads 1")
        known = {field.name for field in fields(TranscoderSettings)}
        settings = TranscoderSettings(**{k: v for k, v in description["settings"].items() if k in known})
        stored = next(iter(tensors.values())).dtype
        transcoder = cls(
            settings,
            description["d_model"],
            description["layers"],
            seed=None,
            device="meta",
            dtype=dtype or stored,
            meta=description["meta"],
        )
        if lazy_decoders:
            names = [f"W_dec.{l}" for l in range(transcoder.n_layers)]
            transcoder.W_dec = nn.ModuleList(StoredRows(folder / WEIGHTS_FILE, name) for name in names).to(device)  # type: ignore[assignment]
        # each weight keeps the dtype that it is stored in: thresholds may have more bits than decoders
        given = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
        transcoder.load_state_dict(given, assign=True)
        return transcoder if dtype is None else transcoder.to(dtype)
