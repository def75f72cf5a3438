"""What the packing operators refuse, with the words for it.   T tokens, E width, B samples, L padded length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmkernels import arguments, tracing, transforms
from mmkernels.layout import PackedLayout

INDEX_DTYPES = (torch.int32, torch.int64)


def segments(function: str, layout: PackedLayout) -> Tensor:
    """The layout's segment table as a host tensor, made once."""
    _is_layout(function, layout)
    table = layout.cache.get("segment_table")
    return _segments_anew(function, layout) if table is None else table


@tracing.host_code(
    "pack, unpack: in one graph the layout must have met one of them before; call it on the layout once outside"
)
def _segments_anew(function: str, layout: PackedLayout) -> Tensor:
    if layout.segments is None:
        raise ValueError(f"{function}: the layout comes from cu_seqlens and does not know its streams")
    special = [m for m, token in enumerate(layout.special_tokens or ()) if token is not None]
    if special:
        raise ValueError(
            f"{function}: segments of modality {special[0]} start with a special token, whose row is in no stream; "
            "modality_embed packs such a layout"
        )
    modality, lengths = layout.segments[:, 1], layout.segments[:, 2]
    tokens, below = int(lengths.sum(dtype=np.int64)), layout.num_modalities
    if tokens != layout.total_tokens or (lengths < 0).any():
        raise ValueError(
            f"{function}: the layout's segments hold {tokens} tokens, the shortest {lengths.min(initial=0)}, expected "
            f"{layout.total_tokens}, the shortest at least 0"
        )
    if ((modality < 0) | (modality >= below)).any():
        raise ValueError(
            f"{function}: the layout's segments have modalities from {modality.min()} to {modality.max()}, expected 0 "
            f"to {below - 1}"
        )
    with torch.inference_mode(False):  # or no call that learns could keep it for its backward
        table = layout.cache["segment_table"] = torch.from_numpy(np.array(layout.segments))
    if layout.device.type == "cpu":
        # What quick.pack and quick.unpack take.  As bytes: a tensor is four objects away from its first number, each a
        # wait for memory where a call is the first in a while.
        layout.cache["quick_segments"] = (layout.segments.tobytes(), layout.num_modalities)
    return table


def streams(given: Sequence[Tensor | None], layout: PackedLayout) -> list[Tensor]:
    """Every stream as a tensor, checked against the layout and one another."""
    given = arguments.as_list("pack", "streams", given, "a list of tensors")
    for m, stream in enumerate(given):
        if not isinstance(stream, Tensor | None):
            raise ValueError(f"pack: stream {m} is {type(stream).__name__}, expected a tensor or None")
        if stream is not None:
            _holds_numbers("pack", f"stream {m}", stream)
    if len(given) != layout.num_modalities:
        raise ValueError(f"pack: got {len(given)} streams, expected {layout.num_modalities} as in the layout")
    present = next((s for s in given if s is not None), None)
    if present is None:
        raise ValueError("pack: every stream is None, expected at least one (it may have no rows)")
    if present.ndim != 2:
        raise ValueError(f"pack: a stream has shape {list(present.shape)}, expected [rows, E]")
    width, dtype, device = present.shape[1], present.dtype, present.device
    if device != layout.device:
        raise ValueError(f"pack: the streams are on {device}, the layout on {layout.device}")
    found = [present.new_empty((0, width)) if s is None else s for s in given]
    for m, (stream, rows) in enumerate(zip(found, layout.stream_lengths, strict=True)):
        if stream.shape != (rows, width):
            raise ValueError(f"pack: stream {m} has shape {list(stream.shape)}, expected {[rows, width]}")
        if stream.dtype != dtype or stream.device != device:
            raise ValueError(
                f"pack: stream {m} is {stream.dtype} on {stream.device}, expected {dtype} on {device} as the others"
            )
    return found


def packed(function: str, tensor: Tensor, layout: PackedLayout) -> None:
    _is_layout(function, layout)
    _is_tensor(function, "packed", tensor)
    if tensor.ndim != 2 or tensor.shape[0] != layout.total_tokens:
        # format, here and below: Dynamo puts the symbols of a dynamic graph into no f-string
        raise ValueError(
            "{}: packed has shape {}, expected [{}, E]".format(  # noqa: UP032
                function, list(tensor.shape), layout.total_tokens
            )
        )
    if tensor.device != layout.device:
        raise ValueError(f"{function}: packed is on {tensor.device}, the layout on {layout.device}")


