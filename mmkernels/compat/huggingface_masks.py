"""Hugging Face's mask functions as intervals, without a dense mask.   B samples, Lq queries, Lk keys.

transformers describes a mask by functions (batch, head, query, key) -> bool, composed by `and_masks` and `or_masks`,
and a 2-D padding mask beside them.  The functions it composes are known here by name; each lets a query see an interval
of keys around the query itself, or nothing, so unions and intersections are intervals again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.compat.kept import by_content
from mmkernels.compat.mask_reading import Bounds
from mmkernels.compat.padded import PaddedPlan, plan_bounds, plan_device_bounds

_HOME = "transformers.masking_utils"
_OWN_SEQUENCE = "packed_sequence_mask_function"
_END = 2**31 - 1  # beyond any key
_OWN_CODE = (
    "mmkernels: this model computes with its attention mask, which is intervals here and not a tensor: its code does "
    "not use transformers' attention interface; set attn_implementation='eager' for it"
)


class UnknownMask(Exception):
    """A mask function that intervals are not known for."""


class PaddedMask:
    """What stands for the attention mask in a model with attn_implementation="mmkernels": one per forward pass.

    lo, hi    int64 [1 or B, Lq] on the host: the keys that each query sees, before padding is taken away
    padding   bool [B, Lk], True where a key is real, or None.  On a GPU it is never read
    offset    of the first query among the keys
    causal    so queries and keys are the same tokens
    packable  cu_seq_lens may take the mask's place: nothing but causal, window and sequences one after another
    keeps_no_packs_apart   each row is one sequence from its first token on, whatever its position_ids say
    """

    ndim = 4  # to transformers, a mask that has been prepared

    def __init__(
        self, lo: Tensor, hi: Tensor, keys: int, padding: Tensor | None, *, batch: int, offset: int, parts: set[str]
    ) -> None:
        self.batch, self.queries, self.keys = batch, lo.shape[1], keys
        self.shape = (batch, 1, self.queries, keys)
        self.lo, self.hi, self.offset = lo, hi, offset
        # [B], [B] and [B, Lk]: the first real key, the end of the last, padding between them (None: none is there).
        self.first = self.stop = self.hidden = None
        if padding is not None:
            self._read(padding)
        self.causal = "causal_mask_function" in parts
        self.packable = not self.is_padded and not parts & {"blockwise_overlay", "chunked_overlay"}
        whole = self.causal and offset == 0 and self.queries == keys and not self.is_padded
        self.keeps_no_packs_apart = whole and _OWN_SEQUENCE not in parts
        self._plans: dict[tuple, PaddedPlan] = {}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{_OWN_CODE} ({getattr(function, '__name__', function)} of attention_mask)")

    def __getitem__(self, item):
        raise NotImplementedError(f"{_OWN_CODE} (part of attention_mask)")

    def __getattr__(self, name: str):
        raise AttributeError(f"{_OWN_CODE} (attention_mask.{name})")

    @property
    def is_padded(self) -> bool:
        return self.first is not None

    def plan(self, queries: int, device: torch.device, *, skip: bool, by_head: int) -> PaddedPlan:
        """The plan for `queries` rows, or as many where the mask has one row for all.

        skip     queries and keys are the same tokens, so the padding among them sees nothing
        by_head  0, or the number of heads, each of which is taken for a sample (padded.goes_by_head)
        """
        skip = skip and self.is_padded and self.offset + queries == self.keys
        key = (queries, device, skip, by_head)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._build(queries, device, skip, by_head)
        return found

    def _read(self, padding: Tensor) -> None:
        if padding.device.type == "cpu" and bool(padding.all()):
            return
        place = torch.arange(self.keys, device=padding.device)
        self.stop = torch.where(padding, place + 1, 0).amax(1)
        self.first = torch.minimum(torch.where(padding, place, self.keys).amin(1), self.stop)
        inside = (place >= self.first.unsqueeze(1)) & (place < self.stop.unsqueeze(1))
        hidden = inside & ~padding
        if padding.device.type != "cpu" or bool(hidden.any()):
            self.hidden = hidden

    def _build(self, queries: int, device: torch.device, skip: bool, by_head: int) -> PaddedPlan:
        samples = self.batch * max(by_head, 1)
        lo, hi = (t if t.shape[1] == queries else t.expand(-1, queries) for t in (self.lo, self.hi))
        if not self.is_padded:
            bounds = Bounds(lo.numpy(), hi.numpy())
            shape = samples, queries, self.keys, device, bool(by_head)
            if lo.shape[0] > 1:
                return plan_bounds(bounds, *shape)
            return by_content(("same for all", *shape, bounds.key()), lambda: plan_bounds(bounds, *shape))
        home = self.first.device
        first, stop = self.first.unsqueeze(1), self.stop.unsqueeze(1)
        lo, hi = (torch.minimum(torch.maximum(t.to(home), first), stop) for t in (lo, hi))
        if skip:
            place = torch.arange(queries, device=home) + self.offset
            before, after = place < first, place >= stop
            lo, hi = (torch.where(before, first, torch.where(after, stop, t)) for t in (lo, hi))
        if home.type != "cpu":
            return plan_device_bounds(lo, hi, samples, self.keys, bool(by_head), self.hidden)
        hidden = None if self.hidden is None else self.hidden.numpy()
        return plan_bounds(Bounds(lo.numpy(), hi.numpy(), hidden), samples, queries, self.keys, device, bool(by_head))


def intervals(function: Callable, queries: Tensor, in_packs: bool = False) -> tuple[Tensor, Tensor, set[str]]:
    """lo and hi of the keys that `function` lets queries [1 or B, Lq] see, and the names of what it is made of.

    in_packs: what comes out is cut to the query's own sequence of several packed in a row.  Raises UnknownMask for a
    function that is not transformers' own, or bounds that are no intervals.
    """
    name, free = _known(function)
    if name in ("and_masks", "or_masks"):
        parts = free["mask_functions"]
        in_packs = in_packs or (name == "and_masks" and any(_known(part)[0] == _OWN_SEQUENCE for part in parts))
        los, his, names = zip(*(intervals(part, queries, in_packs) for part in parts), strict=True)
        most, least = (torch.minimum, torch.maximum) if name == "or_masks" else (torch.maximum, torch.minimum)
        return functools.reduce(most, los), functools.reduce(least, his), set().union(*names)
    if name == "remap_positions_for_packed_sequence":
        if not in_packs:
            raise UnknownMask("positions in a sequence, of keys of all sequences")
        return _by_position(free["mask_function"], free["position_ids"], queries)
    leaf = _LEAVES.get(name)
    if leaf is None:
        raise UnknownMask(name)
    lo, hi = leaf(queries, **{k: v for k, v in free.items() if k in leaf.__code__.co_varnames})
    return lo, hi, {name}


def _known(function: Callable) -> tuple[str, dict]:
    """The name of transformers' function, and what its closure holds."""
    name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    if getattr(function, "__module__", None) != _HOME:
        raise UnknownMask(f"{getattr(function, '__module__', '?')}.{name}")
    names = function.__code__.co_freevars
    return name, dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


