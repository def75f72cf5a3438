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


def ready(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which `device` copies without the host: no graph capture takes another copy."""
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()
