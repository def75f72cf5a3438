"""Attention with pair bias, dropout or modality mass on CPU, block by block, in fp32.   c items, H heads, G key heads.

The formulas are those of reference.py.  A block is r queries of c items by their n keys [c, H, r, n], at most BLOCK
elements (or one row), so that memory stays linear in tokens and a block stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.attention.inputs import Lowered
from mmkernels.ops.attention.torch_runs import CAUSAL
from mmkernels.ops.attention.torch_views import Run, runs_of
from mmkernels.philox import philox_4x32, threshold

BLOCK = 1 << 18  # 1 MiB of scores


def forward(q, k, v, pair_bias, rng, out, lse, mass, lowered: Lowered) -> None:
    """Fills the rows of out, lse and mass that see something."""
    for part in _parts(q, lowered):
        keys, values = part.of_keys(k), part.of_keys(v)
        for block in _blocks(part, pair_bias, rng, lowered):
            tokens = block.queries.flatten()
            scores = block.scores(_rows(q, block.queries, k.shape[1]), keys, lowered)
            p = scores.softmax(-1)
            lse[:, tokens] = (scores.amax(-1) - p.amax(-1).log()).transpose(0, 1).flatten(1)
            if mass is not None:
                modality = F.one_hot(lowered.k_table[3, block.keys].long(), mass.shape[2]).float()
                own = p.flatten(1, 2) @ modality  # [c, H r, Mk]
                mass[tokens] = own.unflatten(1, (-1, block.height)).transpose(1, 2).flatten(0, 1)
            rows = _products(block.drop(p), values[:, :, : block.width])
            out[tokens] = rows.transpose(1, 2).flatten(0, 1).to(out.dtype)


def backward(do, dlse, q, k, v, pair_bias, rng, dq, dk, dv, dbias, lowered: Lowered, *, add: bool) -> None:
    """Fills dq of the rows that see something, adds to or writes dk and dv, fills dbias."""
    dbias_sum = None if dbias is None else dbias.new_zeros(dbias.shape, dtype=torch.float64)
    for part in _parts(q, lowered):
        keys, values = part.of_keys(k), part.of_keys(v)
        part_dk, part_dv = torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(part, pair_bias, rng, lowered):
            tokens = block.queries.flatten()
            queries, gradients = (_rows(t, block.queries, k.shape[1]) for t in (q, do))
            p = block.scores(queries, keys, lowered).softmax(-1)  # lse and out have been rounded
            dp = block.drop((gradients @ values[:, :, : block.width].mT).view(p.shape))
            ds = dp.sub_(torch.linalg.vecdot(p, dp).unsqueeze(-1))
            if dlse is not None:
                ds += dlse[:, tokens].unflatten(1, block.queries.shape).transpose(0, 1).unsqueeze(-1)
            ds *= p
            if dbias is not None:
                dbias_sum += block.bias_gradient(ds, lowered, dbias.shape)
            ds *= lowered.scale
            rows = _products(ds, keys[:, :, : block.width])
            dq[tokens] = rows.transpose(1, 2).flatten(0, 1).to(dq.dtype)
            for total, weights, of_query in ((part_dk, ds, queries), (part_dv, block.drop(p), gradients)):
                total[:, :, : block.width] += weights.view(*of_query.shape[:3], -1).mT @ of_query
        part.run.write_key_heads(dk, part_dk, add=add)
        part.run.write_key_heads(dv, part_dv, add=add)
    if dbias is not None:
        dbias.copy_(dbias_sum)


class _Part(NamedTuple):
    """Items of a run that are computed together."""

    run: Run
    queries: Tensor  # int64 [c, L]: packed indices
    keys: Tensor  # int64 [c, K]
    heads: int
    height: int  # rows of a block

    def of_keys(self, t: Tensor) -> Tensor:
        """[Tk, G, D] as fp32 [c, G, K, D]."""
        return t[self.keys].transpose(1, 2).float()


class _Block(NamedTuple):
    """The given queries [c, r] of a part and the keys [c, n] that they may reach."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None  # 0 / -inf [r, n]
    bias: Tensor | None  # fp32 [H, Mq, Mk]
    keep: Tensor | None  # bool [c, H, r, n]
    dropout_p: float

    @property
    def height(self) -> int:
        return self.queries.shape[1]

    @property
    def width(self) -> int:
        return self.keys.shape[1]

    def scores(self, queries: Tensor, keys: Tensor, lowered: Lowered) -> Tensor:
        """fp32 [c, H, r, n] of queries [c, G, H/G r, D] and keys [c, G, K, D], -inf where the mask hides a key."""
        scores = (queries @ keys[:, :, : self.width].mT).mul_(lowered.scale)
        scores = scores.view(len(queries), -1, self.height, self.width)
        if self.bias is not None:
            of_query = self.bias[:, lowered.q_table[3, self.queries].long()].transpose(0, 1)  # [c, H, r, Mk]
            of_key = lowered.k_table[3, self.keys].long()[:, None, None]
            scores += of_query.gather(3, of_key.expand(scores.shape))
        if self.mask is not None:
            scores += self.mask
        return scores

    def drop(self, values: Tensor) -> Tensor:
        """values [c, H, r, n] times 0 where dropped and 1 / (1 - dropout_p) where kept, in place."""
        if self.keep is None:
            return values
        return values.mul_(1.0 / (1.0 - self.dropout_p)).masked_fill_(~self.keep, 0.0)

    def bias_gradient(self, ds: Tensor, lowered: Lowered, shape: tuple[int, int, int]) -> Tensor:
        """fp64 [H, Mq, Mk]: ds [c, H, r, n] summed over the queries and keys of each pair of modalities."""
        of_query = F.one_hot(lowered.q_table[3, self.queries].long(), shape[1]).float()
        of_key = F.one_hot(lowered.k_table[3, self.keys].long(), shape[2]).float()
        by_key = (ds.flatten(1, 2) @ of_key).view(*ds.shape[:3], -1)  # [c, H, r, Mk]
        return torch.einsum("crm,chrn->hmn", of_query.double(), by_key.double())


