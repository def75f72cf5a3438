"""Dense masks read back as intervals.   n masks (1, B or B H), Lq queries, Lk keys.

A mask is expressible where each query sees one stretch of keys, both ends of the stretches non-decreasing; keys that no
query of the sample sees (padding, wherever it stands) may lie inside a stretch, and queries that see nothing anywhere.
Padding, causal, windows, prefixes, documents one after another and their combinations are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Query i of mask b sees the keys lo[b, i] <= j < hi[b, i] that are not hidden, and none where it is blind.

    lo, hi  int64 [n, Lq], non-decreasing along a row;  hidden  bool [n, Lk] or None;  blind  bool [n, Lq] or None
    """

    lo: np.ndarray
    hi: np.ndarray
    hidden: np.ndarray | None = None
    blind: np.ndarray | None = None

    def plain(self, keys: int) -> str | None:
        """ "full" where every query sees every key, "causal" where query i sees keys 0 to i, else None."""
        if self.hidden is not None or self.blind is not None or (self.lo != 0).any():
            return None
        if (self.hi == keys).all():
            return "full"
        return "causal" if (self.hi == np.minimum(np.arange(self.hi.shape[1]) + 1, keys)).all() else None

    def key(self) -> tuple[tuple | None, ...]:
        # With the shapes: bounds [n, 1] and [1, Lq] may have equal bytes.
        return tuple(None if part is None else (part.shape, part.tobytes()) for part in self)


def of_lengths(
    queries: int,
    keys: int,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    causal: bool,
    window,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """lo and hi int64 [B or 1, Lq] of right-padded samples, on the lengths' device, without lengths on the host.

    lengths [B], None: whole rows.
    causal and window count from the query's place among the keys: its own index, or bottom_right: the last real query
    stands at the last real key.
    """
    given = k_lengths if q_lengths is None else q_lengths
    own = torch.arange(queries, device="cpu" if given is None else given.device).unsqueeze(0)
    q_ends = torch.full((1, 1), queries, device=own.device) if q_lengths is None else q_lengths.long().unsqueeze(1)
    k_ends = torch.full((1, 1), keys, device=own.device) if k_lengths is None else k_lengths.long().unsqueeze(1)
    place = own + (k_ends - q_ends) if bottom_right else own
    left, right = window
    if causal:
        right = 0
    lo = (place - left).clamp(min=0) if left >= 0 else torch.zeros_like(place)
    hi = torch.minimum((place + right + 1).clamp(min=0), k_ends) if right >= 0 else k_ends
    if q_lengths is not None:  # padding rows see nothing: an empty stretch at the end
        lo = torch.where(own >= q_ends, torch.maximum(lo, hi), lo)
    lo, hi = torch.broadcast_tensors(lo, hi)
    return lo, hi


def intersect(a: Bounds, b: Bounds) -> Bounds:
    """What both let through."""

    def either(x, y):
        return y if x is None else x if y is None else x | y

    return Bounds(np.maximum(a.lo, b.lo), np.minimum(a.hi, b.hi), either(a.hidden, b.hidden), either(a.blind, b.blind))


def read(mask: Tensor, batch: int, heads: int) -> Bounds | str:
    """Bounds of a mask [B, H, Lq, Lk], boolean or additive, any but the last dimension of which may be 1.

    For one sample, for all, or, where heads differ, for B H.  Where bounds cannot hold it: why not.
    """
    mask = mask.detach()
    for d in range(3):  # expanded masks are read once
        if mask.shape[d] > 1 and mask.stride(d) == 0:
            mask = mask.narrow(d, 0, 1)
    seen = _boolean(mask.cpu())
    if isinstance(seen, str):
        return seen
    if seen.shape[1] > 1 and bool((seen == seen[:, :1]).all()):
        seen = seen[:, :1]
    if seen.shape[1] > 1:
        seen = seen.expand(batch, heads, -1, -1)
    return _stretches(seen.flatten(0, 1).numpy())


def _boolean(mask: Tensor) -> Tensor | str:
    """The mask as True = may be seen: float masks of 0 and "minus infinity" become boolean; else why not."""
    if mask.dtype == torch.bool:
        return mask
    # exp(score + mask) is exactly 0 from there on, if the row sees anything at all.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    seen = mask == 0
    if not bool((hidden | seen).all()):
        return "has values other than 0 and -inf"
    if bool((hidden & (mask != -torch.inf)).any()) and not bool(seen.any(-1).all()):
        return "has a row of lowest values, which softmax spreads evenly over all keys (-inf would hide them)"
    return seen


def _stretches(seen: np.ndarray) -> Bounds | str:
    """Bounds of bool [n, Lq, Lk]."""
    n, queries, keys = seen.shape
    if not seen.size:
        return Bounds(np.zeros((n, queries), np.int64), np.zeros((n, queries), np.int64))
    lo, hi = seen.argmax(2), keys - seen[:, :, ::-1].argmax(2)
    counts = np.count_nonzero(seen, axis=2)
    sees, hidden = counts > 0, None
    if (counts != hi - lo)[sees].any():
        hidden = ~seen.any(1)
        shown = np.concatenate([np.zeros((n, 1), np.int64), np.cumsum(~hidden, 1)], 1)  # before each key
        broken = sees & (counts != np.take_along_axis(shown, hi, 1) - np.take_along_axis(shown, lo, 1))
        if broken.any():
            return "lets query {1} of mask {0} see keys that are not one stretch".format(*np.argwhere(broken)[0])
    first = np.maximum.accumulate(np.where(sees, lo, 0), 1)
    last = np.maximum.accumulate(np.where(sees, hi, 0), 1)
    falls = sees & ((first != lo) | (last != hi))
    if falls.any():
        return "lets query {1} of mask {0} see earlier keys than one before it".format(*np.argwhere(falls)[0])
    # Rows that see nothing stand at the end of what was seen before them; amid rows of the same keys, bits say so.
    lo, hi = np.where(sees, lo, last), np.where(sees, hi, last)
    if (np.diff(lo, axis=1) >= 0).all():
        return Bounds(lo, hi, hidden)
    return Bounds(np.where(sees, lo, first), hi, hidden, ~sees)
