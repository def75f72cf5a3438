"""Convolutions over pictures of any shapes at once: the windows of all of them are gathered, and multiplied as one.

P positions of n pictures, one picture after another, row by row; C channels of a position; K places of a window.

A convolution library takes one shape at a time.  A batch of ragged pictures is then dozens of calls that each leave a
GPU with little to do, in every layer and in both directions; gathered it is one matrix product, whatever the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Conv(nn.Conv2d):
    """A convolution without bias that also takes windows, [P, K C], for images [n, C, h, w].

    group: neighbours in a row that are gathered as one, where positions are a few bytes each.  Windows are then as wide
    and as high as whole groups: `wider` more than the kernel, above and to the left, where their weights are zero.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, group: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.group, self.wider = group, -kernel % group

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 4 else F.linear(x, self.flat_weight())

    def flat_weight(self) -> Tensor:
        """[outputs, K C], in the order of a window's places."""
        weight = F.pad(self.weight, (self.wider, 0, self.wider, 0)) if self.wider else self.weight
        return weight.unflatten(3, (-1, self.group)).permute(0, 2, 3, 4, 1).flatten(1)

    def windows(self, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """[P_out, K C] of positions x [P_in, C]; shapes: rows and columns that come out of each picture."""
        kernel, stride = self.kernel_size[0] + self.wider, self.stride[0]
        before = self.padding[0] + self.wider
        down, right = Axis(kernel, stride, before), Axis(*(n // self.group for n in (kernel, stride, before)))
        gathered = _Gather.apply(x.reshape(-1, self.group * x.shape[1]), Windows(down, right, tuple(shapes)))
        return gathered.view(-1, self.flat_width)

    @property
    def flat_width(self) -> int:
        return (self.kernel_size[0] + self.wider) ** 2 * self.in_channels


@dataclass(frozen=True)
class Axis:
    """Window i reads the positions i stride - before + a, 0 <= a < kernel.

    It may begin in front of the first position, but does not reach past the last where the stride divides the size.
    """

    kernel: int
    stride: int
    before: int

    def __post_init__(self) -> None:
        if not 0 < self.before < self.kernel <= self.stride + self.before:
            raise ValueError(f"windows: {self} must begin in front of a picture and end inside it")


@dataclass(frozen=True)
class Windows:
    """Who reads what.  shapes: rows and columns of windows of each picture; it has `stride` times as many positions."""

    down: Axis
    right: Axis
    shapes: tuple[tuple[int, int], ...]

    def reads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[P_out K]: the position at each place of each window, 0 where that is outside; bool, whether it is."""
        places = _Places(self.shapes, device)
        y = (places.row * self.down.stride - self.down.before)[:, None] + places.count_to(self.down.kernel)
        x = (places.column * self.right.stride - self.right.before)[:, None] + places.count_to(self.right.kernel)
        outside = (y < 0)[:, :, None] | (x < 0)[:, None, :]
        first, columns = places.first * self.area, places.columns * self.right.stride
        position = first[:, None, None] + y[:, :, None] * columns[:, None, None] + x[:, None, :]
        return position.masked_fill_(outside, 0).flatten(), outside.flatten()

    def used_by(self, device: torch.device) -> Tensor:
        """[P_in, U]: the places of windows that read each position, 0 for none: place 0 is always outside."""
        size = tuple((rows * self.down.stride, columns * self.right.stride) for rows, columns in self.shapes)
        places = _Places(size, device)
        row, a, in_rows = _readers(self.down, places.row, places.rows, places)
        column, b, in_columns = _readers(self.right, places.column, places.columns, places)
        columns = places.columns // self.right.stride
        window = (places.first // self.area)[:, None, None] + row[:, :, None] * columns[:, None, None]
        window = window + column[:, None, :]
        place = (window * self.down.kernel + a[:, :, None]) * self.right.kernel + b[:, None, :]
        return place.masked_fill_(~(in_rows[:, :, None] & in_columns[:, None, :]), 0).flatten(1)

    @property
    def area(self) -> int:
        """Positions per window."""
        return self.down.stride * self.right.stride


def _readers(axis: Axis, at: Tensor, size: Tensor, places: _Places) -> tuple[Tensor, Tensor, Tensor]:
    """Windows along an axis that may read position `at` of `size`, [P, U]; which of their places it is; whether so."""
    last = (at + axis.before) // axis.stride  # its first place is the nearest to the position
    window = last[:, None] - places.count_to(-(-axis.kernel // axis.stride))
    place = (at + axis.before)[:, None] - window * axis.stride
    return window, place, (window >= 0) & (window < (size // axis.stride)[:, None]) & (place < axis.kernel)


class _Places:
    """Of every position of pictures of these shapes, [P]: its row and column, and of its picture rows, columns, first.

    Computed on the device from two numbers a picture; the sum P is known on the host, so that nothing waits.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        counts = [rows * columns for rows, columns in shapes]
        total = sum(counts)
        # A window has a few dozen places.
        dtype = torch.int32 if 64 * total < 2**31 else torch.int64
        pictures = torch.tensor(shapes, dtype=dtype).view(-1, 2).to(device, non_blocking=True)
        sizes = pictures[:, 0] * pictures[:, 1]
        pictures = torch.cat([pictures, (sizes.cumsum(0, dtype=dtype) - sizes)[:, None]], dim=1)
        of_each = pictures.repeat_interleave(sizes, dim=0, output_size=total)
        self.rows, self.columns, self.first = of_each.unbind(1)
        inside = torch.arange(total, dtype=dtype, device=device) - self.first
        self.row, self.column = inside // self.columns, inside % self.columns

    def count_to(self, count: int) -> Tensor:
        return torch.arange(count, dtype=self.row.dtype, device=self.row.device)


class _Gather(torch.autograd.Function):
    """x [P_in, C] at the places of windows, [P_out K, C], zero outside; backward sums over a position's windows."""

    @staticmethod
    def forward(ctx, x: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        reads, outside = windows.reads(x.device)
        return x.index_select(0, reads).masked_fill_(outside[:, None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        used_by = ctx.windows.used_by(grad.device)
        return F.embedding_bag(used_by, grad.contiguous(), mode="sum", padding_idx=0), None
