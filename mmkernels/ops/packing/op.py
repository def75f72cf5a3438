"""Contract of packing: schemas, fakes, autograd.  Imports torch only.

T tokens, E width, M modalities, N segments, R gathered rows.  `impl` is a concrete name by the time it gets here.
All operators are linear and come in pairs that are each other's gradient: pack and unpack, gather_rows and
scatter_rows_sum, segment_mean and segment_mean_backward.
segments: host int32 [N, 4] (sample, modality, length, first source row).  bounds: int32 [N + 1], of each segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import dispatch

_SCHEMAS = {
    "pack": "(Tensor[] streams, Tensor segments, int total, str impl) -> Tensor",
    "pack_out": "(Tensor[] streams, Tensor segments, Tensor(a!) out, str impl) -> ()",
    "unpack": "(Tensor packed, Tensor segments, int[] stream_lengths, str impl) -> Tensor[]",
    "gather_rows": "(Tensor packed, Tensor rows, str impl) -> Tensor",
    "scatter_rows_sum": "(Tensor grad, Tensor rows, int total, str impl) -> Tensor",
    "segment_mean": "(Tensor packed, Tensor bounds, str impl) -> Tensor",
    "segment_mean_backward": "(Tensor grad, Tensor bounds, int total, str impl) -> Tensor",
}


def _computed(name: str):
    def run(*args):
        *args, impl = args
        if name in ("gather_rows", "scatter_rows_sum") and args[0].device.type == "cpu":
            _check_range(args[1], args[0].shape[0] if name == "gather_rows" else args[2])
        if name == "pack_out":
            _check_overlap(args[0], args[2])
        return getattr(dispatch.load("packing", impl), name)(*args)

    return run


def _check_range(rows: Tensor, total: int) -> None:
    if rows.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(rows))
    if low < 0 or high >= total:
        raise ValueError(f"gather_rows: rows run from {low} to {high}, expected 0 to {total - 1}")


def _check_overlap(streams: list[Tensor], out: Tensor) -> None:
    """Rows are copied in any order and by several threads, so out must not lie where a stream is read."""
    begin, end = _bytes_of(out)
    for m, stream in enumerate(streams):
        first, last = _bytes_of(stream)
        if first < end and begin < last:
            raise ValueError(f"pack: out shares memory with stream {m}, expected memory of its own")


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"mm::{_name}", _schema)
    for _device in ("cpu", "cuda"):
        torch.library.impl(f"mm::{_name}", _device, _computed(_name))


@torch.library.register_fake("mm::pack")
def _pack_fake(streams, segments, total, impl):
    return streams[0].new_empty((total, streams[0].shape[1]))


@torch.library.register_fake("mm::pack_out")
def _pack_out_fake(streams, segments, out, impl):
    return None


@torch.library.register_fake("mm::unpack")
def _unpack_fake(packed, segments, stream_lengths, impl):
    return [packed.new_empty((rows, packed.shape[1])) for rows in stream_lengths]


@torch.library.register_fake("mm::gather_rows")
def _gather_rows_fake(packed, rows, impl):
    return packed.new_empty((rows.shape[0], packed.shape[1]))


@torch.library.register_fake("mm::segment_mean")
def _segment_mean_fake(packed, bounds, impl):
    return packed.new_empty((bounds.shape[0] - 1, packed.shape[1]))


@torch.library.register_fake("mm::scatter_rows_sum")
@torch.library.register_fake("mm::segment_mean_backward")
def _spread_fake(grad, where, total, impl):
    return grad.new_empty((total, grad.shape[1]))


def _pack_context(ctx, inputs, output):
    streams, segments, _, ctx.impl = inputs
    ctx.stream_lengths = [stream.shape[0] for stream in streams]
    ctx.save_for_backward(segments)


def _pack_backward(ctx, grad):
    (segments,) = ctx.saved_tensors
    return torch.ops.mm.unpack(grad, segments, ctx.stream_lengths, ctx.impl), None, None, None


def _unpack_context(ctx, inputs, output):
    packed, segments, _, ctx.impl = inputs
    ctx.total = packed.shape[0]
    ctx.save_for_backward(segments)


def _unpack_backward(ctx, grads):
    (segments,) = ctx.saved_tensors
    return torch.ops.mm.pack(grads, segments, ctx.total, ctx.impl), None, None, None


def _reduce_context(ctx, inputs, output):
    values, where, ctx.impl = inputs
    ctx.total = values.shape[0]
    ctx.save_for_backward(where)


def _spread_context(ctx, inputs, output):
    _, where, _, ctx.impl = inputs
    ctx.save_for_backward(where)


def _register_pair(reduce: str, spread: str) -> None:
    """reduce(values, where) and spread(grad, where, total) are each other's gradient."""

    def reduce_backward(ctx, grad):
        (where,) = ctx.saved_tensors
        return getattr(torch.ops.mm, spread)(grad, where, ctx.total, ctx.impl), None, None

    def spread_backward(ctx, grad):
        (where,) = ctx.saved_tensors
        return getattr(torch.ops.mm, reduce)(grad, where, ctx.impl), None, None, None

    torch.library.register_autograd(f"mm::{reduce}", reduce_backward, setup_context=_reduce_context)
    torch.library.register_autograd(f"mm::{spread}", spread_backward, setup_context=_spread_context)


torch.library.register_autograd("mm::pack", _pack_backward, setup_context=_pack_context)
torch.library.register_autograd("mm::unpack", _unpack_backward, setup_context=_unpack_context)
_register_pair("gather_rows", "scatter_rows_sum")
_register_pair("segment_mean", "segment_mean_backward")

pack, pack_out, unpack = torch.ops.mm.pack, torch.ops.mm.pack_out, torch.ops.mm.unpack
gather_rows, segment_mean = torch.ops.mm.gather_rows, torch.ops.mm.segment_mean
