"""Where packed rows come from, for peers that gather from one concatenated tensor.   T tokens, M modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.layout import PackedLayout


def joint_rows(layout: PackedLayout) -> Tensor:
    """int64 [T]: row of each packed token in torch.cat(streams).  For layouts without special tokens."""
    starts = torch.tensor((0, *layout.stream_lengths[:-1]), device=layout.device).cumsum(0)
    return layout.source_rows.long() + starts[layout.modality_ids.long()]