def padded(tensor: Tensor, layout: PackedLayout) -> None:
    _is_layout("unpad", layout)
    _is_tensor("unpad", "padded", tensor)
    samples, longest = layout.num_samples, layout.max_seqlen
    if tensor.ndim != 3 or tensor.shape[0] != samples or tensor.shape[1] < longest:
        raise ValueError(
            "unpad: padded has shape {}, expected [{}, L, E] with L at least {}".format(  # noqa: UP032
                list(tensor.shape), samples, longest
            )
        )
    if tensor.device != layout.device:
        raise ValueError(f"unpad: padded is on {tensor.device}, the layout on {layout.device}")


def rows(tensor: Tensor, index: Tensor) -> None:
    _is_tensor("gather_rows", "packed", tensor)
    _is_tensor("gather_rows", "rows", index)
    if tensor.ndim != 2:
        raise ValueError(f"gather_rows: packed has shape {list(tensor.shape)}, expected [T, E]")
    if index.ndim != 1 or index.dtype not in INDEX_DTYPES:
        raise ValueError(f"gather_rows: rows is {index.dtype} {list(index.shape)}, expected int32 or int64 [R]")
    if index.device != tensor.device:
        raise ValueError(f"gather_rows: rows is on {index.device}, packed on {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled() and tensor.dtype not in arguments.FLOATS:
        raise ValueError(f"gather_rows: packed is {tensor.dtype}, its gradient needs {arguments.FLOAT_NAMES}")


def summable(function: str, tensor: Tensor) -> None:
    if tensor.dtype not in arguments.FLOATS:
        raise ValueError(f"{function}: packed is {tensor.dtype}, expected {arguments.FLOAT_NAMES}")


def out(
    function: str,
    given: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    inputs: Sequence[Tensor] = (),
    *,
    name: str = "out",
    dtype: torch.dtype | None = None,
) -> None:
    """given is contiguous, of this shape, and as `like`; nothing asks for a gradient.  inputs: where not only like."""
    _is_tensor(function, name, given)
    dtype = like.dtype if dtype is None else dtype
    if given.shape != shape or given.dtype != dtype or given.device != like.device:
        raise ValueError(
            f"{function}: {name} is {given.dtype} {list(given.shape)} on {given.device}, "
            f"expected {dtype} {list(shape)} on {like.device}"
        )
    if not given.is_contiguous():
        raise ValueError(f"{function}: {name} has strides {list(given.stride())}, expected a contiguous tensor")
    if not torch.compiler.is_compiling():  # a graph can ask none of this
        if given.is_neg() or given.is_conj():
            raise ValueError(
                f"{function}: {name} is a negated or conjugate view, expected memory that holds its values"
            )
        if given._is_zerotensor():
            raise ValueError(f"{function}: {name} is zeros without memory, expected memory to write into")
    if torch.is_grad_enabled() and (given.requires_grad or any(x.requires_grad for x in inputs or (like,))):
        raise ValueError(f"{function}: out= has no gradient; leave it out, or call under torch.no_grad()")
    if transforms.has_tangent(*(inputs or (like,))):
        raise NotImplementedError(f"{function}: there is no forward mode (jvp); gradients go in reverse mode")


def outs(function: str, given: Sequence[Tensor], shapes: list[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    given = arguments.as_list(function, "out", given, "a list of tensors")
    if len(given) != len(shapes):
        raise ValueError(f"{function}: out has {len(given)} tensors, expected {len(shapes)}")
    for m, (tensor, shape) in enumerate(zip(given, shapes, strict=True)):
        out(function, tensor, shape, like, name=f"out[{m}]")
    return given


def padded_out(given: tuple[Tensor, Tensor], shape: tuple[int, int, int], like: Tensor) -> tuple[Tensor, ...]:
    given = tuple(arguments.as_list("pad", "out", given, "two tensors: padded and mask"))
    if len(given) != 2:
        raise ValueError(f"pad: out has {len(given)} tensors, expected two: padded and mask")
    out("pad", given[0], shape, like, name="out[0]")
    out("pad", given[1], shape[:2], like, name="out[1]", dtype=torch.bool)
    return given


def _is_layout(function: str, layout: PackedLayout) -> None:
    if not isinstance(layout, PackedLayout):
        raise ValueError(f"{function}: layout is {type(layout).__name__}, expected PackedLayout")


def _is_tensor(function: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{function}: {name} is {type(tensor).__name__}, expected a tensor")
    _holds_numbers(function, name, tensor)


def _holds_numbers(function: str, name: str, tensor: Tensor) -> None:
    tracing.refuse_unstrided(function, name, tensor)
    tracing.refuse_numberless(function, name, tensor)
    if tensor.is_quantized:  # its memory alone is not its values
        raise ValueError(
            f"{function}: {name} is quantized, {tensor.dtype}, expected plain numbers, as int_repr() gives"
        )
