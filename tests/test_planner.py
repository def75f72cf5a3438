"""Planner: the C++ and numpy bodies give equal arrays, and both are right.   B samples, N segments, T tokens"""

import itertools

import numpy as np
import pytest

from mmkernels import planner, planner_backend, planner_numpy, testing

BACKENDS = [pytest.param(planner_numpy, id="numpy")]
if planner.BACKEND == "cpp":
    BACKENDS.append(pytest.param(planner_backend.layouts, id="cpp"))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(planner, "_backend", request.param)
    return request.param


def random_layout_input(seed: int):
    """(segments, grids, special_ids, num_samples, axes): plain and grid segments, empty ones, missing modalities."""
    rng = np.random.default_rng(seed)
    num_samples, num_modalities, axes = rng.integers(0, 5), rng.integers(1, 5), rng.integers(1, 5)
    special_ids = rng.integers(-2, 9, num_modalities)
    next_row = np.zeros(num_modalities, int)
    segments, grids = [], []
    for sample in range(num_samples):
        for _ in range(rng.integers(0, 4)):
            modality, used = rng.integers(num_modalities), rng.integers(1, min(axes, 3) + 1)
            shape = rng.integers(1, 5, used) if rng.random() < 0.8 else np.zeros(used, int)
            if used > 1 and not shape.all():
                shape = np.array([0])
            tokens = int(np.prod(shape))
            special = special_ids[modality] >= 0 and (tokens > 0 or rng.random() < 0.5)
            segments.append((sample, modality, tokens + special, next_row[modality]))
            grids.append((0,) * (3 - len(shape)) + tuple(shape))
            next_row[modality] += tokens
    return (
        np.array(segments, np.int32).reshape(-1, 4),
        np.array(grids, np.int32).reshape(-1, 3),
        special_ids.astype(np.int32),
        int(num_samples),
        int(axes),
    )


def split_layout(buffer, num_samples, num_segments, axes, total):
    starts = planner.layout_sections(num_samples, num_segments, total, axes)
    lengths = (num_samples + 1, axes * total, total, total, num_segments + 1)
    parts = [buffer[start : start + n] for start, n in zip(starts, lengths, strict=False)]
    return (*parts[:1], parts[1].reshape(axes, total), *parts[2:], buffer[starts[5] :].view(np.uint8)[:total])


def layout_by_loops(segments, grids, special_ids, num_samples, axes):
    """The definition, token by token."""
    lengths = [int(segments[segments[:, 0] == b, 2].sum()) for b in range(num_samples)]
    positions, segment_ids, source_rows, modalities = [], [], [], []
    for n, (_, modality, length, first) in enumerate(segments.tolist()):
        special = special_ids[modality] >= 0 and length > 0
        if special:
            positions.append([0] * axes)
            source_rows.append(-(int(special_ids[modality]) + 1))
        used = [size for size in grids[n].tolist() if size > 0] or [0]
        for i, index in enumerate(np.ndindex(*used)):
            positions.append([0] * (axes - len(used)) + [k + special for k in index])
            source_rows.append(first + i)
        segment_ids += [n] * length
        modalities += [modality] * length
    bounds = np.concatenate([[0], np.cumsum(segments[:, 2])])
    return (
        np.cumsum([0, *lengths]),
        np.array(positions).reshape(-1, axes).T,
        segment_ids,
        source_rows,
        bounds,
        modalities,
    )


@pytest.mark.parametrize("seed", range(40))
def test_build_layout_is_the_definition(backend, seed):
    segments, grids, special_ids, num_samples, axes = random_layout_input(seed)
    buffer = planner.build_layout(segments, grids, special_ids, num_samples, axes)
    total = int(segments[:, 2].sum())
    assert buffer.dtype == np.int32
    assert len(buffer) == planner.layout_sections(num_samples, len(segments), total, axes)[-1]
    expected = layout_by_loops(segments, grids, special_ids, num_samples, axes)
    for ours, theirs in zip(split_layout(buffer, num_samples, len(segments), axes, total), expected, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs, ours.dtype).reshape(ours.shape))


@pytest.mark.parametrize("seed", range(40))
def test_build_layout_backends_are_equal(seed):
    """Byte for byte, padding included: the buffer is copied and hashed whole."""
    arguments = random_layout_input(seed + 1000)
    buffers = [backend.values[0].build_layout(*arguments) for backend in BACKENDS]
    for buffer in buffers[1:]:
        np.testing.assert_array_equal(buffer, buffers[0])


BIG = 2**31 - 1


