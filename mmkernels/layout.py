"""PackedLayout: who sits where in a packed batch.

B samples, N segments, T packed tokens, A position axes, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import arguments, devices, layout_tables, planner, tracing

_BUILT_OUTSIDE = "PackedLayout: a layout is built on the host, outside of a graph"

Length = int | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where every token of a packed batch comes from and belongs to.  Immutable; compared by identity.

    Samples stand one after another, and so do the segments (modality, length) of a sample.  The rows of modality m
    over all samples are its *stream* [N_m, E_m].

    cu_seqlens      int32 [B + 1]  sample bounds in the packed sequence
    modality_ids    uint8 [T]      modality of each token
    positions       int32 [A, T]   index within the segment.  A plain segment counts on the last axis; a grid (rows,
                                   cols) or (time, rows, cols) on the last two or three
    segment_ids     int32 [T]      segment of each token
    source_rows     int32 [T]      row in the token's stream; negative: special token, id -(row + 1) of the token table
    segments        host int32 [N, 4], read-only: sample, modality, length, first source row; None if only device bounds
                                   are known
    total_tokens, max_seqlen, num_modalities   Python ints: nothing is ever read back from the device
    special_tokens  per modality: the token id that opens each of its segments, or None.  It counts in the segment's
                    length, sits at position 0, and shifts the others by one on the axes that the segment uses

    Build one with `from_counts`, `from_segments` or `from_cu_seqlens`:

        PackedLayout.from_counts([[5, 12], [3, 0]])  # two samples of text and image tokens; the second has no image
        PackedLayout.from_segments([[(1, (3, 4)), (0, 5)]], num_modalities=2)  # an image of 3 x 4 cells, then text
    """

    cu_seqlens: Tensor
    modality_ids: Tensor
    positions: Tensor
    segment_ids: Tensor
    source_rows: Tensor
    segments: np.ndarray | None
    total_tokens: int
    max_seqlen: int
    num_modalities: int
    special_tokens: tuple[int | None, ...] | None = None
    segment_cu_seqlens: Tensor | None = None
    _buffer: Tensor | None = field(default=None, repr=False)
    _segments: np.ndarray | None = field(default=None, repr=False)  # what the buffer was built from
    _host: PackedLayout | None = field(default=None, repr=False)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # lowered masks and their tiles
    # What operators keep to recognise a call by: apart from `cache`, on whose keys torch.compile guards.
    calls: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # With a field put in by dataclasses.replace it would be two layouts: `segments`, `host` and what `to` and
        # pickle carry are still of the one that was built.
        if self._buffer is not None and not torch.compiler.is_compiling():
            replaced = None if self.segments is self._segments else "segments"
            for name in _TENSORS:
                if not _is_part(getattr(self, name), self._buffer):
                    replaced = name
            if replaced is not None:
                raise ValueError(
                    f"PackedLayout: {replaced} was replaced, expected what the layout was built with; build another by "
                    "from_counts, from_segments or from_cu_seqlens"
                )
            if self.total_tokens != self.modality_ids.shape[0]:
                raise ValueError(
                    f"PackedLayout: total_tokens is {self.total_tokens!r}, expected {self.modality_ids.shape[0]} as "
                    "modality_ids has"
                )

    @classmethod
    @tracing.host_code(_BUILT_OUTSIDE)
    def from_counts(cls, counts, *, special_tokens: Sequence[int | None] | None = None) -> PackedLayout:
        """One segment per present modality, in modality order.  counts [B, M], M 1 to 32: rows of each modality per
        sample.

        A count does not include the special token, which is added to segments of at least one row.  Raises ValueError
        for counts that are no integers >= 0 of that shape, and for too many tokens for int32.
        """
        counts = arguments.host_array("from_counts", "counts", counts)
        if counts.ndim != 2:
            raise ValueError(f"from_counts: counts has shape {tuple(counts.shape)}, expected [B, M]")
        num_modalities = counts.shape[1]
        layout_tables.check_modalities("from_counts", num_modalities)
        special = layout_tables.special_ids("from_counts", special_tokens, num_modalities)
        segments, grids = layout_tables.count_tables(counts, special)
        return cls._build(segments, grids, special, len(counts), num_modalities, 1)

    @classmethod
    @tracing.host_code(_BUILT_OUTSIDE)
    def from_segments(
        cls,
        samples: Sequence[Sequence[tuple[int, Length]]],
        *,
        num_modalities: int,
        special_tokens: Sequence[int | None] | None = None,
    ) -> PackedLayout:
        """Any order of segments.  samples: per sample a list of (modality, length); a length may be a grid
        (rows, cols) or (time, rows, cols).  Lengths do not include the special token.  num_modalities is 1 to 32.

        Raises ValueError for a modality outside [0, num_modalities), a negative length, or too many tokens for int32.
        """
        layout_tables.check_modalities("from_segments", num_modalities)
        special = layout_tables.special_ids("from_segments", special_tokens, num_modalities)
        samples = arguments.as_list("from_segments", "samples", samples, "per sample a list of (modality, length)")
        segments, grids, axes = layout_tables.segment_tables(samples, num_modalities, special)
        return cls._build(segments, grids, special, len(samples), num_modalities, axes)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        *,
        total_tokens: int,
        max_seqlen: int,
        modality_ids: Tensor | None = None,
        num_modalities: int = 1,
    ) -> PackedLayout:
        """For callers who have only bounds, perhaps on the device.  cu_seqlens int32 [B + 1].

        Bounds on the CPU give a complete layout, in which a stretch of one modality in one sample is a segment.
        Bounds on a GPU are never copied back: masks are lowered on the device, for token tiles.

        total_tokens, max_seqlen   T and the longest sample, or any bound above it
        modality_ids               uint8 [T]; None: all of modality 0

        Raises ValueError for arguments of another kind, dtype, shape or device, and on the CPU for bounds that do not
        run from 0 to T, a sample longer than max_seqlen, or a modality that num_modalities leaves out.  There both are
        read: a fake tensor is refused.
        """
        if not isinstance(cu_seqlens, Tensor):
            raise ValueError(f"from_cu_seqlens: cu_seqlens is {type(cu_seqlens).__name__}, expected an int32 tensor")
        tracing.refuse_unstrided("from_cu_seqlens", "cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
            raise ValueError(
                f"from_cu_seqlens: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 [B + 1]"
            )
        layout_tables.check_modalities("from_cu_seqlens", num_modalities)
        for name, value in (("total_tokens", total_tokens), ("max_seqlen", max_seqlen)):
            if not arguments.is_number(value, arguments.WHOLE) or value < 0:
                raise ValueError(f"from_cu_seqlens: {name} is {value!r}, expected a whole number >= 0")
        if total_tokens >= 2**31:
            raise ValueError(
                f"from_cu_seqlens: total_tokens is {total_tokens}, expected at most 2**31 - 1, as int32 holds"
            )
        if not isinstance(modality_ids, Tensor | None):
            raise ValueError(f"from_cu_seqlens: modality_ids is {type(modality_ids).__name__}, expected a uint8 tensor")
        device = cu_seqlens.device
        if modality_ids is not None:
            tracing.refuse_unstrided("from_cu_seqlens", "modality_ids", modality_ids)
            if modality_ids.dtype != torch.uint8 or tuple(modality_ids.shape) != (total_tokens,):
                raise ValueError(
                    f"from_cu_seqlens: modality_ids is {modality_ids.dtype} {tuple(modality_ids.shape)}, "
                    f"expected uint8 [{total_tokens}]"
                )
            if modality_ids.device != device:
                raise ValueError(f"from_cu_seqlens: modality_ids is on {modality_ids.device}, cu_seqlens on {device}")
        if device.type == "cpu":
            return cls._from_host_bounds(cu_seqlens, total_tokens, max_seqlen, modality_ids, num_modalities)
        if modality_ids is None:
            modality_ids = torch.zeros(total_tokens, dtype=torch.uint8, device=device)
        return cls._from_device_bounds(cu_seqlens, total_tokens, max_seqlen, modality_ids, num_modalities)

    @classmethod
    @tracing.host_code(_BUILT_OUTSIDE)
    def _from_host_bounds(cls, cu_seqlens, total_tokens, max_seqlen, modality_ids, num_modalities) -> PackedLayout:
        bounds = arguments.numbers("from_cu_seqlens", "cu_seqlens", cu_seqlens)
        layout_tables.check_bounds("from_cu_seqlens", "cu_seqlens", bounds, total_tokens, max_seqlen)
        if modality_ids is None:
            modality_ids = np.zeros(total_tokens, np.uint8)
        else:
            modality_ids = arguments.numbers("from_cu_seqlens", "modality_ids", modality_ids)
        highest = int(modality_ids.max(initial=0))
        if highest >= num_modalities:
            raise ValueError(
                f"from_cu_seqlens: modality_ids has {highest}, expected 0 to {num_modalities - 1}: num_modalities "
                f"is {num_modalities}"
            )
        special = layout_tables.special_ids("from_cu_seqlens", None, num_modalities)
        segments, grids = layout_tables.run_tables(bounds, modality_ids, num_modalities)
        return cls._build(segments, grids, special, len(bounds) - 1, num_modalities, 1)

    @classmethod
    def _from_device_bounds(cls, cu_seqlens, total_tokens, max_seqlen, modality_ids, num_modalities) -> PackedLayout:
        """Bounds that must not be read.  Its own function so that tests reach it without a GPU."""
        token = torch.arange(total_tokens, dtype=torch.int32, device=cu_seqlens.device)
        sample = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
        if num_modalities == 1:
            segment_ids, starts = sample, cu_seqlens[sample.long()]
        else:
            opens = torch.ones_like(token, dtype=torch.bool)
            opens[1:] = (modality_ids[1:] != modality_ids[:-1]) | (sample[1:] != sample[:-1])
            segment_ids = opens.cumsum(0, dtype=torch.int32) - 1
            starts = torch.where(opens, token, 0).cummax(0).values if total_tokens else token
        return cls(
            cu_seqlens=cu_seqlens,
            modality_ids=modality_ids,
            positions=(token - starts).unsqueeze(0),
            segment_ids=segment_ids,
            source_rows=token,
            segments=None,
            total_tokens=int(total_tokens),
            max_seqlen=int(max_seqlen),
            num_modalities=num_modalities,
            # How many segments several modalities make is on the device alone.
            segment_cu_seqlens=cu_seqlens if num_modalities == 1 else None,
        )

    @property
    def num_samples(self) -> int:
        """B."""
        return self.cu_seqlens.numel() - 1

    @property
    def num_segments(self) -> int:
        """N.  Raises ValueError where bounds on a GPU do not tell it."""
        if self.segment_cu_seqlens is None:
            raise ValueError("num_segments: a layout from device-side bounds of several modalities does not know it")
        return self.segment_cu_seqlens.numel() - 1

    @property
    def axes(self) -> int:
        """A, the position axes: 1 for plain segments, 2 with grids (rows, cols), 3 with (time, rows, cols)."""
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def host(self) -> PackedLayout | None:
        """The same layout on the CPU, or None when only device-side bounds are known.  Never syncs."""
        if self.segments is None:
            return None
        return self if self.device.type == "cpu" else self._host

    @property
    def stream_lengths(self) -> tuple[int, ...]:
        """Rows that each of the M streams must have."""
        cached = self.cache.get("stream_lengths")  # first: a graph that looks at a read-only array makes torch warn
        return _counted_streams(self) if cached is None else cached

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        """The layout on `device`: one buffer, one copy.  Itself when it is there already."""
        if isinstance(device, torch.dtype):
            raise ValueError(f"PackedLayout.to: device is {device}, expected a device: a layout holds integers alone")
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        if device.type == "cpu" and self._host is not None:
            return self._host
        with torch.inference_mode(False):  # as in _build
            moved = self._moved(device, non_blocking)
        return PackedLayout(
            **moved,
            segments=self.segments,
            _segments=self._segments,
            total_tokens=self.total_tokens,
            max_seqlen=self.max_seqlen,
            num_modalities=self.num_modalities,
            special_tokens=self.special_tokens,
            _host=self.host,
        )

    def _moved(self, device: torch.device, non_blocking: bool) -> dict[str, Any]:
        if self._buffer is None:
            tensors = {name: getattr(self, name) for name in _TENSORS}
            return {k: None if t is None else t.to(device, non_blocking=non_blocking) for k, t in tensors.items()}
        ready = devices.ready("PackedLayout: the tables of a layout", self._buffer, device)
        buffer = ready.to(device, non_blocking=non_blocking)
        views = _views(buffer, self.num_samples, self.num_segments, self.total_tokens, self.axes)
        return {**views, "_buffer": buffer}

    def pin_memory(self) -> PackedLayout:
        """For DataLoader(pin_memory=True): the layout in pinned memory, from which `to` needs no copy in between."""
        if self._buffer is None or self.device.type != "cpu" or self._buffer.is_pinned():
            return self
        with torch.inference_mode(False):  # as in _build
            buffer = self._buffer.pin_memory()
            views = _views(buffer, self.num_samples, self.num_segments, self.total_tokens, self.axes)
        return replace(self, **views, _buffer=buffer, _host=None, cache={}, calls={})

    def without_caches(self) -> PackedLayout:
        """The same layout, which holds nothing that was kept on this one."""
        bare = object.__new__(type(self))
        bare.__dict__.update(self.__dict__, cache={}, calls={})
        return bare

    def __repr__(self) -> str:
        segments = "unknown" if self.segment_cu_seqlens is None else self.num_segments
        return (
            f"PackedLayout({self.num_samples} samples, {segments} segments, {self.total_tokens} tokens, "
            f"longest {self.max_seqlen}, {self.num_modalities} modalities, {self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A layout crosses from data workers: send the one buffer, not its views, and no cache.
        state = dict(self.__dict__)
        state["cache"], state["calls"] = {}, {}
        if self._buffer is not None:
            for name in _TENSORS:
                state.pop(name)
            state["_shape"] = (self.num_samples, self.num_segments, self.total_tokens, self.axes)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        shape = state.pop("_shape", None)
        if shape is not None:
            state.update(_views(state["_buffer"], *shape))
            state["segments"].flags.writeable = False
        self.__dict__.update(state)

    @classmethod
    def _build(cls, segments, grids, special, num_samples, num_modalities, axes) -> PackedLayout:
        array = planner.build_layout(segments, grids, special, num_samples, axes)
        total = int(segments[:, 2].sum(dtype=np.int64))
        # Made while evaluating, it may be trained on later; under torch.func a new tensor has no data for numpy.
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            buffer = torch.from_numpy(array)
            views = _views(buffer, num_samples, len(segments), total, axes)
            lengths = np.diff(views["cu_seqlens"].numpy())
        segments.flags.writeable = False
        return cls(
            **views,
            segments=segments,
            total_tokens=total,
            max_seqlen=int(lengths.max(initial=0)),
            num_modalities=num_modalities,
            special_tokens=tuple(None if s < 0 else s for s in special.tolist()) if (special >= 0).any() else None,
            _buffer=buffer,
            _segments=segments,
        )


@tracing.host_code("PackedLayout.stream_lengths: in one graph it must have been read before, outside")
def _counted_streams(layout: PackedLayout) -> tuple[int, ...]:
    if layout.segments is None:
        raise ValueError("stream_lengths: a layout from cu_seqlens does not know its streams")
    has_special = np.array([s is not None for s in layout.special_tokens or [None] * layout.num_modalities])
    modality, length = layout.segments[:, 1], layout.segments[:, 2].astype(np.int64)
    rows = np.bincount(modality, weights=length - has_special[modality], minlength=layout.num_modalities)
    counted = layout.cache["stream_lengths"] = tuple(int(n) for n in rows)
    return counted


def _is_part(tensor, buffer: Tensor) -> bool:
    if getattr(tensor, "_base", None) is buffer:
        return True  # at once; what is made under inference mode knows no base
    if not isinstance(tensor, Tensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True  # moved inside torch.func.grad, say: there is no storage to look at
    return tensor.untyped_storage()._cdata == buffer.untyped_storage()._cdata


_TENSORS = ("cu_seqlens", "positions", "segment_ids", "source_rows", "segment_cu_seqlens", "modality_ids")


def _views(buffer: Tensor, num_samples: int, num_segments: int, total: int, axes: int) -> dict[str, Tensor]:
    """The fields of a layout as views of its one int32 buffer."""
    sizes = (num_samples + 1, axes * total, total, total, num_segments + 1, -(-total // 4))
    starts = planner.layout_sections(num_samples, num_segments, total, axes)[:-1]
    views = {name: buffer[start : start + n] for name, start, n in zip(_TENSORS, starts, sizes, strict=True)}
    views["positions"] = views["positions"].view(axes, total)
    views["modality_ids"] = views["modality_ids"].view(torch.uint8)[:total]
    return views
