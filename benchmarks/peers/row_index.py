"""Where packed rows come from, for peers that gather or concatenate.   T tokens, M modalities, N segments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.layout import PackedLayout


def joint_rows(layout: PackedLayout) -> Tensor:
    """int64 [T]: row of each packed token in torch.cat(streams).  For layouts without special tokens."""
    starts = torch.tensor((0, *layout.stream_lengths[:-1]), device=layout.device).cumsum(0)
    return layout.source_rows.long() + starts[layout.modality_ids.long()]


def segment_views(streams: list[Tensor], layout: PackedLayout) -> Callable[[], list[Tensor]]:
    """A function that slices the N segments out of the streams, in the packed order."""
    segments = layout.segments.tolist()
    return lambda: [streams[m][row : row + length] for _, m, length, row in segments]
