"""A packed layout from torch's own operators: cumsum, repeat_interleave, arange; as a collator would write it."""

from __future__ import annotations

import torch

from benchmarks.harness import Implementation

NAME = "torch_ops"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    counts = torch.from_numpy(problem.counts).long()

    def arrays() -> list[torch.Tensor]:
        samples, modalities = counts.nonzero(as_tuple=True)
        lengths = counts[samples, modalities]
        total = int(lengths.sum())
        ends = lengths.cumsum(0)
        segment_ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=total)
        positions = torch.arange(total) - (ends - lengths)[segment_ids]
        first_rows = (counts.cumsum(0) - counts)[samples, modalities]
        cu_seqlens = torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0))
        return [
            cu_seqlens.int(),
            modalities[segment_ids].to(torch.uint8),
            positions.int(),
            segment_ids.int(),
            (first_rows[segment_ids] + positions).int(),
        ]

    return Implementation(NAME, arrays, packed=lambda arrays: [array.numpy() for array in arrays])
