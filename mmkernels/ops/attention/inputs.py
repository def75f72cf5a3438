"""What the operator hands to each implementation, and what an implementation plans for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels import tracing


class Request(NamedTuple):
    """What a schedule is made for, besides the mask: the key under which it is kept on the plan."""

    dtype: torch.dtype
    head_dim: int
    needs_backward: bool
    deterministic: bool
    extras: bool  # pair bias, dropout or modality mass: more registers per tile


class Lowered(NamedTuple):
    """The mask and how to walk it.   Tq queries, Tk keys.

    q_table  int32 [4, Tq]: kv_lo, kv_hi, q_bits, q_modality of the MaskPlan
    k_table  int32 [4, Tk]: q_lo, q_hi, k_bits, k_modality
    The six schedule tensors and `config` hold what the implementation's own `schedule` made of the plan: tiles, spans
    and block shapes of the Triton kernels, or runs of the CPU path.
    """

    q_table: Tensor
    k_table: Tensor
    fwd_tiles: Tensor
    fwd_spans: Tensor
    dq_tiles: Tensor
    dq_spans: Tensor
    dkdv_tiles: Tensor
    dkdv_spans: Tensor
    config: list[int]
    scale: float
    has_visible: bool
    dropout_p: float


def uses_tf32(q: Tensor) -> bool:
    """Whether Triton's products of fp32 inputs are in TF32: only where the user has turned torch's own on."""
    return q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def held(**tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with numbers in memory, which torch's kernels take on trust; ValueError where it was freed."""
    for name, tensor in tensors.items():
        if tensor is not None:
            tracing.refuse_freed("attention", name, tensor)
    return [t.clone() if t is not None and t._is_zerotensor() else t for t in tensors.values()]
