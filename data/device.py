"""Which device a setting means, for this process among those that torchrun or `accelerate launch` started."""

import os

import torch
from torch import Tensor

from .errors import SettingsError, UserError


def find_device(name: str, setting: str = "model.device") -> torch.device:
    """The device of this name. `auto` is this process's own GPU, with its number, and the CPU where there is none (or
    where an `accelerate` configuration asks for the CPU); a Mac's GPU is taken by its name only."""
    if name == "auto":
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return torch.device("cpu") if on_cpu or not torch.cuda.is_available() else own_gpu()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"{setting}={name} is not known; it takes auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(f"{setting}={name} needs a Mac with Metal; there is none")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "none"
        raise SettingsError(f"{setting}={name} needs a GPU that torch can see; there is {found}")
    return own_gpu() if device.type == "cuda" and device.index is None else device


def own_gpu() -> torch.device:
    """The GPU with this process's number on its machine. Where a scheduler shows each process one GPU, it is that."""
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if there == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        number = 0
    if number >= there:
        raise UserError(
            f"process {number} of this machine has no GPU of its own: there are {there}; start as many processes as "
            "there are GPUs"
        )
    return torch.device("cuda", number)


def widest(device: torch.device | str) -> torch.dtype:
    """float64; float32 on Apple's MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """In float64 where it lies, or on the CPU where its device has no such numbers (a Mac's GPU)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
