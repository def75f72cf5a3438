"""Packed attention backward, Triton, sm_80+: what launches its kernels.   Tq, Tk tokens, H heads, G key heads, D width.

The deterministic pair: dQ over query tiles, which also leaves delta, then dK/dV over key tiles, and of a pair bias'
gradient one part per key tile, of which one sum of fixed order makes dbias.  Or, where the schedule says so, the fused
kernel over key tiles with dQ summed in fp32.
"""

from __future__ import annotations

import torch

from mmkernels.devices import on_device
from mmkernels.ops.attention import configs
from mmkernels.ops.attention.triton_backward import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from mmkernels.ops.attention.triton_fused import attention_bwd_delta_kernel, attention_bwd_fused_kernel
from mmkernels.ops.attention.triton_launch import (
    descriptor,
    descriptors,
    dropout_scalars,
    in_reach,
    options,
    precision,
    strides,
)
from mmkernels.ops.attention.triton_replay import Launch, launch

DELTA_ROWS = 64  # queries of one program of the delta kernel


def attention_bwd(
    do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, dbias, lowered, kept: dict | None = None
) -> None:
    """Fills dq [Tq, H, D], dk and dv [Tk, G, D] and, where it is not None, dbias [H, Mq, Mk].

    kept: for calls that differ in do, q, k, v, out, lse and what is filled alone; see triton_replay.launch.
    """
    H = q.shape[1]
    chosen = configs.Configs.from_flat(lowered.config)
    q, k, v = in_reach(q), in_reach(k), in_reach(v)
    do = in_reach(do) if do.stride(2) == 1 else do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    partials = None
    if pair_bias is not None:
        parts = (len(lowered.dkdv_tiles), H, *pair_bias.shape[1:])
        partials = torch.empty(parts, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    common = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "do_ptr": do, "lse_ptr": lse, "delta_ptr": delta}
    with on_device(q):
        if chosen.fused:
            own = {"out_ptr": out, "do_ptr": do, "delta_ptr": delta}
            launch("delta", own, lambda: _delta(do, dlse, out, delta), kept)
            dq_sum = zeroed_dq_sum(q)
            own = common | {"q_desc": q, "do_desc": do, "dq_sum": dq_sum, "dk_ptr": dk, "dv_ptr": dv}
            launch("fused", own, lambda: _fused(chosen.dkdv, do, q, k, v, lse, delta, dq_sum, dk, dv, lowered), kept)
            torch.mul(dq_sum, lowered.scale, out=dq)
            if q.shape[0] == 0:  # nothing was launched: no query sees these keys
                dk.zero_()
                dv.zero_()
            return
        own = common | {"k_desc": k, "v_desc": v, "out_ptr": out, "dq_ptr": dq}
        launch(
            "dq",
            own,
            lambda: _dq(chosen.dq, do, dlse, q, k, v, pair_bias, rng, out, lse, dq, delta, lowered),
            kept,
        )
        own = common | {"q_desc": q, "do_desc": do, "dk_ptr": dk, "dv_ptr": dv}
        launch(
            "dkdv",
            own,
            lambda: _dkdv(chosen.dkdv, do, q, k, v, pair_bias, rng, lse, delta, dk, dv, partials, lowered),
            kept,
        )
        if dbias is not None:
            torch.sum(partials, 0, out=dbias)


def _dq(config, do, dlse, q, k, v, pair_bias, rng, out, lse, dq, delta, lowered) -> Launch | None:
    tiles = lowered.dq_tiles
    if len(tiles) == 0:
        return None
    (Tq, H, _), (Tk, G, _) = q.shape, k.shape
    args = (
        q, k, v, *descriptors(k, v, config.cols, config.tma), pair_bias, rng, out, do, lse, dlse,
        lowered.q_table, lowered.k_table, tiles, lowered.dq_spans, dq, delta,
        Tq, Tk, H, H // G, _modalities(pair_bias, 1), *strides(q, k, v, out, do, dq), *_scalars(lowered),
    )  # fmt: skip
    constants = dict(
        BLOCK_Q=config.rows, BLOCK_K=config.cols, MODALITIES=_modalities(pair_bias, 2),
        ALIGNED=config.token and rng is not None, **_shared(q, lowered),
    )  # fmt: skip
    return Launch(attention_bwd_dq_kernel, len(tiles) * H, args, constants, options(config))


