"""The GPU that a kernel is launched on."""

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