def _by_position(function: Callable, position_ids: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, set[str]]:
    """What `function` says of positions, which count one by one within each sequence: right in a query's own."""
    position = position_ids.cpu()[:, queries[0]]
    lo, hi, names = intervals(function, position)
    if names & {"blockwise_overlay", _OWN_SEQUENCE}:
        raise UnknownMask("blocks or packs by position")
    shift = queries - position
    return lo + shift, hi + shift, names


# Each sees an interval that holds the query itself, or nothing ([q, q)): so the union of any two is an interval.


def _causal(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(q), q + 1


def _everything(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(q), torch.full_like(q, _END)


def _window(q: Tensor, sliding_window: int) -> tuple[Tensor, Tensor]:
    _holds_itself(sliding_window > 0)
    return q - sliding_window + 1, torch.full_like(q, _END)


def _window_both_sides(q: Tensor, sliding_window: int) -> tuple[Tensor, Tensor]:
    _holds_itself(sliding_window >= 0)
    return q - sliding_window, q + sliding_window + 1


def _chunks(q: Tensor, chunk_size: int, left_padding: Tensor) -> tuple[Tensor, Tensor]:
    left = left_padding.cpu().long().unsqueeze(1)
    lo = (q - left).div(chunk_size, rounding_mode="floor") * chunk_size + left
    return lo, lo + chunk_size


def _sequences(q: Tensor, packed_sequence_mask: Tensor) -> tuple[Tensor, Tensor]:
    ids = packed_sequence_mask.cpu().long()
    if bool((ids.diff(dim=1) < 0).any()):
        raise UnknownMask("sequences that are not one after another")
    start, stop = _runs(ids)
    return start[:, q[0]], stop[:, q[0]]


def _blocks(q: Tensor, block_sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    ids = block_sequence_ids.cpu().long()
    before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]
    if bool(((ids >= 0) & (ids != before) & (ids <= before.cummax(1).values)).any()):
        raise UnknownMask("blocks in several pieces")
    start, stop = _runs(ids)
    in_block = (ids >= 0)[:, q[0]]
    return torch.where(in_block, start[:, q[0]], q), torch.where(in_block, stop[:, q[0]], q)


def _holds_itself(holds: bool) -> None:
    if not holds:
        raise UnknownMask("a window that leaves its own query out")


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First index and end of the stretch of equal ids that each one is in.  ids [B, L]"""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    opens = torch.ones_like(ids, dtype=torch.bool)
    opens[:, 1:] = ids[:, 1:] != ids[:, :-1]
    closes = torch.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    start = torch.where(opens, index, 0).cummax(1).values
    stop = torch.where(closes, index + 1, ids.shape[1]).flip(1).cummin(1).values.flip(1)
    return start, stop


_LEAVES = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _everything,
    "sliding_window_overlay": _window,
    "sliding_window_bidirectional_overlay": _window_both_sides,
    "chunked_overlay": _chunks,
    _OWN_SEQUENCE: _sequences,
    "blockwise_overlay": _blocks,
}
