"""The step that never touches a zero: stages 1 to 3 of `objective.py` on active entries alone.

    1. pre-activations   one dense product a layer, [B, F]; the one thing of that size, dropped as soon as
    2. active set        the entries that fire or lie in the estimator's window are listed (train/sparse/active_set.py)
    3. decode            y^_r = sum over a row's entries of a * W_dec[feature]: a row is a feature's whole decoder

and backwards, with N entries in place of B x F:

    d a_j     = d y_row(j) . W_dec[feature(j)]           the two share one pass over the decoder, by feature;
    d W_dec_f = sum over f's entries of a_j d y_row(j)   the gradient of the decoder's norm joins in it
    d W_enc_f = sum over f's entries of d h_j x_token(j)

All between the list of pre-activations and the losses is ordinary autograd on [N]. The pre-activation penalty covers
silent entries, which no list holds; it follows from sums: relu(theta - h) = (theta - h) + relu(h - theta), the first
part summed over tokens in closed form, the second one zero outside the active set.

The auxiliary reconstruction shares the passes: its entries write to B further rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..loss import Objective, Pass, StepInputs
from ..parallel import SINGLE, Collectives
from ..transcoder import Transcoder, add_written, jumprelu, whole_norms
from .active_set import (
    Chosen,
    Rule,
    choose_above,
    choose_active,
    choose_dead,
    choose_largest,
    choose_topk,
    compact,
    is_absent,
    just_below,
    keep_reaching,
    largest_values,
    read_freely,
)
from .entries import Entries, RowGradient
from .products import backend, gather_sum, make_entries, row_norms
from .row_gradients import RowGradients
from .sharing import share_entries
from .workspace import UNEVEN, Memory, Workspace

# Share of entries listed up to which the sparse step is taken. On a CPU the two take equally long at 0.3 to 0.36 on one
# thread (docs/fast_path.md); on one GPU a run measures it; on a mesh of GPUs it is an estimate.
SPARSE_BELOW = {"cpu": 0.2, "cuda": 0.02}


def use_sparse(switch: str, density: float, device: torch.device | str, break_even: float = 0.0) -> bool:
    """Whether to take the sparse step: `on`, `off`, or `auto` by the share of entries that are listed, against the
    break-even where it was measured."""
    if switch != "auto":
        return switch == "on"
    if break_even:
        return density < break_even
    return density < SPARSE_BELOW.get(torch.device(device).type, 0.02)


class _Preactivations(torch.autograd.Function):
    """h at the entries, already computed: [N], and its sum over tokens: [F]. The encoder's gradient from theirs."""

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc: Tensor, b_enc: Tensor, h: Tensor, h_sum: Tensor | None,
        entries: Entries, memory: Memory,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.save_for_backward(x_BD, W_enc, b_enc)
        ctx.entries, ctx.memory = entries, memory
        ctx.set_materialize_grads(False)
        return h.view_as(h), None if h_sum is None else h_sum.view_as(h_sum)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BD, W_enc, b_enc = ctx.saved_tensors
        entries: Entries = ctx.entries
        grad_b, grad_h = torch.zeros_like(b_enc), b_enc.new_zeros(len(entries.features))
        if grads[0] is not None:
            grad_h = grads[0].to(grad_b.dtype)
            if read_freely(grad_h):
                grad_b.index_add_(0, entries.features, grad_h)
            else:  # index_add_ is atomic there, in another order every time: sums over each feature's list are not
                ones, first = grad_h.new_ones(1, 1), torch.zeros_like(entries.order)
                gather_sum(ones, first, entries.feature_pointer, grad_h[entries.order], grad_b[:, None])
        left = right = None
        if grads[1] is not None:
            left, right = grads[1].to(grad_b.dtype), x_BD.sum(0, dtype=grad_b.dtype)
            grad_b.add_(left, alpha=x_BD.shape[0])
        tokens = entries.ordered_rows % x_BD.shape[0]  # auxiliary entries read the same tokens
        values = grad_h[entries.order]
        rows = RowGradient(x_BD, tokens, entries.feature_pointer, values, W_enc.detach(), None, left, right)
        return None, ctx.memory.gradient(W_enc, rows), grad_b, None, None, None, None


