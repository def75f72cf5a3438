"""Packed attention on CPU: torch's flash kernel over views, run by run.   T tokens, H heads, G key heads, D width.

A run (torch_runs) is a stretch of the batch that sees only itself; most need no mask, and only the rest build one, of
their own [L, L].  Nothing is padded, gathered or shared between runs, so samples cannot touch one another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.torch_runs import BLIND, CAUSAL, MASKED, runs

# The kernels under F.scaled_dot_product_attention; called by name because they alone return lse and take it back.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def schedule(plan, request) -> tuple:
    """The runs [R, 4], five empty tensors and no configuration."""
    found = plan.cache.get("runs")  # the same for every dtype and width
    if found is None:
        found = torch.from_numpy(
            runs(plan.layout.cu_seqlens.numpy(), plan.q_table.numpy(), plan.k_table.numpy(), plan.has_visible)
        )
        plan.cache["runs"] = found
    return found, *(torch.empty(0, dtype=torch.int32),) * 5, []


def attention_fwd(q, k, v, pair_bias, rng, out, lse, mass, lowered) -> None:
    """Fills out [T, H, D] and lse [H, T]."""
    _refuse(pair_bias, mass, lowered)
    found, scale = lowered.fwd_tiles, lowered.scale
    for run in _runs(found, q, k):
        if run.kind == BLIND:
            out[run.at], lse[:, run.at] = 0, -math.inf
            continue
        mask, blind = _mask(lowered, run, q.dtype)
        heads = (run.view(q), run.view(k), run.view(v))
        run_out, run_lse = _flash(*heads, 0.0, run.kind == CAUSAL, attn_mask=mask, scale=scale)
        if blind is not None:
            run_out = run_out.masked_fill(blind.unsqueeze(1), 0)
            run_lse = run_lse.masked_fill(blind, -math.inf)
        run.view(out).copy_(run_out)
        run.view_lse(lse).copy_(run_lse)


def attention_bwd(do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, dbias, lowered) -> None:
    """Fills dq [T, H, D], dk and dv [T, G, D]."""
    found, scale = lowered.fwd_tiles, lowered.scale
    for run in _runs(found, q, k):
        if run.kind == BLIND:
            dq[run.at], dk[run.at], dv[run.at] = 0, 0, 0
            continue
        mask, blind = _mask(lowered, run, q.dtype)
        heads = (run.view(q), run.view(k), run.view(v))
        run_out, run_lse = run.view(out), run.view_lse(lse)
        if blind is not None:
            run_lse = run_lse.masked_fill(blind, math.inf)  # exp(score - inf) = 0: no gradient from or to these
        options = {"dropout_p": 0.0, "is_causal": run.kind == CAUSAL, "attn_mask": mask, "scale": scale}
        run_dq, run_dk, run_dv = _flash_backward(run.view(do), *heads, run_out, run_lse, **options)
        if dlse is not None:
            run_dlse = run.view_lse(dlse)
            if blind is not None:
                run_dlse = run_dlse.masked_fill(blind, 0)
            more_dq, more_dk = _lse_gradient(run_dlse.unsqueeze(-1), heads, run_out, run_lse, options)
            run_dq, run_dk = run_dq + more_dq, run_dk + more_dk
        run.view(dq).copy_(run_dq)
        run.write_key_gradient(dk, run_dk)
        run.write_key_gradient(dv, run_dv)


def _refuse(pair_bias, mass, lowered) -> None:
    if pair_bias is not None or mass is not None or lowered.dropout_p or lowered.q_table.shape != lowered.k_table.shape:
        raise NotImplementedError("attention: the torch path has no pair_bias, dropout, mass or k_layout yet (issue 3)")


class _Run(NamedTuple):
    """`count` equal runs of one call.  With grouped heads count is 1, and the groups take the batch dimension."""

    start: int
    length: int
    count: int
    kind: int
    heads: int
    kv_heads: int

    @property
    def at(self) -> slice:
        return slice(self.start, self.start + self.length * self.count)

    def view(self, t: Tensor) -> Tensor:
        """[T, heads, D] as [count, H, L, D]; grouped: [G, H / G, L, D], where a key head is repeated, not copied."""
        # One as_strided in place of slice, unflatten and transpose: there are seven views per run.
        stride_t, stride_h, stride_d = t.stride()
        offset = t.storage_offset() + self.start * stride_t
        if self.heads == self.kv_heads:
            shape, batch, head = (self.count, self.heads), self.length * stride_t, stride_h
        elif t.shape[1] == self.kv_heads:
            shape, batch, head = (self.kv_heads, self.heads // self.kv_heads), stride_h, 0
        else:
            group = self.heads // self.kv_heads
            shape, batch, head = (self.kv_heads, group), group * stride_h, stride_h
        return t.as_strided((*shape, self.length, t.shape[2]), (batch, head, stride_t, stride_d), offset)

    def view_lse(self, t: Tensor) -> Tensor:
        """[H, T] as [count, H, L] or [G, H / G, L]."""
        stride_h, stride_t = t.stride()
        offset = t.storage_offset() + self.start * stride_t
        if self.heads == self.kv_heads:
            shape, batch = (self.count, self.heads), self.length * stride_t
        else:
            group = self.heads // self.kv_heads
            shape, batch = (self.kv_heads, group), group * stride_h
        return t.as_strided((*shape, self.length), (batch, stride_h, stride_t), offset)

    def write_key_gradient(self, target: Tensor, gradient: Tensor) -> None:
        if self.heads == self.kv_heads:
            self.view(target).copy_(gradient)
        else:  # summed over the query heads that share a key head: in fp32, rounded once
            target[self.at].copy_(gradient.float().sum(1).transpose(0, 1))


def _runs(found: Tensor, q: Tensor, k: Tensor):
    heads, kv_heads = q.shape[1], k.shape[1]
    for start, length, count, kind in found.tolist():
        if heads == kv_heads:
            yield _Run(start, length, count, kind, heads, kv_heads)
        else:
            yield from (_Run(start + i * length, length, 1, kind, heads, kv_heads) for i in range(count))


def _mask(lowered, run: _Run, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """0 / -inf [L, L] of a MASKED run (None: needs none), and which queries see nothing [L] (None: all see something).

    Those see everything in the mask, because the kernel has no answer for an empty row; the caller overwrites them.
    """
    if run.kind != MASKED:
        return None, None
    lo, hi, q_bits, _ = lowered.q_table[:, run.at].unbind(0)
    k_bits = lowered.k_table[2, run.at]
    keys = torch.arange(run.at.start, run.at.stop, dtype=torch.int32)
    seen = (keys >= lo.unsqueeze(1)) & (keys < hi.unsqueeze(1)) & ((q_bits.unsqueeze(1) & k_bits) != 0)
    blind = ~seen.any(1)
    if bool(blind.any()):
        seen |= blind.unsqueeze(1)
    else:
        blind = None
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf), blind


def _lse_gradient(dlse, heads, out, lse, options) -> tuple[Tensor, Tensor]:
    """d lse_i / d s_ij = p_ij: dq gains scale dlse (p k) and dk gains scale p^T (dlse q), by the same two kernels."""
    q, k, v = heads
    mean_key, _ = _flash(q, k, k, **options)
    rows = (dlse * q.float() * options["scale"]).to(q.dtype)
    _, _, for_k = _flash_backward(rows, q, k, v, out, lse, **options)
    return (dlse * mean_key.float() * options["scale"]).to(q.dtype), for_k
