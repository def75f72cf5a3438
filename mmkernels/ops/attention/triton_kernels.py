"""Packed attention, Triton, sm_80+: what launches the kernels.   T tokens, H heads, G key heads, D head width.

The kernels walk MaskPlan.tiles: one program per (tile of one sample, head), heads fastest.  Nothing here waits for the
device.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mmkernels.devices import on_device
from mmkernels.ops.attention import configs, tuned
from mmkernels.ops.attention.triton_forward import attention_fwd_kernel
from mmkernels.ops.attention.triton_launch import (
    LOG2E,
    descriptors,
    dropout_scalars,
    in_reach,
    options,
    precision,
    strides,
)
from mmkernels.ops.attention.triton_launch_backward import attention_bwd
from mmkernels.ops.attention.triton_replay import Launch, can_replay, launch

__all__ = ["attention_bwd", "attention_fwd", "can_replay", "schedule"]


# Token tiles are chosen where they compute less than this share of the pairs of sample tiles: they mix samples, so that
# a non-finite one may spoil its neighbours.
TOKEN_SHARE = 0.8
# Columns of a tile, up to which it walks them in one masked loop: 1.1 times as fast on samples of 80 tokens (H100).
JOINED = 128
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def schedule(plan, request) -> tuple:
    """Tiles and spans of the forward, dQ and dK/dV kernels, and the configurations that these were made for."""
    mask, lengths = tuned.classify(plan)
    arch, dtype = _arch(plan.layout.device), DTYPES[request.dtype]
    found = configs.select(arch, dtype, request.head_dim, extras=request.extras, mask=mask, lengths=lengths)
    fwd, fwd_tiles = _cheapest(plan, "query", found.fwd, configs.forced_schedule())
    same = "token" if fwd.token else "sample"  # what one pass gains by it the others do, and choosing takes time
    none = plan.q_table[0, :0]
    if not request.needs_backward:
        return *fwd_tiles, none, none, none, none, configs.Configs(fwd, found.dkdv[0], found.dq[0]).flat()
    if found.fused and not (request.deterministic or request.extras):
        fused, fused_tiles = _cheapest(plan, "key", found.fused, same)
        return *fwd_tiles, none, none, *fused_tiles, configs.Configs(fwd, fused, found.dq[0], fused=True).flat()
    dq, dq_tiles = _cheapest(plan, "query", found.dq, same)
    dkdv, dkdv_tiles = _cheapest(plan, "key", found.dkdv, same)
    return *fwd_tiles, *dq_tiles, *dkdv_tiles, configs.Configs(fwd, dkdv, dq).flat()


def _arch(device: torch.device) -> str:
    return "sm_80" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _cheapest(
    plan, rows: str, candidates, only: str | None = None
) -> tuple[configs.Config, tuple[torch.Tensor, torch.Tensor]]:
    """The candidate and schedule that compute the fewest pairs, at the candidate's price, and their tiles and spans.

    only: the one schedule to look at; None: both.
    """
    config = _on_device_bounds(plan, rows, candidates) if "sample" not in plan.schedules else None
    if config is None:
        costs = []
        for name, share in (("sample", 1.0), ("token", TOKEN_SHARE)):
            for candidate in candidates:
                # No tiles compute fewer pairs than are visible: what cannot win is not made.
                least = candidate.price * plan.visible_pairs / share
                if only in (None, name) and (not costs or least < costs[0][0]):
                    cost = candidate.price * plan.cost(name, candidate.rows, candidate.cols, rows) / share
                    costs.append((cost, replace(candidate, token=name == "token")))
                    costs.sort(key=lambda pair: pair[0])  # stable: the earlier wins a tie
        config = costs[0][1]
    tiles = plan.tiles(rows, config.rows, config.cols, "token" if config.token else "sample", JOINED)
    return config, (tiles.tiles, tiles.spans)


def _on_device_bounds(plan, rows: str, candidates) -> configs.Config:
    """Token tiles, the first candidate that a sample of mean length fills: pairs cannot be counted without waiting."""
    layout = plan.layout if rows == "query" else plan.k_layout
    mean = layout.total_tokens / max(1, layout.num_samples)
    config = next((c for c in candidates if c.rows <= mean), candidates[-1])
    return replace(config, token=True)


def attention_fwd(q, k, v, pair_bias, rng, out, lse, mass, lowered, kept: dict | None = None) -> None:
    """Fills out [Tq, H, D], lse [H, Tq] and, where it is not None, mass [Tq, H, Mk].

    kept: for calls that differ in q, k, v, out and lse alone; see triton_replay.launch.
    """
    q, k, v = in_reach(q), in_reach(k), in_reach(v)
    own = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "k_desc": k, "v_desc": v, "out_ptr": out, "lse_ptr": lse}
    with on_device(q):
        launch("fwd", own, lambda: _forward(q, k, v, pair_bias, rng, out, lse, mass, lowered), kept)


def _forward(q, k, v, pair_bias, rng, out, lse, mass, lowered) -> Launch | None:
    tiles = lowered.fwd_tiles
    if len(tiles) == 0:
        return None
    (Tq, H, D), Tk = q.shape, k.shape[0]
    config = configs.Configs.from_flat(lowered.config).fwd
    q_modalities, modalities = (0, 0) if pair_bias is None else pair_bias.shape[1:]
    if mass is not None:
        modalities = mass.shape[2]
    unit = 1.0 if q.dtype == torch.float32 else LOG2E
    args = (
        q, k, v, *descriptors(k, v, config.cols, config.tma), pair_bias, rng,
        lowered.q_table, lowered.k_table, tiles, lowered.fwd_spans,
        out, lse, mass, Tq, Tk, H, H // k.shape[1], q_modalities, *strides(q, k, v, out),
        lowered.scale * unit, unit, *dropout_scalars(lowered.dropout_p),
    )  # fmt: skip
    constants = dict(
        D=D, BLOCK_D=configs.padded(D), BLOCK_Q=config.rows, BLOCK_K=config.cols,
        MODALITIES=modalities, HAS_VISIBLE=lowered.has_visible,
        ALIGNED=config.token and rng is not None, PRECISION=precision(q), LATE=config.late,
    )  # fmt: skip
    return Launch(attention_fwd_kernel, len(tiles) * H, args, constants, options(config))
