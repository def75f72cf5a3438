"""Which attention problems are measured: batches, masks, shapes.   H heads, G key/value heads, D head width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks import workloads
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask


@dataclass(frozen=True)
class Case:
    """samples of a workload of workloads.py; length is of every sample, for workloads that take one."""

    workload: str
    samples: int
    mask: str = "full"
    heads: int = 4
    kv_heads: int = 4
    width: int = 64
    dtype: str = "fp32"
    length: int | None = None


def prefix(layout: PackedLayout) -> AttentionMask:
    """All but the last segment of each sample is seen by all of it, as in prefix language models."""
    segments = layout.host.segments
    last = {int(sample): int(length) for sample, _, length, _ in segments}
    lengths = np.diff(layout.host.cu_seqlens.numpy())
    return AttentionMask(causal=True, prefix=[int(n) - last.get(i, 0) for i, n in enumerate(lengths)])


MASKS: dict[str, Callable[[PackedLayout], AttentionMask | None]] = {
    "full": lambda layout: None,
    "causal": lambda layout: AttentionMask(causal=True),
    "prefix": prefix,
    "window": lambda layout: AttentionMask(causal=True, window=(256, -1)),
    # causal text with image segments that see themselves whole, as in multimodal language models
    "bidirectional": lambda layout: AttentionMask(causal=True, bidirectional=(workloads.IMAGE,)),
    # text reads everything, image and audio read themselves: encoders whose text stream does the fusing
    "visible": lambda layout: AttentionMask(visible=((True, True, True), (False, True, False), (False, False, True))),
    # three unimodal encoders in one pass
    "isolated": lambda layout: AttentionMask.isolated(3),
}
MODALITY_MASKS = ("prefix", "bidirectional", "visible")

CPU_QUICK = (
    Case("stamps", 32),
    Case("repeats", 32),
    *(Case("stamps", 32, mask) for mask in MODALITY_MASKS),
    *(Case("uniform", 1024 // length, heads=2, kv_heads=2, length=length) for length in (64, 256, 1024)),
    Case("uniform", 1, heads=1, kv_heads=1, width=128, length=1024),
    Case("stamps", 32, heads=4, kv_heads=1),
    Case("longtail", 4, "causal"),
    Case("stamps", 32, dtype="bf16"),
    *(Case("uniform", 1024 // length, heads=2, kv_heads=2, length=length, dtype="bf16") for length in (256, 1024)),
)
CPU_FULL = (
    *CPU_QUICK,
    Case("stamps", 32, "isolated"),
    Case("stamps", 32, "causal"),
    Case("stamps", 32, heads=12, kv_heads=12),
    *(Case("stamps", 32, mask, dtype="bf16") for mask in MODALITY_MASKS),
    Case("uniform", 32, length=64),
    Case("native", 16, heads=12, kv_heads=12),
    Case("native", 16, heads=12, kv_heads=12, dtype="bf16"),
    *(Case("native", 16, mask) for mask in (*MODALITY_MASKS, "isolated")),
    Case("uniform", 2, length=2048),
    Case("uniform", 2, "causal", length=2048),
    Case("uniform", 2, "causal", length=2048, width=128),
    Case("uniform", 2, "causal", length=2048, width=128, dtype="bf16"),
    Case("uniform", 2, "window", length=2048),
)
# Shapes of the published tables: 16,384 tokens and 2,048 channels at every length.
CUDA_TABLE = tuple(
    Case("uniform", 16384 // length, mask, 2048 // width, 2048 // width, width, "bf16", length)
    for width in (64, 128)
    for mask in ("full", "causal")
    for length in (128, 512, 1024, 2048, 4096, 8192, 16384)
)
CUDA_RAGGED = (
    Case("stamps", 256, "full", 12, 12, 64, "bf16"),
    *(Case("stamps", 256, mask, 12, 12, 64, "bf16") for mask in (*MODALITY_MASKS, "isolated")),
    Case("native", 64, "full", 12, 12, 64, "bf16"),
    *(Case("native", 64, mask, 12, 12, 64, "bf16") for mask in (*MODALITY_MASKS, "isolated")),
    Case("longtail", 32, "causal", 16, 16, 64, "bf16"),
    Case("longtail", 32, "causal", 32, 8, 128, "bf16"),
    Case("longtail", 32, "window", 16, 16, 64, "bf16"),
    Case("stamps", 256, "full", 12, 12, 64, "fp16"),
)
CUDA_MASKS = tuple(Case("stamps", 256, mask, 12, 12, 64, "bf16") for mask in MODALITY_MASKS)
# In order of worth: what the budget does not reach is skipped with that reason.  Quick ones have fewer peers.  Last are
# those for which FlexAttention is compiled, minutes in all where no earlier run left its cache.
CUDA_FIRST = (
    CUDA_RAGGED[0],
    Case("native", 64, "full", 12, 12, 64, "bf16"),
    Case("longtail", 32, "causal", 16, 16, 64, "bf16"),
    *CUDA_TABLE,
)
CUDA = (*dict.fromkeys((*CUDA_FIRST, *(case for case in CUDA_RAGGED if case not in CUDA_MASKS))), *CUDA_MASKS)
# What the table leaves out: fp32, and the widths that few models have.
CUDA_MORE = (
    Case("native", 64, "full", 12, 12, 64, "fp32"),
    Case("stamps", 256, "full", 12, 12, 64, "fp32"),
    Case("uniform", 4, "causal", 16, 16, 128, "fp32", 4096),
    Case("native", 64, "full", 24, 24, 32, "bf16"),
    *(Case("uniform", 4, mask, 64, 64, 32, "bf16", 4096) for mask in ("full", "causal")),
    Case("native", 64, "full", 3, 3, 256, "bf16"),
    *(Case("uniform", 4, mask, 8, 8, 256, "bf16", 4096) for mask in ("full", "causal")),
)
CASES = {
    ("cpu", "quick"): CPU_QUICK,
    ("cpu", "full"): CPU_FULL,
    ("cuda", "quick"): CUDA,
    ("cuda", "full"): (*CUDA, *CUDA_MORE),
}


def cases(shapes: str, device_type: str) -> Iterator[Case]:
    """shapes is "quick" or "full"; quick is a part of full."""
    yield from CASES[device_type, shapes]