@pytest.mark.parametrize(
    ("segments", "grids", "message"),
    [
        ([[0, 0, 3, 0]], [[0, 0, 2]], r"grids\[0\] holds 2 tokens, expected 3"),
        ([[0, 1, 3, 0]], [[0, 0, 3]], r"segments\[0\] has modality 1, expected 0 to 0"),
        ([[0, 0, -1, 0]], [[0, 0, 0]], r"segments\[0\] has length -1"),
        ([[1, 0, 1, 0], [0, 0, 1, 0]], [[0, 0, 1]] * 2, r"segments\[1\] has sample 0, expected samples in order"),
        ([[2, 0, 1, 0]], [[0, 0, 1]], r"segments\[0\] has sample 2, expected samples in order below 2"),
        ([[0, 0, 4, 0]], [[0, 2, 2]], r"grids\[0\] uses 2 axes, expected at most 1"),
        ([[0, 0, 4, 0]], [[4, 0, 1]], r"grids\[0\] is \(4, 0, 1\)"),
        ([[0, 0, BIG, 1]], [[0, 0, BIG]], r"segments\[0\] passes source row 2\*\*31 - 1"),
        ([[0, 0, BIG, 0], [0, 0, 1, 0]], [[0, 0, BIG], [0, 0, 1]], r"segments hold 2147483648 tokens"),
        ([[0, 0, 4, 0]], [], r"grids has 0 rows, expected 1"),
        ([[0, 0, 4]], [[0, 0, 4]], r"segments has shape \[1, 3\], expected \[n, 4\]"),
        ([[0, 0, 2.5, 0]], [[0, 0, 2]], r"segments is float64, expected integers"),
        ([[0, 0, 2**32, 0]], [[0, 0, 2]], r"segments does not fit int32"),
    ],
)
def test_build_layout_names_what_is_wrong(backend, segments, grids, message):
    with pytest.raises(ValueError, match=message):
        planner.build_layout(segments, np.array(grids).reshape(-1, 3), [-1], 2, 1)


def test_a_grid_whose_product_passes_int64_is_named(backend):
    """2**64 tokens would wrap to the 0 that the segment has."""
    with pytest.raises(ValueError, match=rf"grids\[0\] holds {2**42} tokens, expected 0"):
        planner.build_layout([[0, 0, 0, 0]], [[2**22, 2**20, 2**22]], [-1], 1, 3)


def random_mask(seed: int):
    """(cu_rows, cu_cols, lo, hi, row_bits, col_bits): non-decreasing bounds, any visibility; odd seeds: two sides."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, rng.integers(0, 5))
    key_lengths = lengths if seed % 2 == 0 else rng.integers(0, 40, len(lengths))  # odd: cross-attention
    cu, cu_keys = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (lengths, key_lengths))
    total, style = int(cu[-1]), rng.integers(4)
    lo, hi = np.zeros(total, np.int32), np.zeros(total, np.int32)
    for begin, end, first, last in zip(cu[:-1], cu[1:], cu_keys[:-1], cu_keys[1:], strict=True):
        rows = np.arange(begin, end)
        own = first + rows - begin
        if style == 0:  # everything
            lo[rows], hi[rows] = first, last
        elif style == 1:  # causal
            lo[rows], hi[rows] = first, np.minimum(own + 1, last)
        elif style == 2:  # window
            lo[rows], hi[rows] = np.clip(own - 5, first, last), np.clip(own + 4, first, last)
        else:  # whatever is monotone, rows that see nothing too
            lo[rows] = np.sort(rng.integers(first, last + 1, len(rows)))
            hi[rows] = np.maximum(np.sort(rng.integers(first, last + 1, len(rows))), lo[rows])
    visible = rng.random((4, 4)) < rng.choice([0.3, 0.7, 1.0])
    bit_of = np.array([0, 5, 30, 31])  # 31: the sign bit of int32 is a bit like the others

    def modalities(count):
        return np.repeat(rng.integers(0, 4, count), rng.integers(1, 12, count))[:count]

    row_bits = (visible * (np.uint64(1) << bit_of.astype(np.uint64))).sum(1).astype(np.uint32)[modalities(total)]
    col_bits = (np.uint32(1) << bit_of.astype(np.uint32))[modalities(int(cu_keys[-1]))]
    return cu, cu_keys, lo, hi, row_bits.view(np.int32), col_bits.view(np.int32)


def transpose_mask(cu, cu_keys, lo, hi, row_bits, col_bits):
    """The same mask from the keys' side: key j is seen by queries [lo, hi)."""
    q_lo, q_hi = np.zeros_like(col_bits), np.zeros_like(col_bits)
    for begin, end, first, last in zip(cu[:-1], cu[1:], cu_keys[:-1], cu_keys[1:], strict=True):
        for j in range(first, last):
            q_lo[j] = begin + np.searchsorted(hi[begin:end], j, side="right")
            q_hi[j] = max(q_lo[j], begin + np.searchsorted(lo[begin:end], j, side="right"))
    return cu_keys, cu, q_lo, q_hi, col_bits, row_bits


BLOCKS = [(16, 16), (1, 1), (8, 32), (32, 8), (64, 64)]  # square, degenerate, wide, tall, larger than a sample


