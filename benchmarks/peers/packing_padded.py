"""Between packed and padded as Python code does it: pad_sequence, a boolean index, rows by number, flash-attn's unpad.

Rows by number (index_copy, index_select): the numbers are there before the clock starts, as our layout is.  The unpad
of flash-attn is written here after its published description (sum, nonzero, max, cumsum, an expanded gather per call),
so that it is in the table where flash-attn is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Implementation

NAME = "padded"


def missing(problem) -> str | None:
    return None


def build(problem) -> Iterator[Implementation]:
    layout, places, grad_output = problem.layout, problem.leaves, problem.grad_output
    if problem.function not in ("pad", "unpad"):
        return
    lengths = layout.cu_seqlens.diff()
    mask = torch.arange(layout.max_seqlen, device=layout.device) < lengths[:, None]
    rows = mask.flatten().nonzero().flatten()
    if problem.function == "pad":
        sizes = lengths.tolist()
        yield Implementation(
            "pad_sequence",
            lambda: torch.nn.utils.rnn.pad_sequence(problem.packed.split(sizes), batch_first=True),
            places,
            grad_output,
        )
        yield Implementation("index_copy", lambda: _pad_rows(problem.packed, rows, mask), places, grad_output)
    else:
        yield Implementation("padded[mask]", lambda: problem.padded[mask], places, grad_output)
        yield Implementation(
            "flash-attn style unpad", lambda: _unpad_input(problem.padded, mask)[0], places, grad_output
        )
        yield Implementation(
            "index_select", lambda: problem.padded.flatten(0, 1).index_select(0, rows), places, grad_output
        )


def _pad_rows(packed: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    flat = packed.new_zeros(mask.numel(), packed.shape[1])
    return flat.index_copy_(0, rows, packed).view(*mask.shape, -1)


def _unpad_input(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = mask.sum(1, dtype=torch.int32)
    rows = torch.nonzero(mask.flatten()).flatten()
    longest = int(lengths.max())
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = padded.flatten(0, 1)
    return flat.gather(0, rows[:, None].expand(-1, flat.shape[1])), rows, bounds, longest