def _dkdv(config, do, q, k, v, pair_bias, rng, lse, delta, dk, dv, partials, lowered) -> Launch | None:
    tiles = lowered.dkdv_tiles
    if len(tiles) == 0:
        return None
    (Tq, H, _), (Tk, G, _) = q.shape, k.shape
    args = (
        q, k, v, pair_bias, rng, do, *descriptors(q, do, config.cols, config.tma), lse, delta,
        lowered.q_table, lowered.k_table, tiles, lowered.dkdv_spans,
        dk, dv, partials, Tq, Tk, G, H // G, _modalities(pair_bias, 2), *strides(q, k, v, do, dk, dv),
        *_scalars(lowered),
    )  # fmt: skip
    constants = dict(
        BLOCK_K=config.rows, BLOCK_Q=config.cols, MODALITIES=_modalities(pair_bias, 1),
        ALIGNED=config.token and rng is not None, LATE=config.late, **_shared(q, lowered),
    )  # fmt: skip
    return Launch(attention_bwd_dkdv_kernel, len(tiles) * G, args, constants, options(config))


def _delta(do, dlse, out, delta) -> Launch | None:
    Tq, H, D = out.shape
    if Tq == 0:
        return None
    args = out, do, dlse, delta, Tq, H, *strides(out, do)
    constants = {"D": D, "BLOCK_D": configs.padded(D), "BLOCK_Q": DELTA_ROWS}
    return Launch(attention_bwd_delta_kernel, -(-Tq // DELTA_ROWS) * H, args, constants, {})


def _fused(config, do, q, k, v, lse, delta, dq_sum, dk, dv, lowered) -> Launch | None:
    """config.tma: dq is summed by TMA reduce-add, else by atomic additions; whole blocks come by TMA too."""
    tiles = lowered.dkdv_tiles
    (Tq, H, _), (Tk, G, _) = q.shape, k.shape
    if len(tiles) == 0 or Tq == 0:
        return None
    target = descriptor(dq_sum, config.cols) if config.tma else dq_sum
    args = (
        q, k, v, do, *descriptors(q, do, config.cols, config.tma), lse, delta,
        lowered.q_table, lowered.k_table, tiles, lowered.dkdv_spans, target, dk, dv, Tq, Tk, G, H // G,
        *strides(q, k, v, do, dq_sum, dk, dv), lowered.scale,
    )  # fmt: skip
    constants = dict(BLOCK_K=config.rows, BLOCK_Q=config.cols, TMA=config.tma, **_shared(q, lowered))
    return Launch(attention_bwd_fused_kernel, len(tiles) * G, args, constants, options(config))


def zeroed_dq_sum(q) -> torch.Tensor:
    """fp32 zeros of q's shape; rows are padded to 16 bytes, as descriptors want them."""
    Tq, H, D = q.shape
    padded = torch.zeros(Tq, H, -(-D // 4) * 4, dtype=torch.float32, device=q.device)
    return padded if D % 4 == 0 else padded[:, :, :D]


def _modalities(pair_bias, axis: int) -> int:
    """Mq (axis 1) or Mk (axis 2); 0 without a bias."""
    return 0 if pair_bias is None else pair_bias.shape[axis]


def _scalars(lowered) -> tuple:
    """scale, drop_threshold, keep_scale."""
    return lowered.scale, *dropout_scalars(lowered.dropout_p)


def _shared(q, lowered) -> dict:
    return {
        "D": q.shape[2],
        "BLOCK_D": configs.padded(q.shape[2]),
        "HAS_VISIBLE": lowered.has_visible,
        "PRECISION": precision(q),
    }
