"""Packed attention on CPU: torch's flash kernel over views, run by run.   T tokens, H heads, G key heads, D width.

A run (torch_runs) is a stretch of the batch that sees only itself; most need no mask, and only the rest build one, of
their own [L, L].  Nothing is padded, gathered or shared between runs, so samples cannot touch one another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.ops.attention.torch_runs import BLIND, CAUSAL, MASKED, runs

# The kernels under F.scaled_dot_product_attention; called by name because they alone return lse and take it back.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def schedule(plan, q: Tensor, needs_backward: bool) -> tuple:
    """The runs [R, 4], five empty tensors and no configuration."""
    found = plan.cache.get("runs")  # the same for every dtype and width
    if found is None:
        found = torch.from_numpy(runs(plan.layout.cu_seqlens.numpy(), plan.table.numpy(), plan.has_visible))
        plan.cache["runs"] = found
    return found, *(torch.empty(0, dtype=torch.int32),) * 5, []


def attention_fwd(q, k, v, out, lse, table, found, *rest) -> None:
    """Fills out [T, H, D] and lse [H, T]."""
    *_, scale, _ = rest
    for start, length, count, kind in _batches(found, q, k):
        at = slice(start, start + length * count)
        if kind == BLIND:
            out[at], lse[:, at] = 0, -math.inf
            continue
        mask, blind = _mask(table, at, q.dtype) if kind == MASKED else (None, None)
        heads = _heads(q[at], k[at], v[at], count)
        run_out, run_lse = _flash(*heads, 0.0, kind == CAUSAL, attn_mask=mask, scale=scale)
        if blind is not None:
            run_out = run_out.masked_fill(blind.unsqueeze(1), 0)
            run_lse = run_lse.masked_fill(blind, -math.inf)
        _packed(out[at], q, k, count).copy_(run_out)
        _packed_lse(lse[:, at], q, k, count).copy_(run_lse)


def attention_bwd(do, dlse, q, k, v, out, lse, dq, dk, dv, table, found, *rest) -> None:
    """Fills dq [T, H, D], dk and dv [T, G, D]."""
    *_, scale, _ = rest
    for start, length, count, kind in _batches(found, q, k):
        at = slice(start, start + length * count)
        if kind == BLIND:
            dq[at], dk[at], dv[at] = 0, 0, 0
            continue
        mask, blind = _mask(table, at, q.dtype) if kind == MASKED else (None, None)
        heads = _heads(q[at], k[at], v[at], count)
        run_do, run_out = _packed(do[at], q, k, count), _packed(out[at], q, k, count)
        run_lse = _packed_lse(lse[:, at], q, k, count)
        if blind is not None:
            run_lse = run_lse.masked_fill(blind, math.inf)  # exp(score - inf) = 0: no gradient from or to these
        options = {"dropout_p": 0.0, "is_causal": kind == CAUSAL, "attn_mask": mask, "scale": scale}
        gradients = _flash_backward(run_do, *heads, run_out, run_lse, **options)
        if dlse is not None:
            run_dlse = _packed_lse(dlse[:, at], q, k, count)
            gradients = _add_lse_gradient(gradients, run_dlse, heads, run_out, run_lse, blind, options)
        _packed(dq[at], q, k, count).copy_(gradients[0])
        _sum_group(dk[at], gradients[1], q, k, count)
        _sum_group(dv[at], gradients[2], q, k, count)


def _batches(found: Tensor, q: Tensor, k: Tensor):
    """Runs to compute at once: equal neighbours in one call, unless grouped heads take the batch dimension."""
    for start, length, count, kind in found.tolist():
        if q.shape[1] == k.shape[1]:
            yield start, length, count, kind
        else:
            yield from ((start + i * length, length, 1, kind) for i in range(count))


def _heads(q: Tensor, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views as the kernel wants them: [count, H, L, D], or [G, H / G, L, D] with the key heads expanded, not copied."""
    if q.shape[1] == k.shape[1]:
        return tuple(_packed(t, q, k, count) for t in (q, k, v))
    expanded = (t.transpose(0, 1).unsqueeze(1).expand(-1, q.shape[1] // t.shape[1], -1, -1) for t in (k, v))
    return _packed(q, q, k, count), *expanded


def _packed(t: Tensor, q: Tensor, k: Tensor, count: int) -> Tensor:
    """[count * L, H, D] as [count, H, L, D], or as [G, H / G, L, D] where heads are grouped."""
    if q.shape[1] == k.shape[1]:
        return t.unflatten(0, (count, -1)).transpose(1, 2)
    return t.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)


def _packed_lse(t: Tensor, q: Tensor, k: Tensor, count: int) -> Tensor:
    """[H, count * L] as [count, H, L] or [G, H / G, L]."""
    if q.shape[1] == k.shape[1]:
        return t.unflatten(1, (count, -1)).transpose(0, 1)
    return t.unflatten(0, (k.shape[1], -1))


def _sum_group(target: Tensor, gradient: Tensor, q: Tensor, k: Tensor, count: int) -> None:
    """Writes the gradient of key heads, summed over the query heads that share them."""
    if q.shape[1] == k.shape[1]:
        _packed(target, q, k, count).copy_(gradient)
    else:
        target.copy_(gradient.float().sum(1).transpose(0, 1))  # fp32 sum, one rounding


def _mask(table: Tensor, at: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """0 / -inf [L, L] of one run, and which queries see nothing [L] (None: all see something).

    Those see everything in the mask, because the kernel has no answer for an empty row; the caller overwrites them.
    """
    lo, hi, _, _, q_bits, k_bits = table[:, at].unbind(0)
    keys = torch.arange(at.start, at.stop, dtype=torch.int32)
    seen = (keys >= lo.unsqueeze(1)) & (keys < hi.unsqueeze(1)) & ((q_bits.unsqueeze(1) & k_bits) != 0)
    blind = ~seen.any(1)
    if not bool(blind.any()):
        blind = None
    else:
        seen |= blind.unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf), blind


def _add_lse_gradient(gradients, dlse, heads, out, lse, blind, options):
    """d lse_i / d s_ij = p_ij: dq += scale dlse (p k), dk += scale (p^T dlse q), by the same two kernels."""
    q, k, v = heads
    scale = options["scale"]
    if blind is not None:
        dlse = dlse.masked_fill(blind, 0)
    weighted = dlse.unsqueeze(-1)
    mean_key, _ = _flash(q, k, k, 0.0, options["is_causal"], attn_mask=options["attn_mask"], scale=scale)
    rows = (weighted * q.float() * scale).to(q.dtype)
    _, _, for_k = _flash_backward(rows, q, k, v, out, lse, **options)
    dq, dk, dv = gradients
    return dq + (weighted * mean_key.float() * scale).to(dq.dtype), dk + for_k, dv
