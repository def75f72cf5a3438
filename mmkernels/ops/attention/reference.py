"""Packed attention, eager and dense: what the other implementations must equal.   T tokens, H heads, G key heads.

    seen[i, j] = kv_lo[i] <= j < kv_hi[i] and q_bits[i] & k_bits[j] != 0
    s[h, i, j] = q_i k_j scale + pair_bias[h, mod(i), mod(j)]
    lse[h, i]  = log sum_j exp(s),  p = exp(s - lse),  z = keep / (1 - dropout_p),  out = (p z) v    over the keys seen
    mass[i, h, m] = sum of p over the keys of modality m
    dv = (p z)^T do,  ds = p (z (do v^T) - rowsum(do out) + dlse),  dq = scale ds k,  dk = scale ds^T q
    dbias[h, m, n] = sum of ds over the queries of modality m and the keys of modality n

A query that sees nothing has out 0, lse -inf, mass 0 and gives no gradient.  All in fp64, rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.attention.inputs import Lowered, held
from mmkernels.philox import philox_4x32, threshold


def schedule(plan, request) -> tuple:
    """Six empty tensors and no configuration: the reference needs no schedule."""
    return *(torch.empty(0, dtype=torch.int32, device=plan.layout.device),) * 6, []


def attention_fwd(q, k, v, pair_bias, rng, out, lse, mass, lowered: Lowered) -> None:
    """Fills out [Tq, H, D], lse [H, Tq] and, where it is not None, mass [Tq, H, Mk]."""
    q, k, v, pair_bias = held(q=q, k=k, v=v, pair_bias=pair_bias)
    p, exact_lse = _probabilities(q, k, pair_bias, lowered)
    lse.copy_(exact_lse)
    if mass is not None:
        keys_of = F.one_hot(lowered.k_table[3].long(), mass.shape[2]).double()
        mass.copy_(torch.einsum("hqk,km->qhm", p, keys_of))
    kept = p * _dropout_factor(rng, p.shape, lowered.dropout_p)
    out.copy_(torch.einsum("hqk,khd->qhd", kept, _per_query_head(v, q)))


def attention_bwd(do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, dbias, lowered: Lowered) -> None:
    """Fills dq [Tq, H, D], dk and dv [Tk, G, D], dbias.  Takes neither out nor lse: they have been rounded."""
    do, q, k, v, pair_bias = held(do=do, q=q, k=k, v=v, pair_bias=pair_bias)
    p, _ = _probabilities(q, k, pair_bias, lowered)
    z = _dropout_factor(rng, p.shape, lowered.dropout_p)
    do = do.double()
    dp = torch.einsum("qhd,khd->hqk", do, _per_query_head(v, q)) * z
    delta = (p * dp).sum(2)  # rowsum(do out), since out = (p z) v
    if dlse is not None:
        delta = delta - dlse
    ds = p * (dp - delta.unsqueeze(2))
    dq.copy_(torch.einsum("hqk,khd->qhd", ds, _per_query_head(k, q)) * lowered.scale)
    for gradient, weights, rows in ((dk, ds * lowered.scale, q.double()), (dv, p * z, do)):
        per_query_head = torch.einsum("hqk,qhd->khd", weights, rows)
        gradient.copy_(per_query_head.unflatten(1, (gradient.shape[1], -1)).sum(2))
    if dbias is not None:
        of_query, of_key = (
            F.one_hot(table[3].long(), n).double()
            for table, n in ((lowered.q_table, dbias.shape[1]), (lowered.k_table, dbias.shape[2]))
        )
        dbias.copy_(torch.einsum("qm,hqk,kn->hmn", of_query, ds, of_key))


def seen_pairs(q_table: Tensor, k_table: Tensor) -> Tensor:
    """bool [Tq, Tk]: which key each query sees."""
    lo, hi, q_bits, _ = q_table.unbind(0)
    keys = torch.arange(k_table.shape[1], device=q_table.device)
    inside = (keys >= lo.unsqueeze(1)) & (keys < hi.unsqueeze(1))
    return inside & ((q_bits.unsqueeze(1) & k_table[2]) != 0)


def dropout_keep(rng: Tensor, head: Tensor, query: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """bool, of the broadcast shape of head, query and key (all packed indices): which probabilities are kept.

    Word key % 4 of Philox at counter (key // 4, query, head, offset) under the seed, at least threshold(dropout_p).
    """
    words = philox_4x32(key >> 2, query, head, rng[1], rng[0])
    word = torch.zeros((), dtype=torch.int64, device=rng.device)
    for remainder, candidate in enumerate(words):
        word = torch.where((key & 3) == remainder, candidate, word)
    return word >= threshold(dropout_p)


def _dropout_factor(rng: Tensor | None, shape, dropout_p: float) -> Tensor | float:
    """z [H, Tq, Tk]: 0 where dropped, 1 / (1 - dropout_p) where kept."""
    if dropout_p == 0.0:
        return 1.0
    axes = torch.meshgrid(*(torch.arange(n, device=rng.device) for n in shape), indexing="ij")
    return dropout_keep(rng, *axes, dropout_p).double() / (1.0 - dropout_p)


def _probabilities(q: Tensor, k: Tensor, pair_bias: Tensor | None, lowered: Lowered) -> tuple[Tensor, Tensor]:
    """p [H, Tq, Tk], 0 where the query does not see the key, and lse [H, Tq]."""
    seen = seen_pairs(lowered.q_table, lowered.k_table)
    scores = torch.einsum("qhd,khd->hqk", q.double(), _per_query_head(k, q)) * lowered.scale
    if pair_bias is not None:
        scores = scores + pair_bias.double()[:, lowered.q_table[3].long()][:, :, lowered.k_table[3].long()]
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, 2)
    return torch.where(seen, torch.exp(scores - lse.unsqueeze(2)), 0.0), lse


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1)
