"""What each launch of the Triton attention kernels shares: precision, strides, dropout and descriptors."""

from __future__ import annotations

import functools

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels.ops.attention import triton_tiles
from mmkernels.ops.attention.configs import Config, padded
from mmkernels.ops.attention.inputs import uses_tf32
from mmkernels.ops.attention.tuned import MOST_ROWS
from mmkernels.philox import threshold

LOG2E = triton_tiles.LOG2E.value


def precision(q: Tensor) -> str:
    return "tf32" if uses_tf32(q) else "ieee"


def options(config: Config) -> dict[str, int]:
    """What a launch takes besides the kernel's arguments."""
    limit = {"maxnreg": config.registers} if config.registers else {}
    return {"num_warps": config.warps, "num_stages": config.stages, **limit}


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:2])


def in_reach(t: Tensor) -> Tensor:
    """t [T, heads, D], or a copy where a tile's last token lies so far from its first that int32 does not hold it.

    Kernels count from a tile's first token, which int64 finds: in int64 as well, each offset would take two registers.
    """
    return t if t.stride(0) < 2**31 // MOST_ROWS else t.contiguous()


@functools.lru_cache(maxsize=64)
def dropout_scalars(dropout_p: float) -> tuple[int, float]:
    """drop_threshold, as the int32 of its bits, so that its type does not depend on its value; keep_scale."""
    bits = threshold(dropout_p)
    return bits - (bits >> 31 << 32), 1.0 / (1.0 - dropout_p)


def descriptors(one: Tensor, other: Tensor, block: int, wanted: bool) -> tuple:
    """A descriptor of each, or None for both."""
    found = (descriptor(one, block), descriptor(other, block)) if wanted else (None, None)
    return found if None not in found else (None, None)


def descriptor(t: Tensor, block: int) -> TensorDescriptor | None:
    """Of blocks [block, 1, padded D] of t [T, heads, D]; None where the hardware cannot: t decides, on the host."""
    size = t.element_size()
    strided = all(stride > 0 and stride * size % 16 == 0 for stride in t.stride()[:2]) and t.stride(2) == 1
    if not strided or t.data_ptr() % 16 or t.numel() == 0:
        return None
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [block, 1, padded(t.shape[2])])
