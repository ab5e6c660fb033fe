"""A GPU that is not there: tensors that say `cuda`, keep their numbers on the CPU, and refuse what a GPU would refuse.

    python pretended_gpu.py COMMANDS        # crosslace commands on it: a JSON list of lists of words

PyTorch's own fake tensors have shapes alone, and end where a program looks at a number; these go the whole way. Every
operation on them runs on the CPU and gives such tensors again. One that meets a CPU tensor of more than one number
ends in PyTorch's words for that.
"""

import json
import sys
import threading
from contextlib import nullcontext
from importlib import import_module
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Here places may come from the CPU."""


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU."""

    there: torch.Tensor
    device, is_cuda, is_meta = CUDA, True, False
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore

    @staticmethod
    def __new__(cls, there: torch.Tensor) -> "OnGPU":
        made = torch.Tensor._make_wrapper_subclass(
            cls, there.size(), strides=there.stride(), storage_offset=there.storage_offset(), dtype=there.dtype,
            device="meta",  # which autograd knows how to go back through without a GPU
        )  # fmt: skip
        made.there = there
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.there.tolist()

    # From lists PyTorch would make tensors without numbers, as for its own device of that kind.
    def __getitem__(self, at):
        return super().__getitem__(listed(at))

    def __setitem__(self, at, value) -> None:
        super().__setitem__(listed(at), listed(value))

    def new_tensor(self, numbers, dtype: torch.dtype | None = None, device=CUDA) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype or self.dtype, device=device)

    def __repr__(self, **_: object) -> str:
        return f"OnGPU({self.there!r})"


def listed(at):
    """An index, or what is put there, with tensors in place of lists."""
    if isinstance(at, tuple):
        return tuple(map(listed, at))
    return torch.tensor(list(at), dtype=None if len(at) else torch.long) if isinstance(at, list | range) else at


operations = 0


def run(func, args, kwargs):
    """The operation on the CPU, with its result where a GPU's would be."""
    global operations
    if func._can_decompose():  # in inference mode operations come as they were written
        with Machine():
            return func.decompose(*args, **kwargs)
    alike = (args[0], args[2:]) if func in INDEXED else (args, kwargs)
    given = [x for x in tree_leaves(alike) if isinstance(x, torch.Tensor)]
    ours = [x for x in given if on_gpu(x)]
    if func in INDEXED and not ours and any(on_gpu(x) for x in args[1] if x is not None):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if ours and func not in COPIES:
        for x in given:
            if not on_gpu(x) and (x.dim() or x.device.type != "cpu"):
                raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu ({func})")
    if func is aten._fused_sdp_choice.default:
        return 0  # the way of plain products, which any device has
    asked = kwargs.get("device")
    if func is aten.copy_.default:
        here = on_gpu(args[0])
    elif asked is not None:
        here = torch.device(asked).type != "cpu"
    else:
        here = bool(ours)
    inside = lambda x: x.there if isinstance(x, OnGPU) else x
    kwargs_cpu = tree_map(inside, kwargs)
    if asked is not None and here:
        kwargs_cpu["device"] = torch.device("cpu")
    if kwargs_cpu.get("pin_memory"):
        kwargs_cpu["pin_memory"] = False
    found = func(*tree_map(inside, args), **kwargs_cpu)
    if not here:
        return found
    operations += 1
    found = tree_map(lambda x: moved(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if isinstance(found, OnGPU) and ours else found


def on_gpu(x: torch.Tensor) -> bool:
    return isinstance(x, OnGPU) or hasattr(x, "on_gpu")


def moved(x: torch.Tensor) -> torch.Tensor:
    """The tensor, on the GPU: those of indices and values stay what they are and are marked."""
    if x.layout is not torch.strided:
        x.on_gpu = True  # type: ignore[attr-defined]
        return x
    return x if isinstance(x, OnGPU) else OnGPU(x)


class Machine(TorchDispatchMode):
    """What is made on `cuda` is such a tensor, in every thread."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Timeless:
    """Streams and events, where nothing runs by itself."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *_, **__: 0.0


def install() -> None:
    # first: what PyTorch itself looks up on import should meet no stand-in
    products = import_module("crosslace.train.sparse.products")

    nothing = lambda *_, **__: None
    stand_ins = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": nothing, "synchronize": nothing,
        "Stream": Timeless, "Event": Timeless, "current_stream": Timeless, "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(), "mem_get_info": lambda *_: (2**33, 2**33), "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "empty_cache": nothing,
        "reset_peak_memory_stats": nothing, "get_device_name": lambda *_: "pretended", "current_device": lambda: 0,
        "is_bf16_supported": lambda *_: True, "_lazy_init": nothing,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        mock.patch.object(torch.cuda, name, stand_in).start()
    mock.patch.object(torch.Tensor, "record_stream", nothing).start()
    mock.patch.object(products, "_has_triton", lambda: False).start()
    on_cpu = torch.Generator
    mock.patch.object(torch, "Generator", lambda device="cpu": on_cpu()).start()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes its numbers on the CPU first
    started = threading.Thread.run

    def in_mode(thread: threading.Thread) -> None:
        with Machine():
            started(thread)

    mock.patch.object(threading.Thread, "run", in_mode).start()


if __name__ == "__main__":
    install()
    from crosslace.launch.cli.main import main

    for words in json.loads(sys.argv[1]):
        operations = 0
        with Machine():
            if code := main(words):
                sys.exit(code)
        print(json.dumps({"verb": words[0], "operations": operations}))
