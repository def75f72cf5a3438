"""Layouts and attention tiles in numpy: what csrc/planner computes, stated plainly, and its stand-in if not built.

Every function returns arrays equal to the C++ ones.   B samples, N segments, T tokens, A position axes, M modalities
"""

import numpy as np

INT32_MAX = 2**31 - 1


def layout_sections(num_samples: int, num_segments: int, total_tokens: int, axes: int) -> tuple[int, ...]:
    """Where each section of a layout buffer starts, and its end, in int32; starts are multiples of 4 (16 bytes)."""
    lengths = (num_samples + 1, axes * total_tokens, total_tokens, total_tokens, num_segments + 1)
    starts = [0]
    for length in lengths:
        starts.append((starts[-1] + length + 3) // 4 * 4)
    return (*starts, starts[-1] + (total_tokens + 3) // 4)


def build_layout(segments, grids, special_ids, num_samples: int, axes: int) -> np.ndarray:
    """One int32 buffer with all arrays of a layout; mmkernels.planner.build_layout documents it."""
    sample, modality, length, first_row = segments.astype(np.int64).T
    time, rows, cols = grids.astype(np.int64).T
    _check_samples(sample, num_samples)
    num_modalities = len(special_ids)
    _reject(
        (modality < 0) | (modality >= num_modalities),
        lambda n: f"segments[{n}] has modality {modality[n]}, expected 0 to {num_modalities - 1}",
    )
    _reject(
        (length < 0) | (first_row < 0),
        lambda n: f"segments[{n}] has length {length[n]} and first row {first_row[n]}, expected no negative number",
    )
    special = special_ids.astype(np.int64)[modality]
    has_special = ((special >= 0) & (length > 0)).astype(np.int64)
    tokens = length - has_special
    _check_grids(time, rows, cols, tokens, axes)
    _reject(first_row + tokens > INT32_MAX, lambda n: f"segments[{n}] passes source row 2**31 - 1")
    total = int(length.sum())
    if total > INT32_MAX:
        raise ValueError(f"build_layout: segments hold {total} tokens, expected at most 2**31 - 1")

    segment_cu_seqlens = np.concatenate([[0], np.cumsum(length)])
    segment_ids = np.repeat(np.arange(len(segments)), length)
    # -1 at a special token, else the token's index among its segment's rows
    token = np.arange(total) - (segment_cu_seqlens[:-1] + has_special)[segment_ids]
    wide, high = np.maximum(cols, 1)[segment_ids], np.maximum(rows, 1)[segment_ids]
    coordinates = (token // (wide * high), token // wide % high, token % wide)
    used = (time > 0, rows > 0, np.ones(len(segments), bool))
    positions = np.zeros((axes, total), np.int64)
    for axis in range(min(axes, 3)):
        on = (token >= 0) & used[2 - axis][segment_ids]
        positions[axes - 1 - axis] = np.where(on, coordinates[2 - axis] + has_special[segment_ids], 0)

    *starts, size = layout_sections(num_samples, len(segments), total, axes)
    buffer = np.zeros(size, np.int32)
    cu_seqlens = np.searchsorted(sample, np.arange(num_samples + 1))  # segments before each sample
    arrays = (
        segment_cu_seqlens[cu_seqlens],
        positions.reshape(-1),
        segment_ids,
        np.where(token < 0, -(special[segment_ids] + 1), first_row[segment_ids] + token),
        segment_cu_seqlens,
    )
    for start, array in zip(starts[:-1], arrays, strict=True):
        buffer[start : start + len(array)] = array
    buffer[starts[-1] :].view(np.uint8)[:total] = modality[segment_ids]
    return buffer


def _reject(wrong: np.ndarray, describe) -> None:
    if wrong.any():
        raise ValueError(f"build_layout: {describe(int(np.argmax(wrong)))}")


def _check_samples(sample: np.ndarray, num_samples: int) -> None:
    out_of_order = np.diff(sample, prepend=0) < 0
    _reject(
        out_of_order | (sample >= num_samples),
        lambda n: f"segments[{n}] has sample {sample[n]}, expected samples in order below {num_samples}",
    )


def _check_grids(time, rows, cols, tokens, axes: int) -> None:
    _reject(
        (time < 0) | (rows < 0) | (cols < 0) | ((time > 0) & (rows == 0)),
        lambda n: (
            f"grids[{n}] is ({time[n]}, {rows[n]}, {cols[n]}), "
            "expected (0, 0, length), (0, rows, columns) or (time, rows, columns)"
        ),
    )
    used = np.where(time > 0, 3, np.where(rows > 0, 2, 1))
    _reject(used > axes, lambda n: f"grids[{n}] uses {used[n]} axes, expected at most {axes}")
    area = np.maximum(rows, 1) * cols
    held = np.where(area > INT32_MAX, area, area * np.maximum(time, 1))  # three int32 factors could pass int64
    _reject(held != tokens, lambda n: f"grids[{n}] holds {held[n]} tokens, expected {tokens[n]} as in segments")


def attention_tiles(cu_rows, cu_cols, lo, hi, row_bits, col_bits, block_rows, block_cols, rows_are_keys: bool):
    """(tiles, spans, pairs) by looking at every pair; mmkernels.planner.attention_tiles documents them."""
    _check_tiles(cu_rows, cu_cols, lo, hi, row_bits, col_bits, block_rows, block_cols, rows_are_keys)
    tiles, spans, weights, samples = [], [], [], []
    bounds = zip(cu_rows[:-1], cu_rows[1:], cu_cols[:-1], cu_cols[1:], strict=True)
    for sample, (rows_begin, rows_end, begin, end) in enumerate(bounds):
        blocks = np.arange(begin, end, block_cols)
        columns = np.arange(begin, end)
        for row in range(rows_begin, rows_end, block_rows):
            row_end = min(row + block_rows, int(rows_end))
            samples.append(sample)
            r = slice(row, row_end)
            if begin == end:
                tiles.append((row, row_end, len(spans), len(spans)))
                weights.append(0)
                continue
            seen = (columns >= lo[r, None]) & (columns < hi[r, None])
            seen &= (row_bits[r, None] & col_bits[None, begin:end]) != 0  # [rows, columns]
            some = np.logical_or.reduceat(seen.any(0), blocks - begin)
            every = np.logical_and.reduceat(seen.all(0), blocks - begin) & (blocks + block_cols <= end)
            if rows_are_keys and row_end - row < block_rows:
                every[:] = False
            first = len(spans)
            for block in np.flatnonzero(some):
                start, stop = int(blocks[block]), min(int(blocks[block]) + block_cols, int(end))
                masked = int(not every[block])
                if len(spans) > first and spans[-1][1] == start and spans[-1][2] == masked:
                    spans[-1][1] = stop
                else:
                    spans.append([start, stop, masked])
            tiles.append((row, row_end, first, len(spans)))
            weights.append(int(some.sum()))
    weight, sample = np.asarray(weights, np.int64), np.asarray(samples, np.int64)
    heaviest = np.zeros(len(cu_rows), np.int64)  # weight of each sample's heaviest tile
    np.maximum.at(heaviest, sample, weight)
    order = np.lexsort((-weight, sample, -heaviest[sample]))
    tiles = np.asarray(tiles, np.int32).reshape(-1, 4)[order]
    return tiles, np.asarray(spans, np.int32).reshape(-1, 3), sum(weights) * block_rows * block_cols


def _check_tiles(cu_rows, cu_cols, lo, hi, row_bits, col_bits, block_rows, block_cols, rows_are_keys) -> None:
    if block_rows < 1 or block_cols < 1:
        raise ValueError(
            f"attention_tiles: block_rows is {block_rows} and block_cols {block_cols}, expected at least 1 each"
        )
    for name, cu, total in (("cu_rows", cu_rows, len(row_bits)), ("cu_cols", cu_cols, len(col_bits))):
        if cu[0] != 0 or cu[-1] != total:
            raise ValueError(f"attention_tiles: {name} runs from {cu[0]} to {cu[-1]}, expected 0 to {total}")
        if (np.diff(cu) < 0).any():
            raise ValueError(f"attention_tiles: {name} decreases at sample {np.argmax(np.diff(cu) < 0)}")
    if (hi < lo).any():
        raise ValueError(f"attention_tiles: hi is below lo at row {np.argmax(hi < lo)}")
    inside = np.ones(len(lo), bool)
    inside[cu_rows[:-1][np.diff(cu_rows) > 0]] = False  # the first row of a sample follows nothing
    decreases = inside & ((np.diff(lo, prepend=lo[:1]) < 0) | (np.diff(hi, prepend=hi[:1]) < 0))
    if decreases.any():
        raise ValueError(f"attention_tiles: lo or hi decreases at row {np.argmax(decreases)}")
    bits = (row_bits if rows_are_keys else col_bits).view(np.uint32)
    wrong = (bits == 0) | ((bits & (bits - np.uint32(1))) != 0)
    if wrong.any():
        name = "row_bits" if rows_are_keys else "col_bits"
        raise ValueError(f"attention_tiles: {name} of key {np.argmax(wrong)} does not have exactly one bit")
