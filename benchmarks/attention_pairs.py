"""How many query-key pairs an implementation computes for a mask: beside the visible ones, its waste."""

from __future__ import annotations

import torch

from mmkernels import dispatch
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention.inputs import Request


def computed(plan: MaskPlan, impl: str, dtype: torch.dtype, head_dim: int) -> int | None:
    """Pairs of the forward pass as the implementation plans it; None where its plan does not say.

    triton  whole blocks, as its kernel walks them
    cpp     rows by columns of each span, both clipped at the sample's end; inside of it bands of rows skip panels of
            columns, which is not counted
    torch   queries by keys of each call, the triangle where a call is causal
    """
    if impl not in ("cpp", "torch", "triton"):
        return None
    request = Request(dtype, head_dim, needs_backward=False, deterministic=False, extras=False)
    schedule = dispatch.load("attention", impl).schedule(plan, request)
    if impl == "triton":
        from mmkernels.ops.attention.configs import Configs

        tile = Configs.from_flat(schedule[-1]).fwd
        return plan.cost("token" if tile.token else "sample", tile.rows, tile.cols)
    if impl == "cpp":
        tiles, spans = schedule[0].long(), schedule[1].long()
        columns = torch.cat([spans.new_zeros(1), (spans[:, 1] - spans[:, 0]).cumsum(0)])  # before each span
        return int(((tiles[:, 1] - tiles[:, 0]) * (columns[tiles[:, 3]] - columns[tiles[:, 2]])).sum())
    from mmkernels.ops.attention import torch_runs

    column = {name: schedule[0][:, index] for index, name in enumerate(torch_runs.COLUMNS)}
    square = column["q_len"].long() * column["k_len"]
    triangle = column["q_len"].long() * (column["q_len"] + 1) // 2
    pairs = torch.where(column["kind"] == torch_runs.CAUSAL, triangle, square)
    return int((pairs * column["count"]).sum())
