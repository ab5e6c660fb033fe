"""Many processes as one: a mesh of data ranks and feature ranks, and the collectives that training asks of it.

    data rank d      reads rows d, d + n, ... of each batch; gradients are averaged over data ranks
    feature rank f   holds features f F/m ... (f + 1) F/m of every layer: encoder, biases, thresholds and their moments;
                     and of the decoders either its features' rows, or its D/m slice of every feature's (`exchange`)

What flows between processes in a step, for B tokens a data rank:
    all_reduce_features      exchange=reconstructions: [B, L, D], once, forward; nothing backward
    all_gather_features      exchange=actives: the active entries' values and places, forward (train/sparse/sharing.py)
    reduce_scatter_features  exchange=actives: the gradients of those values, backward
    top_threshold            counts, by which batchtopk's choice is the one of the whole batch (kth_largest.py)
    row_threshold            the same for each token: topk, and the auxiliary loss
    reduce_gradients         each parameter's gradient over data ranks, in buckets

The mathematics stands in `collectives.py`; this module alone knows process groups.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...data.errors import SettingsError, UserError, check_choice, check_range
from .collectives import SINGLE, Collectives
from .kth_largest import kth_largest

BUCKET_BYTES = 32 * 2**20
"""Gradients are averaged this much at a time: large enough to fill a link, small beside a dictionary."""


_LOST = (
    "another process of this job ended or went silent, and this one cannot go on without it; the message of that one "
    "says why, and the same command goes on from the newest checkpoint"
)

_AXES = ("data", "features")
EXCHANGES = ("auto", "reconstructions", "actives")


@dataclass(frozen=True)
class ParallelSettings:
    """Several processes, started by `torchrun` or `accelerate launch`."""

    data: int = 1
    """Processes that read different rows."""

    features: int = 1
    """Processes that share each layer's features."""

    exchange: str = "auto"
    """What processes that share features send to each other: reconstructions, or actives (active features and their
    values; each process then holds a slice of every decoder). auto times both at the start, where
    the plan allows both, and takes the faster."""

    timeout: int = 600
    """Seconds after which a process that waits for the others gives up."""

    def __post_init__(self) -> None:
        check_range("parallel.data", self.data, low=1)
        check_range("parallel.features", self.features, low=1)
        check_choice("parallel.exchange", self.exchange, EXCHANGES)
        check_range("parallel.timeout", self.timeout, low=1)

    @property
    def processes(self) -> int:
        return self.data * self.features

    @classmethod
    def as_started(cls) -> "ParallelSettings":
        """All the processes that there are read different rows: for work that cuts no features."""
        return cls(data=started())


class FirstFailure(UserError):
    """The mistake that ended a job of several processes, on the process that met it first: this one tells the user."""


class PeerLost(UserError):
    """Another process ended before this one: whatever went wrong, it knows."""


def started() -> int:
    """How many processes torchrun or accelerate started, by the environment; one without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device | str = "cpu", timeout: int = 600) -> bool:
    """Meet the other processes that were started; True where they had not met before. Nothing to do for one alone."""
    if started() == 1 or dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    patience = timedelta(seconds=timeout)
    dist.init_process_group(backend, timeout=patience, **_own_store(patience))
    return True


def leave() -> None:
    """Part from the others, at the end of a command."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def processes(
    settings: ParallelSettings,
    device: torch.device | str = "cpu",
    moved: Mapping[str, Mapping[str, float]] | None = None,
) -> Iterator[Collectives]:
    """The collectives of this process in its mesh, for as long as the block runs. Where `exchange` is auto, the bytes
    that each would have this process hand in (`planning.choices`) are timed; without them reconstructions are taken."""
    if started() != settings.processes:
        raise SettingsError(
            f"parallel.data={settings.data} times parallel.features={settings.features} makes {settings.processes} "
            f"processes, and {started()} were started: use torchrun --nproc-per-node={settings.processes}"
        )
    if settings.processes == 1:
        yield SINGLE
        return
    joined_here = False
    try:
        joined_here = join(device, settings.timeout)
        kind = torch.device(device).type
        mesh = init_device_mesh(kind, (settings.data, settings.features), mesh_dim_names=_AXES)
        comm = MeshCollectives(mesh)
        timed = settings.exchange == "auto" and len(moved or {}) > 1
        chosen = faster_exchange(comm, moved or {}) if timed else settings.exchange
        comm.slices = settings.features if chosen == "actives" else 1
        yield comm
    except UserError as error:
        raise (FirstFailure(str(error)) if _first_to_fail() else PeerLost(_LOST)) from error
    except RuntimeError as error:
        if not _from_network(error):
            raise
        raise PeerLost(_LOST) from error
    finally:
        if joined_here:
            leave()


