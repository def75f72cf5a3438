"""packing by the CUDA extension (csrc/kernels/packing*.cu): nothing is synchronised, nothing crosses from the host.

One launch per operator, except scatter_rows_sum: it sorts its rows first, stably, so that rows which repeat are summed
in a fixed order without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import native
from mmkernels.ops.packing import schemas

native.load_cuda_ops()  # before the schemas, which a second try could not define again; it implements them
schemas.define("mm_cuda")
torch.library.define("mm_cuda::sum_sorted_rows", "(Tensor grad, Tensor rows, Tensor order, int total) -> Tensor")
torch.library.define("mm_cuda::sum_sorted_rows_out", "(Tensor grad, Tensor rows, Tensor order, Tensor(a!) out) -> ()")


def _scatter_rows_sum(grad: Tensor, rows: Tensor, total: int) -> Tensor:
    rows, order = torch.sort(rows, stable=True)
    return torch.ops.mm_cuda.sum_sorted_rows(grad, rows, order, total)


def _scatter_rows_sum_out(grad: Tensor, rows: Tensor, out: Tensor) -> None:
    rows, order = torch.sort(rows, stable=True)
    torch.ops.mm_cuda.sum_sorted_rows_out(grad, rows, order, out)


KERNELS = schemas.native_kernels("mm_cuda") | {"scatter_rows_sum": (_scatter_rows_sum, _scatter_rows_sum_out)}
