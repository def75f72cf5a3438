"""The GPU that a kernel is launched on, and what is copied to one."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_NOWHERE_ELSE = contextlib.nullcontext()


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.get_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(tensor.device)


def ready(what: str, tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which `device` copies without the host, which from any other may wait for the GPU.

    Raises ValueError while a graph is captured: each replay would read the host's memory anew, whosever it is by then.
    """
    if tensor.device.type != "cpu" or (device.type == "cuda" and tensor.is_pinned()):
        return tensor
    if captures(device):
        raise ValueError(
            f"{what} are on the host, from where a graph that is captured would read them again at each replay; do "
            "this once before the capture"
        )
    return tensor.pin_memory() if device.type == "cuda" else tensor


def captures(device: torch.device) -> bool:
    """Whether a graph is captured there now."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False  # a build of torch without CUDA cannot be asked more
    return torch.cuda.is_current_stream_capturing()


def sent(what: str, tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, by a copy for which the host does not wait.   what: for the errors of `ready`"""
    return ready(what, tensor, device).to(device, non_blocking=True)
