"""Host-side planning: layouts and attention tiles here, packs in packs.py, ranks in ranks.py.

C++ (`mmkernels._planner`, csrc/planner) where it is built, else planner_numpy.py; both give equal arrays.
B samples, N segments, T tokens, A position axes, M modalities
"""

from __future__ import annotations

import numpy as np

from mmkernels import planner_numpy
from mmkernels.arguments import one_of
from mmkernels.pack_stream import PackStream
from mmkernels.packs import PackPlan, plan_packs
from mmkernels.planner_backend import BACKEND
from mmkernels.planner_backend import layouts as _backend
from mmkernels.ranks import balance_ranks

__all__ = [
    "BACKEND",
    "PackPlan",
    "PackStream",
    "attention_tiles",
    "balance_ranks",
    "build_layout",
    "layout_sections",
    "plan_packs",
]

layout_sections = planner_numpy.layout_sections


def build_layout(segments, grids, special_ids, num_samples: int, axes: int) -> np.ndarray:
    """All arrays of a packed layout in one int32 buffer, so that they cross to a device in one copy.

    segments [N, 4]: sample, modality, length in tokens (with the special token), first source row; in sample order.
    grids [N, 3]: (0, 0, length), (0, rows, columns) or (time, rows, columns) of a segment without its special token.
    special_ids [M]: id of the token in front of each non-empty segment of a modality, -1 for none.

    Sections, at `layout_sections(num_samples, N, T, axes)`: cu_seqlens [B+1], positions [A, T], segment_ids [T],
    source_rows [T] (-(id + 1) at a special token), segment_cu_seqlens [N+1], modality_ids [T] as bytes.
    Raises ValueError naming the segment that is wrong, or when T passes int32.
    """
    segments = _int32("build_layout", "segments", segments, 4)
    grids = _int32("build_layout", "grids", grids, 3)
    special_ids = _int32("build_layout", "special_ids", special_ids)
    if len(grids) != len(segments):
        raise ValueError(f"build_layout: grids has {len(grids)} rows, expected {len(segments)} as in segments")
    if not 1 <= len(special_ids) <= 256:
        raise ValueError(f"build_layout: special_ids has {len(special_ids)} modalities, expected 1 to 256")
    if num_samples < 0 or axes < 1:
        raise ValueError(f"build_layout: num_samples is {num_samples} and axes {axes}, expected >= 0 and >= 1")
    return _backend.build_layout(segments, grids, special_ids, num_samples, axes)


def attention_tiles(
    cu_rows, cu_cols, lo, hi, row_bits, col_bits, block_rows: int, block_cols: int, *, rows: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tiles of `block_rows` rows of one sample and, for each, the spans of column blocks that some row sees.

    Row i sees column j when lo[i] <= j < hi[i] (both non-decreasing within a sample) and row_bits[i] & col_bits[j].
    rows="query": rows are queries and columns keys; rows="key": the transpose, for backward. Keys carry one bit.
    cu_rows, cu_cols [B + 1]: bounds of the samples; one sample [0, R], [0, C] gives tiles that cross real samples.

    tiles int32 [n, 4]: row_start, row_end, first span, last span (exclusive); samples by their heaviest tile, and the
      tiles of a sample together, the heaviest (most blocks) first.
    spans int32 [m, 3]: col_start, col_end, masked. Blocks count from the sample's start and are clipped at its end.
      masked = 0: every row sees every column and every block is whole. A short tile of keys has masked spans only.
    pairs: block_rows * block_cols * blocks visited.
    Raises ValueError where bounds decrease or a key has not exactly one bit.
    """
    one_of("attention_tiles", "rows", rows, ("query", "key"))
    arrays = {"cu_rows": cu_rows, "cu_cols": cu_cols, "lo": lo, "hi": hi, "row_bits": row_bits, "col_bits": col_bits}
    arrays = {name: _int32("attention_tiles", name, array) for name, array in arrays.items()}
    for name in ("hi", "row_bits"):
        if len(arrays[name]) != len(arrays["lo"]):
            raise ValueError(
                f"attention_tiles: {name} has {len(arrays[name])} tokens, expected {len(arrays['lo'])} as lo"
            )
    if len(arrays["cu_rows"]) == 0 or len(arrays["cu_rows"]) != len(arrays["cu_cols"]):
        raise ValueError(
            f"attention_tiles: cu_rows has {len(arrays['cu_rows'])} and cu_cols {len(arrays['cu_cols'])} bounds, "
            "expected B + 1 both"
        )
    return _backend.attention_tiles(*arrays.values(), block_rows, block_cols, rows == "key")


def _int32(function: str, name: str, value, columns: int | None = None) -> np.ndarray:
    """`value` as a contiguous int32 array of one axis, or of two with `columns` columns; never rounds or wraps."""
    array = np.asarray(value)
    shape_ok = array.ndim == 1 if columns is None else array.ndim == 2 and array.shape[1] == columns
    if not shape_ok:
        expected = "[n]" if columns is None else f"[n, {columns}]"
        raise ValueError(f"{function}: {name} has shape {list(array.shape)}, expected {expected}")
    if array.dtype != np.int32:
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{function}: {name} is {array.dtype}, expected integers")
        if array.size and (array.max() > planner_numpy.INT32_MAX or array.min() < -(2**31)):
            raise ValueError(f"{function}: {name} does not fit int32")
    return np.ascontiguousarray(array, np.int32)
