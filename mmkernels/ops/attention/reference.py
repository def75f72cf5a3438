"""Packed attention, eager and dense: what the other implementations must equal.   T tokens, H heads, G key heads.

    seen[i, j] = kv_lo[i] <= j < kv_hi[i] and q_bits[i] & k_bits[j] != 0
    lse[h, i]  = log sum_j exp(q_i k_j scale),  p = exp(q k^T scale - lse),  out = p v         over the keys seen
    dv = p^T do,  ds = p (do v^T - rowsum(do out) + dlse),  dq = scale ds k,  dk = scale ds^T q

A query that sees nothing has out 0, lse -inf and gives no gradient.  fp64 in fp64, everything else in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def schedule(plan, q: Tensor, needs_backward: bool) -> tuple:
    """Six empty tensors and no configuration: the reference needs no schedule."""
    return *(torch.empty(0, dtype=torch.int32, device=q.device),) * 6, []


def attention_fwd(q, k, v, out, lse, table, *rest) -> None:
    """Fills out [T, H, D] and lse [H, T]."""
    *_, scale, _ = rest
    group = q.shape[1] // k.shape[1]
    scores = _scores(q, k, table, scale, group, lse.dtype)
    lse.copy_(torch.logsumexp(scores, 2))
    out.copy_(torch.einsum("hqk,khd->qhd", _probabilities(scores, lse), _widen(v, group, lse.dtype)))


def attention_bwd(do, dlse, q, k, v, out, lse, dq, dk, dv, table, *rest) -> None:
    """Fills dq [T, H, D], dk and dv [T, G, D]."""
    *_, scale, _ = rest
    group, dtype = q.shape[1] // k.shape[1], lse.dtype
    p = _probabilities(_scores(q, k, table, scale, group, dtype), lse)
    wide_do = do.to(dtype)
    delta = (wide_do * out.to(dtype)).sum(2).t()  # [H, T]
    if dlse is not None:
        delta = delta - dlse
    dp = torch.einsum("qhd,khd->hqk", wide_do, _widen(v, group, dtype))
    ds = p * (dp - delta.unsqueeze(2)) * scale
    dq.copy_(torch.einsum("hqk,khd->qhd", ds, _widen(k, group, dtype)))
    for gradient, weights, rows in ((dk, ds, q.to(dtype)), (dv, p, wide_do)):
        per_head = torch.einsum("hqk,qhd->khd", weights, rows)
        gradient.copy_(per_head.unflatten(1, (-1, group)).sum(2))


def seen_pairs(table: Tensor) -> Tensor:
    """bool [T, T]: which key each query sees."""
    lo, hi, _, _, q_bits, k_bits = table.unbind(0)
    keys = torch.arange(table.shape[1], device=table.device)
    inside = (keys >= lo.unsqueeze(1)) & (keys < hi.unsqueeze(1))
    return inside & ((q_bits.unsqueeze(1) & k_bits) != 0)


def _scores(q, k, table, scale, group, dtype) -> Tensor:
    """[H, T, T], -inf where the query does not see the key."""
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), _widen(k, group, dtype)) * scale
    return scores.masked_fill(~seen_pairs(table), float("-inf"))


def _probabilities(scores, lse) -> Tensor:
    return torch.where(scores == float("-inf"), 0.0, torch.exp(scores - lse.unsqueeze(2)))


def _widen(t: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).repeat_interleave(group, dim=1)