def faster_exchange(
    comm: "MeshCollectives", moved: Mapping[str, Mapping[str, float]], clock: Callable[[], float] = perf_counter
) -> str:
    """Of `reconstructions` and `actives`, the one whose bytes take less time between these processes, the slowest of
    them; each is timed twice, the second time counts."""
    does: dict[str, Callable[[Tensor], Tensor]] = {
        "reconstructions": comm.all_reduce_features,
        "actives": comm.all_gather_features,
        "active_gradients": lambda x: comm.reduce_scatter_features(x.view(comm.feature_ranks, -1)),
    }
    seconds = torch.zeros(len(moved))
    for number, flows in enumerate(moved.values()):
        sizes = {name: -(-int(size) // (4 * comm.feature_ranks)) * comm.feature_ranks for name, size in flows.items()}
        numbers = {name: torch.zeros(size, device=comm.device) for name, size in sizes.items()}
        for _ in range(2):
            comm.barrier()
            begun = clock()
            for name, x in numbers.items():
                does[name](x)
            if comm.device.type == "cuda":
                torch.cuda.synchronize(comm.device)
            seconds[number] = clock() - begun
    return list(moved)[int(comm.max_all(seconds).argmin())]


def _own_store(patience: timedelta) -> dict[str, Any]:
    """torchrun's agents keep their store when they start processes anew, and what the dead ones wrote there would
    mislead the living: each start uses a part of its own. Agents on several machines count starts differently: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start a new store (docs/clusters.md)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    prefix = f"crosslace/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(prefix, store), "rank": int(os.environ["RANK"]), "world_size": started()}


def _first_to_fail() -> bool:
    """Whether no other process has failed before; where nobody can be asked any more, one has."""
    try:
        return dist.is_initialized() and dist.distributed_c10d._get_default_store().add("crosslace/failed", 1) == 1
    except RuntimeError:
        return False


def _from_network(error: RuntimeError) -> bool:
    """Gloo's errors have no type of their own; they name the place in its source."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


class _SumForward(torch.autograd.Function):
    """All-reduce forward, identity backward.

    Every feature rank computes the same loss from the same sum, so the gradient of the sum is already whole on each:
    reducing it again would make it m times too large.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _everyone() -> dist.ProcessGroup:
    """All processes, by way of their hosts. Files of hundreds of gigabytes take longer than any step: nobody gives up
    while they are written."""
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
    assert isinstance(group, dist.ProcessGroup)  # anything else is for those whom a group leaves out
    return group


class MeshCollectives:
    """`Collectives` over a DeviceMesh (data, features). Counts the bytes that this process hands in, by method."""

    def __init__(self, mesh: DeviceMesh, slices: int = 1) -> None:
        self.mesh, self.slices = mesh, slices
        self.device = torch.device(mesh.device_type)
        self._data, self._features = mesh.get_group("data"), mesh.get_group("features")
        self.data_ranks, self.feature_ranks = mesh.shape
        self.data_rank, self.feature_rank = dist.get_rank(self._data), dist.get_rank(self._features)
        self.files, self._host = _everyone(), _everyone()
        on_host = mesh.device_type == "cpu"
        self._host_mesh = mesh if on_host else init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=_AXES)
        self.sent: dict[str, int] = {}

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def _count(self, what: str, x: Tensor) -> None:
        self.sent[what] = self.sent.get(what, 0) + x.numel() * x.element_size()

    def _reduced(self, what: str, x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The reduction as a new tensor where `x` lies, computed where the mesh communicates."""
        total = x.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        self._count(what, total)
        dist.all_reduce(total, op=op, group=group)
        return total.to(x.device)

    def all_reduce_features(self, x: Tensor) -> Tensor:
        if self.feature_ranks == 1:
            return x
        if not x.requires_grad:
            return self._reduced("all_reduce_features", x, self._features)
        self._count("all_reduce_features", x)
        result = _SumForward.apply(x, self._features)
        assert isinstance(result, Tensor)
        return result

    def all_reduce_data(self, x: Tensor) -> Tensor:
        return x.detach() if self.data_ranks == 1 else self._reduced("all_reduce_data", x, self._data)

    def mean_data(self, x: Tensor) -> Tensor:
        return x.detach() if self.data_ranks == 1 else self.all_reduce_data(x) / self.data_ranks

    def max_all(self, x: Tensor, files: bool = False) -> Tensor:
        if files:
            most = x.clone()
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.files)
            return most
        return self._reduced("max_all", x, None, dist.ReduceOp.MAX)

    def reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        if self.data_ranks == 1:
            return
        for bucket in _buckets([p for p in parameters if p.numel()]):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self._count("reduce_gradients", bucket[0])  # large: no copy
                dist.all_reduce(bucket[0], group=self._data)
                bucket[0] /= self.data_ranks
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self._count("reduce_gradients", flat)
            dist.all_reduce(flat, group=self._data)
            flat /= self.data_ranks
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def top_threshold(self, values: Tensor, count: int) -> Tensor:
        add = partial(self._reduced, "top_threshold", group=None)
        return kth_largest(values.detach().reshape(1, -1), count, add, bits=8)[0, 0]

    def row_threshold(self, h_BF: Tensor, k: int) -> Tensor:
        own = h_BF.detach().topk(min(k, h_BF.shape[-1]), dim=-1).values
        if self.feature_ranks == 1:
            return own[..., -1:]
        return kth_largest(own, k, partial(self._reduced, "row_threshold", group=self._features), bits=4)

    def _gathered(self, what: str, x: Tensor, group: Any, ranks: int) -> Tensor:
        """[ranks, ...]: every rank's tensor."""
        own = x.detach().to(self.device).contiguous()
        self._count(what, own)
        gathered = own.new_empty(ranks, *own.shape)
        dist.all_gather(list(gathered), own, group=group)
        return gathered.to(x.device)

    def cat_features(self, x: Tensor, dim: int = 0) -> Tensor:
        if self.feature_ranks == 1:
            return x
        return torch.cat(list(self._gathered("cat_features", x, self._features, self.feature_ranks)), dim)

    def all_gather_features(self, x: Tensor) -> Tensor:
        if self.feature_ranks == 1:
            return x.detach()[None]
        return self._gathered("all_gather_features", x, self._features, self.feature_ranks)

    def reduce_scatter_features(self, x: Tensor) -> Tensor:
        if self.feature_ranks == 1:
            return x.detach()[0]
        parts = x.detach().to(self.device).contiguous()
        self._count("reduce_scatter_features", parts)
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, list(parts), group=self._features)
        return own.to(x.device)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard  # takes longer than all else here

        mesh = self.mesh if x.device.type == self.mesh.device_type else self._host_mesh
        return DTensor.from_local(x.detach(), mesh, [Replicate(), Shard(dim)], run_check=False)

    def barrier(self, files: bool = False) -> None:
        dist.barrier(group=self.files if files else self._host)

    def broadcast(self, value: Any) -> Any:
        """As JSON: nothing but plain values travels."""
        text = torch.tensor(list(json.dumps(value).encode()) if self.is_main else [], dtype=torch.uint8)
        length = torch.tensor([text.numel()])
        dist.broadcast(length, 0, group=self._host)
        text = text if self.is_main else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self._host)
        return json.loads(bytes(text.tolist()))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type in groups of about BUCKET_BYTES, in order; a larger one by itself."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        nbytes = gradient.numel() * gradient.element_size()
        if bucket and (size + nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += nbytes
    if bucket:
        yield bucket
