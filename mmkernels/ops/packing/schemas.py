"""The packing operators: inputs, outputs and the shapes of new outputs.  One table for `mm::`, `mm_cpp::`, `mm_cuda::`.

T tokens, E width, B samples, L padded length, M modalities, N segments, R gathered rows.
Every operator exists twice: NAME(inputs, size) returns new tensors, NAME_out(inputs, outputs) writes given ones.
segments: host int32 [N, 4] (sample, modality, length, first source row); modality_ids and source_rows say the same per
token, on the device.  bounds: int32 [N + 1] or [B + 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels import tracing


class Operator(NamedTuple):
    """inputs and outputs as in the schema; size: what else the outputs' shape takes; new(empty, *inputs, size)."""

    inputs: str
    size: str
    outputs: str
    new: Callable[..., Any]

    @property
    def num_inputs(self) -> int:
        return self.inputs.count("Tensor")


def _new_mask(packed: Tensor, bounds: Tensor, length: int) -> Tensor:
    return packed.new_empty((bounds.shape[0] - 1, length), dtype=torch.bool)


_WHERE = "Tensor segments, Tensor modality_ids, Tensor source_rows"
OPERATORS = {
    "pack": Operator(
        f"Tensor[] streams, {_WHERE}",
        "SymInt total",
        "Tensor",
        lambda empty, s, _0, _1, _2, total: empty(s[0], (total, s[0].shape[1])),
    ),
    "unpack": Operator(
        f"Tensor packed, {_WHERE}",
        "SymInt[] stream_lengths",
        "Tensor[]",
        lambda empty, p, _0, _1, _2, lengths: [empty(p, (rows, p.shape[1])) for rows in lengths],
    ),
    "pad": Operator(
        "Tensor packed, Tensor bounds",
        "SymInt length",
        "(Tensor, Tensor)",
        lambda empty, p, b, length: (empty(p, (b.shape[0] - 1, length, p.shape[1])), _new_mask(p, b, length)),
    ),
    "unpad": Operator(
        "Tensor padded, Tensor bounds",
        "SymInt total",
        "Tensor",
        lambda empty, p, b, total: empty(p, (total, p.shape[2])),
    ),
    "gather_rows": Operator(
        "Tensor packed, Tensor rows", "", "Tensor", lambda empty, p, r: empty(p, (r.shape[0], p.shape[1]))
    ),
    "scatter_rows_sum": Operator(
        "Tensor grad, Tensor rows", "SymInt total", "Tensor", lambda empty, g, r, total: empty(g, (total, g.shape[1]))
    ),
    "segment_mean": Operator(
        "Tensor packed, Tensor bounds", "", "Tensor", lambda empty, p, b: empty(p, (b.shape[0] - 1, p.shape[1]))
    ),
    "segment_mean_backward": Operator(
        "Tensor grad, Tensor bounds", "SymInt total", "Tensor", lambda empty, g, b, total: empty(g, (total, g.shape[1]))
    ),
}
_WRITTEN = {
    "Tensor": "Tensor(a!) out",
    "Tensor[]": "Tensor(a!)[] out",
    "(Tensor, Tensor)": "Tensor(a!) out, Tensor(b!) mask",
}


def new_empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape)


def define(namespace: str, *, suffix: str = "", symbolic: bool = False) -> None:
    """Both forms of every operator in `namespace`, with their fakes; suffix: further arguments of the schema.

    symbolic: a graph of torch.compile may leave sizes open, so that other layouts do not compile again.
    """
    skipped = suffix.count(",")
    for name, operator in OPERATORS.items():
        size = operator.size if symbolic else operator.size.replace("SymInt", "int")  # what a kernel gets is known
        sized = f"{operator.inputs}, {size}" if size else operator.inputs
        torch.library.define(f"{namespace}::{name}", f"({sized}{suffix}) -> {operator.outputs}")
        written = _WRITTEN[operator.outputs]
        torch.library.define(f"{namespace}::{name}_out", f"({operator.inputs}, {written}{suffix}) -> ()")
        for form in (name, f"{name}_out"):
            fake = _fake(getattr(getattr(torch.ops, namespace), form).default, operator, form == name, skipped)
            torch.library.register_fake(f"{namespace}::{form}", fake)


def _fake(registered, operator: Operator, makes_new: bool, skipped: int) -> Callable[..., Any]:
    def fake(*args):
        tracing.refuse_meta_beside_real(registered, args, on_host=("segments",))
        return operator.new(new_empty, *args[: len(args) - skipped]) if makes_new else None

    return fake


def native_kernels(namespace: str) -> dict[str, tuple[Callable, Callable]]:
    """Per operator (NAME, NAME_out) as callables: what an implementation that allocates its own results offers."""
    ops = getattr(torch.ops, namespace)
    return {name: (getattr(ops, name).default, getattr(ops, f"{name}_out").default) for name in OPERATORS}