@pytest.mark.parametrize("rows", ["query", "key"])
@pytest.mark.parametrize("seed", range(60))
def test_attention_tiles_backends_are_equal(seed, rows):
    mask = random_mask(seed) if rows == "query" else transpose_mask(*random_mask(seed))
    for block_rows, block_cols in BLOCKS:
        results = [
            backend.values[0].attention_tiles(*mask, block_rows, block_cols, rows == "key") for backend in BACKENDS
        ]
        for tiles, spans, pairs in results[1:]:
            np.testing.assert_array_equal(tiles, results[0][0])
            np.testing.assert_array_equal(spans, results[0][1])
            assert pairs == results[0][2]


@pytest.mark.parametrize("rows", ["query", "key"])
@pytest.mark.parametrize("seed", range(20))
def test_attention_tiles_say_what_is_seen(backend, seed, rows):
    """Against the dense mask: each row in one tile, no seen pair outside spans, no unseen pair in an unmasked span."""
    mask = random_mask(seed) if rows == "query" else transpose_mask(*random_mask(seed))
    cu, cu_cols, lo, hi, row_bits, col_bits = mask
    total = int(cu_cols[-1])
    columns = np.arange(total)
    seen = (columns >= lo[:, None]) & (columns < hi[:, None]) & ((row_bits[:, None] & col_bits) != 0)
    tiles, spans, pairs = planner.attention_tiles(*mask, 16, 8, rows=rows)
    covered, unmasked, count = np.zeros(seen.shape, bool), np.zeros(seen.shape, bool), 0
    for row, row_end, first, last in tiles.tolist():
        sample = np.searchsorted(cu, row, side="right") - 1
        start, stop = int(cu_cols[sample]), int(cu_cols[sample + 1])
        assert row < row_end <= min(row + 16, cu[sample + 1])
        assert (row - cu[sample]) % 16 == 0
        previous = None
        for col, col_end, masked in spans[first:last].tolist():
            assert (col - start) % 8 == 0
            assert (col_end - start) % 8 == 0 or col_end == stop
            assert masked or (col_end - col) % 8 == 0
            assert masked or rows == "query" or row_end - row == 16
            assert previous is None or previous[0] < col or (previous[0] == col and previous[1] != masked)  # merged
            previous = (col_end, masked)
            covered[row:row_end, col:col_end] = True
            unmasked[row:row_end, col:col_end] = not masked
            count += -(-(col_end - col) // 8) * 8 * 16
            for block in range(col, col_end, 8):
                assert seen[row:row_end, block : min(block + 8, col_end)].any()
    assert not (seen & ~covered).any()
    assert not (unmasked & ~seen).any()
    assert pairs == count
    assert np.array_equal(
        np.sort(tiles[:, 0]), np.concatenate([np.arange(a, b, 16) for a, b in itertools.pairwise(cu)] or [[]])
    )
    weights = [sum(-(-(e - s) // 8) for s, e, _ in spans[f:g].tolist()) for _, _, f, g in tiles.tolist()]
    testing.assert_tile_order(np.searchsorted(cu, tiles[:, 0], side="right").tolist(), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lo": [0, 1, 0]}, "lo or hi decreases at row 2"),
        ({"hi": [3, 3, 2]}, "lo or hi decreases at row 2"),
        ({"hi": [3, 3, 3], "lo": [0, 0, 4]}, "hi is below lo at row 2"),
        ({"col_bits": [1, 3, 1]}, "col_bits of key 1 does not have exactly one bit"),
        ({"col_bits": [1, 0, 1]}, "col_bits of key 1 does not have exactly one bit"),
        ({"cu_rows": [0, 2]}, "cu_rows runs from 0 to 2, expected 0 to 3"),
        ({"cu_cols": [0, 2]}, "cu_cols runs from 0 to 2, expected 0 to 3"),
        ({"cu_rows": [0, 2, 1, 3], "cu_cols": [0, 1, 2, 3]}, "cu_rows decreases at sample 1"),
        ({"cu_cols": [0, 1, 3]}, "cu_rows has 2 and cu_cols 3 bounds"),
        ({"lo": [0, 0]}, "hi has 3 tokens, expected 2"),
        ({"block_rows": 0}, "block_rows is 0 and block_cols 2, expected at least 1 each"),
        ({"rows": "column"}, "rows is 'column', expected one of query, key"),
    ],
)
def test_attention_tiles_name_what_is_wrong(backend, change, message):
    arguments = dict(cu_rows=[0, 3], cu_cols=[0, 3], lo=[0] * 3, hi=[3] * 3, row_bits=[1] * 3, col_bits=[1] * 3)
    arguments |= dict(block_rows=2, block_cols=2, rows="query")
    with pytest.raises(ValueError, match=message):
        planner.attention_tiles(**(arguments | change))
