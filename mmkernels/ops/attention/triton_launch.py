"""What each launch of the Triton attention kernels shares: device, precision and strides."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


def on_device(q: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def precision(q: Tensor) -> str:
    """fp32 products are true fp32 unless the user has turned torch's own TF32 on."""
    return "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:2])
