"""Between packed and padded as Python code does it: pad_sequence, a boolean index, and flash-attn's unpad_input.

The last is written here after its published description (sum, nonzero, max, cumsum, an expanded gather per call), so
that it is in the table where flash-attn is not installed.
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
    lengths = layout.cu_seqlens.diff()
    if problem.function == "pad":
        sizes = lengths.tolist()
        yield Implementation(
            "pad_sequence",
            lambda: torch.nn.utils.rnn.pad_sequence(problem.packed.split(sizes), batch_first=True),
            places,
            grad_output,
        )
    elif problem.function == "unpad":
        mask = torch.arange(layout.max_seqlen, device=layout.device) < lengths[:, None]
        yield Implementation("padded[mask]", lambda: problem.padded[mask], places, grad_output)
        yield Implementation(
            "flash-attn style unpad", lambda: _unpad_input(problem.padded, mask)[0], places, grad_output
        )


def _unpad_input(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = mask.sum(1, dtype=torch.int32)
    rows = torch.nonzero(mask.flatten()).flatten()
    longest = int(lengths.max())
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = padded.flatten(0, 1)
    return flat.gather(0, rows[:, None].expand(-1, flat.shape[1])), rows, bounds, longest
