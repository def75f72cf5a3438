"""The tensors of one run, as torch's kernels take them.   H heads, G key heads, D width, n items, L queries, K keys.

With H = G the n items of a run are one batch.  With grouped heads n is 1 and the G groups take the batch dimension, so
that a key head is repeated by a stride of 0 and not copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.torch_runs import GATHERED, MASKED, NOT_KEPT, Runs


class Schedule(NamedTuple):
    """torch_runs.Runs in the six int32 tensors that the operator hands through, each of at least two rows.

    Dynamo compiles again for lengths 0 and 1; a run of no items, and elements that nothing points at, fill them up.
    """

    table: Tensor
    index: Tensor
    masks: Tensor  # the bits of the fp32 masks
    blind: Tensor  # its first `header[0]` elements
    header: Tensor  # number of blind queries, covered
    unused: Tensor

    @classmethod
    def of(cls, lowered) -> Schedule:
        return cls(*lowered[2:8])

    def blind_queries(self) -> Tensor | None:
        """int64 [n]; None where every query sees something."""
        count = int(self.header[0])
        return self.blind[:count].long() if count else None

    @property
    def covered(self) -> bool:
        return bool(self.header[1])


def to_tensors(runs: Runs) -> Schedule:
    parts = [torch.from_numpy(t) for t in (runs.table, runs.index, runs.masks.view("int32"), runs.blind)]
    header = torch.tensor([len(runs.blind), runs.covered], dtype=torch.int32, device="cpu")
    empty = header.new_zeros(2)
    return Schedule(*(t if len(t) > 1 else torch.cat([t, t.new_zeros(2, *t.shape[1:])]) for t in parts), header, empty)


class Run(NamedTuple):
    """One row of the table, of `count` items; the indices are int64 where its tokens do not stand in a row."""

    q_start: int
    q_step: int
    q_len: int
    k_start: int
    k_step: int
    k_len: int
    count: int
    kind: int
    mask_at: int
    heads: int
    kv_heads: int
    q_index: Tensor | None  # [n L]
    k_index: Tensor | None  # [n K]

    def queries(self, t: Tensor) -> Tensor:
        """[Tq, H, D] as [n, H, L, D]; grouped: [G, H / G, L, D]."""
        if self.q_index is None:
            return self._view(t, self.q_start, self.q_step, self.q_len)
        return self._view(t.index_select(0, self.q_index), 0, self.q_len, self.q_len)

    def keys(self, t: Tensor) -> Tensor:
        """[Tk, G, D] as [n, H, K, D]; grouped: [G, H / G, K, D]."""
        if self.k_index is None:
            return self._view(t, self.k_start, self.k_step, self.k_len)
        return self._view(t.index_select(0, self.k_index), 0, self.k_len, self.k_len)

    def lse(self, t: Tensor) -> Tensor:
        """[H, Tq] as [n, H, L]; grouped: [G, H / G, L]."""
        if self.q_index is None:
            return self._view_lse(t, self.q_start, self.q_step)
        return self._view_lse(t.index_select(1, self.q_index), 0, self.q_len)

    def write_queries(self, target: Tensor, values: Tensor) -> None:
        """values, of the form of `queries`, into target [Tq, H, D] of any dtype."""
        if self.q_index is None:
            self._view(target, self.q_start, self.q_step, self.q_len).copy_(values)
        else:
            target.index_copy_(0, self.q_index, self._rows(values).to(target.dtype))

    def write_lse(self, target: Tensor, values: Tensor) -> None:
        if self.q_index is None:
            self._view_lse(target, self.q_start, self.q_step).copy_(values)
        else:
            rows = values.transpose(0, 1) if self.heads == self.kv_heads else values
            target.index_copy_(1, self.q_index, rows.reshape(self.heads, -1))

    def write_keys(self, target: Tensor, values: Tensor, *, add: bool) -> None:
        """values, of the form of `keys`, into target [Tk, G, D]; the query heads of a group are summed first."""
        if self.heads != self.kv_heads:
            values = values.sum(1, keepdim=True).transpose(0, 1)  # [1, G, K, D]
        self.write_key_heads(target, values, add=add)

    def write_key_heads(self, target: Tensor, values: Tensor, *, add: bool) -> None:
        """values [n, G, K, D] into target [Tk, G, D]."""
        rows = values.transpose(1, 2)
        if self.k_index is not None:
            rows = rows.reshape(-1, *target.shape[1:])
            if add:
                target.index_add_(0, self.k_index, rows)
            else:
                target.index_copy_(0, self.k_index, rows.to(target.dtype))
            return
        for i, own in enumerate(rows):  # one by one: items may share keys
            start = self.k_start + i * self.k_step
            place = target[start : start + self.k_len]
            place.add_(own) if add else place.copy_(own)

    def items(self, start: int, stop: int) -> Run:
        """The run of some of its items."""

        def part(index: Tensor | None, length: int) -> Tensor | None:
            return index if index is None else index[start * length : stop * length]

        return self._replace(
            q_start=self.q_start + start * self.q_step,
            k_start=self.k_start + start * self.k_step,
            count=stop - start,
            q_index=part(self.q_index, self.q_len),
            k_index=part(self.k_index, self.k_len),
        )

    def query_tokens(self) -> Tensor:
        """int64 [n, L]: packed index of each query."""
        return self._tokens(self.q_index, self.q_start, self.q_step, self.q_len)

    def key_tokens(self) -> Tensor:
        """int64 [n, K]"""
        return self._tokens(self.k_index, self.k_start, self.k_step, self.k_len)

    def mask(self, lowered, rows: slice) -> Tensor | None:
        """0 / -inf [rows, K] of a MASKED run, None of the others.  Every row sees something."""
        if self.kind != MASKED:
            return None
        if self.mask_at != NOT_KEPT:
            start, stop = (self.mask_at + row * self.k_len for row in (rows.start, rows.stop))
            return Schedule.of(lowered).masks[start:stop].view(torch.float32).view(-1, self.k_len)
        queries, keys = self.query_tokens()[0, rows], self.key_tokens()[0]  # the mask of one item is that of all
        lo, hi, q_bits, _ = lowered.q_table[:, queries].unsqueeze(2).unbind(0)
        seen = (keys >= lo) & (keys < hi) & ((q_bits & lowered.k_table[2, keys]) != 0)
        return seen.new_zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, -torch.inf)

    def _tokens(self, index: Tensor | None, start: int, step: int, length: int) -> Tensor:
        if index is not None:
            return index.view(self.count, length)
        items, places = (torch.arange(n, device="cpu") for n in (self.count, length))
        return (start + step * items).unsqueeze(1) + places

    def _rows(self, values: Tensor) -> Tensor:
        """The form of `queries` as [n L, H, D]."""
        rows = values.transpose(1, 2) if self.heads == self.kv_heads else values.permute(2, 0, 1, 3)
        return rows.reshape(-1, self.heads, values.shape[-1])

    def _view(self, t: Tensor, start: int, step: int, length: int) -> Tensor:
        # One as_strided in place of slice, unflatten and transpose: there are seven views per run.
        stride_t, stride_h, stride_d = t.stride()
        offset = t.storage_offset() + start * stride_t
        if self.heads == self.kv_heads:
            shape, batch, head = (self.count, self.heads), step * stride_t, stride_h
        elif t.shape[1] == self.kv_heads:
            shape, batch, head = (self.kv_heads, self.heads // self.kv_heads), stride_h, 0
        else:
            group = self.heads // self.kv_heads
            shape, batch, head = (self.kv_heads, group), group * stride_h, stride_h
        return t.as_strided((*shape, length, t.shape[2]), (batch, head, stride_t, stride_d), offset)

    def _view_lse(self, t: Tensor, start: int, step: int) -> Tensor:
        stride_h, stride_t = t.stride()
        offset = t.storage_offset() + start * stride_t
        if self.heads == self.kv_heads:
            shape, batch = (self.count, self.heads), step * stride_t
        else:
            group = self.heads // self.kv_heads
            shape, batch = (self.kv_heads, group), group * stride_h
        return t.as_strided((*shape, self.q_len), (batch, stride_h, stride_t), offset)


def runs_of(lowered, heads: int, kv_heads: int) -> Iterator[Run]:
    """The runs of a schedule; with grouped heads, item by item."""
    table, index, *_ = Schedule.of(lowered)
    for q_start, q_step, q_len, k_start, k_step, k_len, count, kind, mask_at in table.tolist():
        q_index = index[q_start : q_start + count * q_len].long() if q_step == GATHERED else None
        k_index = index[k_start : k_start + count * k_len].long() if k_step == GATHERED else None
        whole = Run(
            q_start, q_step, q_len, k_start, k_step, k_len, count, kind, mask_at, heads, kv_heads, q_index, k_index
        )
        if count == 1 or heads == kv_heads:
            if count:
                yield whole
            continue
        for i in range(count):
            yield whole.items(i, i + 1)
