"""Packed attention, Triton, sm_80+: what launches the kernels.   T tokens, H heads, G key heads, D head width.

The kernels walk MaskPlan.tiles: one program per (tile of one sample, head), longest tiles first.  Backward is the
deterministic pair dQ over query tiles and dK/dV over key tiles.  Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from mmkernels.ops.attention import configs
from mmkernels.ops.attention.triton_backward import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from mmkernels.ops.attention.triton_forward import attention_fwd_kernel

LOG2E = 1.4426950408889634


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
    with _on_device(q):
        attention_fwd_kernel[(len(tiles) * H,)](
            q, k, v, kv_lo, kv_hi, q_bits, k_bits, tiles, spans, out, lse,
            T, H, H // k.shape[1], *_strides(q, k, v, out), scale * LOG2E,
            D=D, BLOCK_D=configs.padded(D), BLOCK_Q=config.rows, BLOCK_K=config.cols,
            HAS_VISIBLE=has_visible, PRECISION=_precision(q), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


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
    shared = {"D": D, "BLOCK_D": configs.padded(D), "HAS_VISIBLE": has_visible, "PRECISION": _precision(q)}
    scales = (scale, scale * LOG2E)

    with _on_device(q):
        delta = torch.empty(H, T, dtype=torch.float32, device=q.device)
        config = chosen.dq
        attention_bwd_dq_kernel[(len(dq_tiles) * H,)](
            q, k, v, out, do, lse, None if dlse is None else dlse.contiguous(),
            kv_lo, kv_hi, q_bits, k_bits, dq_tiles, dq_spans, dq, delta,
            T, H, H // G, *_strides(q, k, v, out, do, dq), *scales,
            BLOCK_Q=config.rows, BLOCK_K=config.cols, num_warps=config.warps, num_stages=config.stages, **shared,
        )  # fmt: skip
        config = chosen.dkdv
        attention_bwd_dkdv_kernel[(len(dkdv_tiles) * G,)](
            q, k, v, do, lse, delta, q_lo, q_hi, q_bits, k_bits, dkdv_tiles, dkdv_spans, dk, dv,
            T, G, H // G, *_strides(q, k, v, do, dk, dv), *scales,
            BLOCK_K=config.rows, BLOCK_Q=config.cols, num_warps=config.warps, num_stages=config.stages, **shared,
        )  # fmt: skip


def _on_device(q: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def _precision(q: Tensor) -> str:
    """fp32 products are true fp32 unless the user has turned torch's own TF32 on."""
    return "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:2])