class _Decode(torch.autograd.Function):
    """All layers' features: y [tokens, L, D], what auxiliary entries write [R - tokens, L, D], and each layer's decoder
    norms [F] on request. (Slices of one y would cost five passes over tensors of its size on the way back.)"""

    @staticmethod
    def forward(
        ctx: Any, lists: list[Entries], n_rows: int, tokens: int, want_norms: bool, memory: Memory, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n_layers = len(lists)
        values, decoders = tensors[:n_layers], tensors[n_layers:]
        d_model = decoders[0].shape[-1]
        y = torch.zeros(n_rows, n_layers * d_model, dtype=values[0].dtype, device=values[0].device)
        for l, (entries, a, W) in enumerate(zip(lists, values, decoders, strict=True)):
            y_RC = y[:, l * d_model :][:, : W[0].numel()]
            gather_sum(W.flatten(1), *entries.by_row(a), y_RC, add=True)
        norms = [row_norms(W.flatten(1)) for W in decoders] if want_norms else []
        ctx.save_for_backward(*tensors, *norms)
        ctx.lists, ctx.memory, ctx.errors = lists, memory, _error_type(decoders[0])
        ctx.rows = tokens, n_rows - tokens
        ctx.set_materialize_grads(False)
        y = y.view(n_rows, n_layers, d_model)
        return y[:tokens], y[tokens:], *norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n_layers = len(ctx.lists)
        values, decoders = ctx.saved_tensors[:n_layers], ctx.saved_tensors[n_layers : 2 * n_layers]
        norms = ctx.saved_tensors[2 * n_layers :]
        d_model = decoders[0].shape[-1]
        empty = lambda n: decoders[0].new_zeros(n, n_layers * d_model)
        parts = [empty(n) if grad is None else grad.flatten(1) for n, grad in zip(ctx.rows, grads[:2]) if n]
        grad_RC = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(ctx.errors)
        grad_values, grad_decoders = [], []
        for l, (entries, a, W) in enumerate(zip(ctx.lists, values, decoders, strict=True)):
            grad_norm = grads[2 + l] if norms else None
            scale_F = None if grad_norm is None else torch.where(norms[l] > 0, grad_norm / norms[l], 0).to(W.dtype)
            columns = grad_RC[:, l * d_model :][:, : W[0].numel()]
            rows = RowGradient(
                columns, entries.ordered_rows, entries.feature_pointer, a[entries.order].to(W.dtype),
                W.detach().flatten(1), scale_F,
            )  # fmt: skip
            grad_a, grad_W = ctx.memory.gradients(W, rows, entries)
            grad_values.append(grad_a.to(a.dtype))
            grad_decoders.append(grad_W)
        return None, None, None, None, None, *grad_values, *grad_decoders


def _error_type(weight: Tensor) -> torch.dtype:
    """How the error rows are kept. They are gathered twice an entry, most of a GPU's traffic: where autocast would have
    the dense products take them in bfloat16, so do the kernels that take mixed types."""
    kind = weight.device.type
    halved = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if halved and backend(weight) == "triton" else weight.dtype


@dataclass(frozen=True)
class ListedActs:
    """The entries of one layer that matter, as a flat list; the interface of `objective.LayerActs`."""

    tokens: Tensor
    """[N]"""
    features: Tensor
    """[N]"""
    h: Tensor
    """[N], pre-activations with gradient; ABSENT in empty places, to which nothing reacts."""
    acts: Tensor
    """[N], activations with gradient; zero for entries in the window that do not fire."""
    h_sum: Tensor | None
    """[F], sum over tokens of all pre-activations, with gradient; where the pre-activation penalty needs it."""
    shape: tuple[int, int]
    """B, F"""
    found: Tensor | int
    """Entries there were: more than N if the capacity did not suffice."""

    def gather(self, per_feature: Tensor) -> Tensor:
        """[F] -> [N]: each entry's own."""
        return per_feature[self.features]

    def counts(self) -> Tensor:
        """[F]: tokens on which each feature fired."""
        fired = (self.acts.detach() > 0).to(torch.int64)
        return fired.new_zeros(self.shape[1]).index_add_(0, self.features, fired)

    def dense(self) -> Tensor:
        """[B, F]"""
        return self.acts.new_zeros(self.shape).index_put((self.tokens, self.features), self.acts, accumulate=True)


def listed_preactivation_penalty(layer: ListedActs, theta: Tensor, n: Tensor, over: Tensor | None = None) -> Tensor:
    """losses.preactivation_penalty without B x F terms: sum_i n_i (B theta_i - sum_b h_bi + sum_b relu(h - theta))."""
    assert layer.h_sum is not None
    weight = n if over is None else n * over
    silent = (weight * (layer.shape[0] * theta - layer.h_sum)).sum()
    active = (layer.gather(weight) * (layer.h - layer.gather(theta)).relu()).sum()
    return (silent + active) / layer.shape[0]


@torch.no_grad()
def _product(x_BD: Tensor, W_enc: Tensor, b_enc: Tensor, workspace: Workspace | None) -> Tensor:
    if torch.is_autocast_enabled(x_BD.device.type):
        h_BF = F.linear(x_BD, W_enc, b_enc)
        return h_BF.float() if h_BF.dtype.itemsize < 4 else h_BF
    out = None if workspace is None else workspace.scratch(x_BD.shape[0], W_enc.shape[0], W_enc)
    return torch.addmm(b_enc, x_BD, W_enc.T, out=out)


def _choose(
    h_BF: Tensor, rule: Rule, k: float, theta: Tensor | None, threshold: Tensor | None, capacity: int | None,
    comm: Collectives,
) -> Chosen:  # fmt: skip
    """The entries of one layer; for batchtopk among all layers, its candidates."""
    if rule.activation in ("relu", "jumprelu"):
        return choose_active(h_BF, rule, theta, capacity)
    if threshold is not None:
        return choose_above(h_BF, just_below(threshold, h_BF), capacity)
    if rule.activation == "topk":
        return compact(choose_topk(h_BF, round(k), comm), capacity)
    count = max(1, round(k * h_BF.shape[0] * comm.data_ranks))
    if rule.k_scope == "all" and not read_freely(h_BF):
        return choose_largest(h_BF, min(count, capacity or count))  # one layer's share of all layers' count
    largest = choose_largest(h_BF, count)
    if rule.k_scope == "all":
        return largest
    values = largest_values(largest, count, h_BF.numel())
    # with others, a rank lists as many as there are on all of them, and keeps its own
    return compact(keep_reaching(largest, comm.top_threshold(values, count).clamp_min(0)), capacity)


def sparse_pass(
    transcoder: Transcoder,
    x: Tensor,
    inputs: StepInputs,
    objective: Objective,
    comm: Collectives = SINGLE,
    workspace: Workspace | None = None,
    unformed: RowGradients | None = None,
) -> Pass:
    """Stages 1 to 3 on active entries: `objective.dense_pass` to rounding, values and gradients.

    Gradients that `unformed` asks for are left there, as lists.
    """
    settings, tokens = transcoder.settings, x.shape[0]
    if x.requires_grad:
        raise ValueError("the sparse step gives no gradient with respect to x: take the dense one")
    rule = Rule(settings.activation, settings.k_scope, settings.bandwidth, settings.ste_reaches_h)
    over_all = rule.activation == "batchtopk" and rule.k_scope == "all" and inputs.thresholds is None
    k = [sum(inputs.k) / len(inputs.k) * transcoder.n_layers] * transcoder.n_layers if over_all else inputs.k
    want_aux = bool(objective.aux_weight) and inputs.use_aux
    # On an accelerator these lists' lengths are not known by nature.
    by_count = rule.activation in ("topk", "batchtopk") and inputs.thresholds is None
    shared = comm.feature_ranks * comm.data_ranks > 1
    room = None
    if workspace is not None and not read_freely(x) and (not by_count or over_all or shared):
        room = workspace.room
    if room is not None and by_count:
        room.expect([round(UNEVEN * k_l * tokens / comm.feature_ranks) for k_l in inputs.k])
    alike = room is not None and room.of(0) is not None
    silent_room = workspace.silent_room if workspace is not None and want_aux and not read_freely(x) else None

    # 1 and 2, a layer at a time: h [B, F] goes as soon as its entries are known.
    main: list[Chosen] = []
    silent: list[Chosen] = []
    sums: list[Tensor | None] = []
    for l in range(transcoder.n_layers):
        theta = transcoder.theta(l) if rule.activation == "jumprelu" else None
        threshold = None if inputs.thresholds is None else inputs.thresholds[l]
        h_BF = _product(x[:, l], transcoder.W_enc[l], transcoder.b_enc[l], workspace)
        main.append(_choose(h_BF, rule, k[l], theta, threshold, room and room.of(l), comm))
        if want_aux:
            dead = choose_dead(h_BF, inputs.dead[l], objective.aux_k, comm)
            silent.append(dead if silent_room is None else compact(dead, silent_room.of(l)))
        sums.append(h_BF.sum(0) if objective.preactivation else None)
        del h_BF
    if over_all:
        count = max(1, round(k[0] * tokens * comm.data_ranks))
        sizes = [tokens * n for n in transcoder.features]
        if read_freely(x):
            values = [largest_values(chosen, count, n) for chosen, n in zip(main, sizes, strict=True)]
        else:
            values = [chosen.h for chosen in main]
        tau = comm.top_threshold(torch.cat(values), count).clamp_min(0)
        most = [min(count, n) for n in sizes]
        main = [keep_reaching(chosen, tau, cut=len(chosen.h) < n) for chosen, n in zip(main, most, strict=True)]

    if room is not None:
        room.note(_most_found(main, comm))
    if silent_room is not None:
        silent_room.note(_most_found(silent, comm))

    # 3. The lists become leaves of autograd, the decoders write what the entries hold.
    n_rows = 2 * tokens if want_aux else tokens
    memory = Memory(workspace, unformed)
    layers, lists, written, empty = [], [], [], []
    for l, chosen in enumerate(main):
        rows, features, h = chosen.tokens, chosen.features, chosen.h
        if want_aux:
            rows = torch.cat([rows, silent[l].tokens + tokens])
            features = torch.cat([features, silent[l].features])
            h = torch.cat([h, silent[l].h])
        absent = None if read_freely(h) else is_absent(h)
        entries = make_entries(rows, features, n_rows, transcoder.features[l], absent)
        encoder = transcoder.W_enc[l], transcoder.b_enc[l]
        h, h_sum = _Preactivations.apply(x[:, l], *encoder, h, sums[l], entries, memory)  # type: ignore[misc]
        n = len(chosen.h)
        acts = _activate(h[:n], rule, transcoder, l, chosen.features)
        shape = (tokens, transcoder.features[l])
        layers.append(ListedActs(chosen.tokens, chosen.features, h[:n], acts, h_sum, shape, chosen.found))
        lists.append(entries)
        empty.append(absent)
        written.append(torch.cat([acts, h[n:].relu()]) if want_aux else acts)
    want_norms = objective.needs_norms and inputs.norms is None
    lists, written = share_entries(lists, written, empty, comm, alike)
    given = lists, n_rows, tokens, want_norms, memory, *written, *transcoder.W_dec
    y, y_aux, *norms = _Decode.apply(*given)  # type: ignore[misc]
    y_hat = add_written(y.to(x.dtype), comm) + _nan_if_short([*main, *silent], torch.stack(list(transcoder.b_dec)))
    if len(transcoder.W_skip):
        y_hat = y_hat + transcoder.skip(x).to(x.dtype)

    norms = whole_norms(norms, comm) if want_norms else inputs.norms

    def preactivation(l: int, theta: Tensor, n: Tensor, over: Tensor | None) -> Tensor:
        return listed_preactivation_penalty(layers[l], theta, n, over)

    return Pass(y_hat, add_written(y_aux.to(x.dtype), comm) if want_aux else None, layers, norms, preactivation)


def _most_found(chosen: Sequence[Chosen], comm: Collectives) -> Tensor:
    """[L]: entries there were; where ranks exchange their lists, on the rank that had most, so that all are as long."""
    found = torch.stack([torch.as_tensor(layer.found, device=layer.h.device) for layer in chosen])
    return found if comm.slices == 1 else comm.max_all(found)


def _nan_if_short(chosen: Sequence[Chosen], b_dec: Tensor) -> Tensor:
    """b_dec [L, D], or NaN where a list was too short for its layer: a wrong step must not count."""
    if not any(isinstance(layer.found, Tensor) for layer in chosen):
        return b_dec
    short = [torch.as_tensor(layer.found > len(layer.h), device=b_dec.device) for layer in chosen]
    return b_dec.masked_fill(torch.stack(short).any(), torch.nan)


def _activate(h: Tensor, rule: Rule, transcoder: Transcoder, l: int, features: Tensor) -> Tensor:
    """[N] -> [N]: the transcoder's activation on chosen entries; topk kinds chose positive ones only."""
    if rule.activation != "jumprelu":
        return h.relu()
    return jumprelu(h, transcoder.theta(l)[features], rule.bandwidth, rule.ste_reaches_h)