def _parts(q: Tensor, lowered: Lowered) -> Iterator[_Part]:
    heads = q.shape[1]
    for run in runs_of(lowered, heads, heads):  # grouped heads need no views here, so items may share a block
        together = max(1, BLOCK // (heads * run.q_len * run.k_len))
        height = max(1, min(run.q_len, BLOCK // (heads * run.k_len)))
        for start in range(0, run.count, together):
            own = run.items(start, min(start + together, run.count))
            yield _Part(own, own.query_tokens(), own.key_tokens(), heads, height)


def _blocks(part: _Part, pair_bias: Tensor | None, rng: Tensor | None, lowered: Lowered) -> Iterator[_Block]:
    run = part.run
    for start in range(0, run.q_len, part.height):
        stop = min(start + part.height, run.q_len)
        queries, keys = part.queries[:, start:stop], part.keys
        mask = run.mask(lowered, slice(start, stop))
        if run.kind == CAUSAL:
            keys = keys[:, :stop]
            mask = keys.new_full((stop - start, stop), -torch.inf, dtype=torch.float32).triu_(start + 1)
        keep = None
        if lowered.dropout_p:
            keep = _kept(rng, part.heads, queries, keys, lowered.dropout_p)
        yield _Block(queries, keys, mask, pair_bias, keep, lowered.dropout_p)


def _rows(t: Tensor, tokens: Tensor, kv_heads: int) -> Tensor:
    """[Tq, H, D] at tokens [c, r] as fp32 [c, G, H/G r, D]: the query heads of a key head one after another."""
    rows = t[tokens].transpose(1, 2).float()  # [c, H, r, D]
    return rows.reshape(len(rows), kv_heads, -1, t.shape[2])


def _products(weights: Tensor, values: Tensor) -> Tensor:
    """weights [c, H, r, n] @ values [c, G, n, D] -> [c, H, r, D]"""
    c, heads, height, width = weights.shape
    return (weights.view(c, values.shape[1], -1, width) @ values).view(c, heads, height, -1)


def _kept(rng: Tensor, heads: int, queries: Tensor, keys: Tensor, dropout_p: float) -> Tensor:
    """bool [c, H, r, n]: reference.dropout_keep, each Philox counter computed once for the four keys that it serves."""
    group = keys >> 2
    new = torch.ones_like(group, dtype=torch.bool)
    new[:, 1:] = group[:, 1:] != group[:, :-1]
    slot = new.cumsum(1) - 1
    counters = group.new_zeros(len(group), int(slot[:, -1].max()) + 1).scatter_(1, slot, group)
    head = torch.arange(heads, device=keys.device)[:, None, None]
    words = philox_4x32(counters[:, None, None], queries[:, None, :, None], head, rng[1], rng[0])
    keep = torch.stack([word >= threshold(dropout_p) for word in words], -1).flatten(3)  # [c, H, r, 4 slots]
    place = (slot * 4 + (keys & 3))[:, None, None]
    return keep.gather(3, place.expand(*keep.shape[:3], -1))
