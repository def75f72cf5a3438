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


def schedule(plan, q: Tensor, needs_backward: bool) -> tuple:
    """Tiles and spans of the forward, dQ and dK/dV kernels, and the configurations that these were made for."""
    arch = "sm_80" if q.device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(q.device))
    chosen = configs.select(arch, q.element_size(), q.shape[2])
    flat = chosen.flat()
    fwd = plan.tiles("query", chosen.fwd.rows, chosen.fwd.cols)
    if not needs_backward:
        empty = plan.table[0, :0]
        return fwd.tiles, fwd.spans, empty, empty, empty, empty, flat
    dq = plan.tiles("query", chosen.dq.rows, chosen.dq.cols)
    dkdv = plan.tiles("key", chosen.dkdv.rows, chosen.dkdv.cols)
    return fwd.tiles, fwd.spans, dq.tiles, dq.spans, dkdv.tiles, dkdv.spans, flat


def attention_fwd(q, k, v, out, lse, table, tiles, spans, *rest) -> None:
    """Fills out [T, H, D] and lse [H, T]."""
    *_, config, scale, has_visible = rest
    T, H, D = q.shape
    kv_lo, kv_hi, _, _, q_bits, k_bits = table.unbind(0)
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


def attention_bwd(do, dlse, q, k, v, out, lse, dq, dk, dv, table, *rest) -> None:
    """Fills dq [T, H, D], dk and dv [T, G, D]."""
    _, _, dq_tiles, dq_spans, dkdv_tiles, dkdv_spans, flat, scale, has_visible = rest
    T, H, D = q.shape
    G = k.shape[1]
    if T == 0:
        return
    kv_lo, kv_hi, q_lo, q_hi, q_bits, k_bits = table.unbind(0)
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
