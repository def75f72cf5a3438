"""Layouts and implementations that the packing tests share, and the definition of pack by per-token arrays."""

import numpy as np
import torch

from mmkernels import dispatch
from mmkernels.layout import PackedLayout

IMPLS = ["reference", "torch"] + (["cpp"] if dispatch.cpp_missing() is None else [])
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Interleaved and repeated modalities, an empty segment, an empty sample, a modality (3) that no sample has.
SAMPLES = [[(0, 3), (1, 5), (0, 2)], [], [(2, 4), (1, 0), (0, 1)], [(1, 7)]]
LAYOUTS = {
    "interleaved": PackedLayout.from_segments(SAMPLES, num_modalities=4),
    "one token": PackedLayout.from_counts([[0, 1]]),
    "no token": PackedLayout.from_segments([[], [(0, 0)]], num_modalities=2),
    "no sample": PackedLayout.from_counts(np.zeros((0, 2), int)),
    # Large enough that threads share the work, with lengths that do not divide it.
    "many": PackedLayout.from_counts(np.random.default_rng(0).integers(0, 90, (64, 3))),
}


def streams_of(layout, width, dtype=torch.float32, requires_grad=False):
    streams = [torch.randn(rows, width, dtype=torch.float32).to(dtype) for rows in layout.stream_lengths]
    return [s.requires_grad_(requires_grad) for s in streams]


def packed_by_index(streams, layout):
    """The definition by the layout's own per-token arrays, which the CPU's pack does not read."""
    rows = [streams[m][r] for m, r in zip(layout.modality_ids.tolist(), layout.source_rows.tolist(), strict=True)]
    return torch.stack(rows) if rows else streams[0].new_zeros((0, streams[0].shape[1]))


def padded_by_loop(packed, layout, length):
    """The definition of pad: (padded, mask)."""
    padded = torch.zeros((layout.num_samples, length, packed.shape[1]), dtype=packed.dtype)
    mask = torch.zeros((layout.num_samples, length), dtype=torch.bool)
    bounds = layout.cu_seqlens.tolist()
    for b in range(layout.num_samples):
        rows = packed[bounds[b] : bounds[b + 1]]
        padded[b, : len(rows)], mask[b, : len(rows)] = rows, True
    return padded, mask


def where_of(layout):
    """The arguments that tell pack and unpack of the operators' contract where rows lie."""
    return torch.from_numpy(np.array(layout.segments)), layout.modality_ids, layout.source_rows
