"""packing by the C++ extension (csrc/bindings/packing.cpp): multithreaded copies and sums on CPU.

Schemas of the raw operators; the C++ takes rows that are contiguous inside and lie any distance apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import native

torch.library.define("mm_cpp::pack", "(Tensor[] streams, Tensor segments, int total) -> Tensor")
torch.library.define("mm_cpp::pack_out", "(Tensor[] streams, Tensor segments, Tensor(a!) out) -> ()")
torch.library.define("mm_cpp::unpack", "(Tensor packed, Tensor segments, int[] stream_lengths) -> Tensor[]")
torch.library.define("mm_cpp::gather_rows", "(Tensor packed, Tensor rows) -> Tensor")
torch.library.define("mm_cpp::scatter_rows_sum", "(Tensor grad, Tensor rows, int total) -> Tensor")
torch.library.define("mm_cpp::segment_mean", "(Tensor packed, Tensor bounds) -> Tensor")
torch.library.define("mm_cpp::segment_mean_backward", "(Tensor grad, Tensor bounds, int total) -> Tensor")
native.load_cpu_ops()


def pack(streams: list[Tensor], segments: Tensor, total: int) -> Tensor:
    return torch.ops.mm_cpp.pack([_rows(s) for s in streams], segments, total)


def pack_out(streams: list[Tensor], segments: Tensor, out: Tensor) -> None:
    torch.ops.mm_cpp.pack_out([_rows(s) for s in streams], segments, out)


def unpack(packed: Tensor, segments: Tensor, stream_lengths: list[int]) -> list[Tensor]:
    return torch.ops.mm_cpp.unpack(_rows(packed), segments, stream_lengths)


def gather_rows(packed: Tensor, rows: Tensor) -> Tensor:
    return torch.ops.mm_cpp.gather_rows(_rows(packed), rows.contiguous())


def scatter_rows_sum(grad: Tensor, rows: Tensor, total: int) -> Tensor:
    return torch.ops.mm_cpp.scatter_rows_sum(_rows(grad), rows.contiguous(), total)


def segment_mean(packed: Tensor, bounds: Tensor) -> Tensor:
    return torch.ops.mm_cpp.segment_mean(_rows(packed), bounds)


def segment_mean_backward(grad: Tensor, bounds: Tensor, total: int) -> Tensor:
    return torch.ops.mm_cpp.segment_mean_backward(_rows(grad), bounds, total)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
