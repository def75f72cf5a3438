"""torch.nested with the jagged layout: packs a list of views, pads what is packed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Implementation
from benchmarks.peers import row_index

NAME = "torch.nested"


def missing(problem) -> str | None:
    return None


def build(problem) -> Iterator[Implementation]:
    layout, packed = problem.layout, problem.packed
    if problem.function == "pack":
        views = row_index.segment_views(problem.streams, layout)

        def pack():
            return torch.nested.as_nested_tensor(views(), layout=torch.jagged)

        # forward only: its gradient is a nested tensor too
        yield Implementation(NAME, pack, packed=lambda nested: nested.values(), directions=("fwd",))
    elif problem.function == "pad":
        offsets = layout.cu_seqlens.long()

        def pad():
            nested = torch.nested.nested_tensor_from_jagged(packed, offsets, max_seqlen=layout.max_seqlen)
            return torch.nested.to_padded_tensor(nested, 0.0)

        yield Implementation(NAME, pad, problem.leaves, problem.grad_output)
