"""Packed attention, Triton, sm_80+: what launches the kernels.   T tokens, H heads, G key heads, D head width.

The kernels walk MaskPlan.tiles: one program per (tile of one sample, head), longest tiles first.  Nothing here
waits for the device.
"""

from __future__ import annotations

import torch

from mmkernels.ops.attention import configs
from mmkernels.ops.attention.triton_forward import attention_fwd_kernel
from mmkernels.ops.attention.triton_launch import LOG2E, on_device, precision, strides
from mmkernels.ops.attention.triton_launch_backward import attention_bwd

__all__ = ["attention_bwd", "attention_fwd", "schedule"]


def schedule(plan, request) -> tuple:
    """Tiles and spans of the forward, dQ and dK/dV kernels, and the configurations that these were made for."""
    device = plan.layout.device
    arch = "sm_80" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    chosen = configs.select(arch, request.dtype.itemsize, request.head_dim)
    flat = chosen.flat()
    fwd = plan.tiles("query", chosen.fwd.rows, chosen.fwd.cols)
    if not request.needs_backward:
        empty = plan.q_table[0, :0]
        return fwd.tiles, fwd.spans, empty, empty, empty, empty, flat
    dq = plan.tiles("query", chosen.dq.rows, chosen.dq.cols)
    dkdv = plan.tiles("key", chosen.dkdv.rows, chosen.dkdv.cols)
    return fwd.tiles, fwd.spans, dq.tiles, dq.spans, dkdv.tiles, dkdv.spans, flat


def attention_fwd(q, k, v, pair_bias, rng, out, lse, mass, lowered) -> None:
    """Fills out [T, H, D] and lse [H, T]."""
    if pair_bias is not None or mass is not None or lowered.dropout_p:
        raise NotImplementedError("attention: the Triton path has no pair_bias, dropout or mass yet (issue 3)")
    tiles, spans, config, scale, has_visible = (
        lowered.fwd_tiles, lowered.fwd_spans, lowered.config, lowered.scale, lowered.has_visible
    )  # fmt: skip
    T, H, D = q.shape
    kv_lo, kv_hi, q_bits, _ = lowered.q_table.unbind(0)
    k_bits = lowered.k_table[2]
    config = configs.Configs.from_flat(config).fwd
    if len(tiles) == 0:
        return
    with on_device(q):
        attention_fwd_kernel[(len(tiles) * H,)](
            q, k, v, kv_lo, kv_hi, q_bits, k_bits, tiles, spans, out, lse,
            T, H, H // k.shape[1], *strides(q, k, v, out), scale * LOG2E,
            D=D, BLOCK_D=configs.padded(D), BLOCK_Q=config.rows, BLOCK_K=config.cols,
            HAS_VISIBLE=has_visible, PRECISION=precision(q), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
