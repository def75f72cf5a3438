"""Packed attention backward, Triton, sm_80+: what launches its kernels.   T tokens, H heads, G key heads, D width.

The deterministic pair: dQ over query tiles, which also leaves delta, then dK/dV over key tiles.
"""

from __future__ import annotations

import torch

from mmkernels.ops.attention import configs
from mmkernels.ops.attention.triton_backward import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from mmkernels.ops.attention.triton_launch import LOG2E, on_device, precision, strides


def attention_bwd(do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, dbias, lowered) -> None:
    """Fills dq [T, H, D], dk and dv [T, G, D]."""
    _, _, _, _, dq_tiles, dq_spans, dkdv_tiles, dkdv_spans, flat, scale, has_visible, _ = lowered
    T, H, D = q.shape
    G = k.shape[1]
    if T == 0:
        return
    kv_lo, kv_hi, q_bits, _ = lowered.q_table.unbind(0)
    q_lo, q_hi, k_bits, _ = lowered.k_table.unbind(0)
    chosen = configs.Configs.from_flat(flat)
    do = do if do.stride(2) == 1 else do.contiguous()
    shared = {"D": D, "BLOCK_D": configs.padded(D), "HAS_VISIBLE": has_visible, "PRECISION": precision(q)}
    scales = (scale, scale * LOG2E)

    with on_device(q):
        delta = torch.empty(H, T, dtype=torch.float32, device=q.device)
        config = chosen.dq
        attention_bwd_dq_kernel[(len(dq_tiles) * H,)](
            q, k, v, out, do, lse, None if dlse is None else dlse.contiguous(),
            kv_lo, kv_hi, q_bits, k_bits, dq_tiles, dq_spans, dq, delta,
            T, H, H // G, *strides(q, k, v, out, do, dq), *scales,
            BLOCK_Q=config.rows, BLOCK_K=config.cols, num_warps=config.warps, num_stages=config.stages, **shared,
        )  # fmt: skip
        config = chosen.dkdv
        attention_bwd_dkdv_kernel[(len(dkdv_tiles) * G,)](
            q, k, v, do, lse, delta, q_lo, q_hi, q_bits, k_bits, dkdv_tiles, dkdv_spans, dk, dv,
            T, G, H // G, *strides(q, k, v, do, dk, dv), *scales,
            BLOCK_K=config.rows, BLOCK_Q=config.cols, num_warps=config.warps, num_stages=config.stages, **shared,
        )  # fmt: skip
