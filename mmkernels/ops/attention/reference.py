"""Packed attention, eager and dense: what the other implementations must equal.   T tokens, H heads, G key heads.

    seen[i, j] = kv_lo[i] <= j < kv_hi[i] and q_bits[i] & k_bits[j] != 0
    lse[h, i]  = log sum_j exp(q_i k_j scale),  p = exp(q k^T scale - lse),  out = p v         over the keys seen
    dv = p^T do,  ds = p (do v^T - rowsum(do out) + dlse),  dq = scale ds k,  dk = scale ds^T q

A query that sees nothing has out 0, lse -inf and gives no gradient.  All in fp64, rounded once at the end.
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
    p, exact_lse = _probabilities(q, k, table, scale)
    lse.copy_(exact_lse)
    out.copy_(torch.einsum("hqk,khd->qhd", p, _per_query_head(v, q)))


def attention_bwd(do, dlse, q, k, v, out, lse, dq, dk, dv, table, *rest) -> None:
    """Fills dq [T, H, D], dk and dv [T, G, D].  Takes neither out nor lse: they have been rounded."""
    *_, scale, _ = rest
    p, _ = _probabilities(q, k, table, scale)
    do = do.double()
    dp = torch.einsum("qhd,khd->hqk", do, _per_query_head(v, q))
    delta = (p * dp).sum(2)  # rowsum(do out), since out = p v
    if dlse is not None:
        delta = delta - dlse
    ds = p * (dp - delta.unsqueeze(2)) * scale
    dq.copy_(torch.einsum("hqk,khd->qhd", ds, _per_query_head(k, q)))
    for gradient, weights, rows in ((dk, ds, q.double()), (dv, p, do)):
        per_query_head = torch.einsum("hqk,qhd->khd", weights, rows)
        gradient.copy_(per_query_head.unflatten(1, (gradient.shape[1], -1)).sum(2))


def seen_pairs(table: Tensor) -> Tensor:
    """bool [T, T]: which key each query sees."""
    lo, hi, _, _, q_bits, k_bits = table.unbind(0)
    keys = torch.arange(table.shape[1], device=table.device)
    inside = (keys >= lo.unsqueeze(1)) & (keys < hi.unsqueeze(1))
    return inside & ((q_bits.unsqueeze(1) & k_bits) != 0)


def _probabilities(q: Tensor, k: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """p [H, T, T], 0 where the query does not see the key, and lse [H, T]."""
    seen = seen_pairs(table)
    scores = torch.einsum("qhd,khd->hqk", q.double(), _per_query_head(k, q)) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, 2)
    return torch.where(seen, torch.exp(scores - lse.unsqueeze(2)), 0.0), lse


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1)
