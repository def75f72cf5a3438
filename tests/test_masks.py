"""Masks lowered to intervals, bits and tiles, against the pair-by-pair definition."""

import numpy as np
import pytest
import torch

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.testing import random_layout, reference_mask


def random_mask(rng, layout):
    """Any combination of the mask's parts that intervals can hold."""
    M = layout.num_modalities
    causal = bool(rng.integers(2))
    window = tuple(int(w) for w in rng.choice([-1, 0, 1, 3, 9], 2))
    scope = "all" if rng.integers(2) else "causal"
    prefix = None
    if causal and rng.integers(2) and not (scope == "causal" and window[0] >= 0):
        prefix = tuple(int(n) for n in rng.integers(0, 12, layout.num_samples))
    bidirectional = tuple(np.flatnonzero(rng.integers(0, 2, M))) if causal and rng.integers(2) else ()
    visible = rng.integers(0, 2, (M, M)).astype(bool) if rng.integers(2) else None
    return AttentionMask(causal, window, scope, prefix, bidirectional, visible)


def seen_by_plan(plan):
    token = torch.arange(plan.layout.total_tokens, dtype=torch.int32)
    inside = (token >= plan.kv_lo[:, None]) & (token < plan.kv_hi[:, None])
    by_key = (token[:, None] >= plan.q_lo) & (token[:, None] < plan.q_hi)
    assert torch.equal(inside, by_key)  # forward's and backward's bounds describe one set
    return inside & ((plan.q_bits[:, None] & plan.k_bits) != 0)


@pytest.mark.parametrize("seed", range(300))
def test_plan_equals_definition(seed):
    layout = random_layout(seed, max_length=9)
    mask = random_mask(np.random.default_rng(seed), layout)
    plan = MaskPlan.lower(layout, mask)
    expected = reference_mask(layout, mask)
    assert torch.equal(seen_by_plan(plan), expected), mask
    assert plan.visible_pairs == int(expected.sum())
    for lo, hi in ((plan.kv_lo, plan.kv_hi), (plan.q_lo, plan.q_hi)):
        assert (lo.diff() >= 0).all()
        assert (hi.diff() >= 0).all()
        assert (lo <= hi).all()


@pytest.mark.parametrize("rows", ["query", "key"])
@pytest.mark.parametrize("seed", range(60))
def test_tiles_visit_exactly_the_blocks_that_matter(seed, rows):
    layout = random_layout(seed, max_length=30)
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, layout)
    block_rows, block_cols = (int(n) for n in rng.choice([4, 8, 16], 2))
    seen = reference_mask(layout, mask)
    seen = seen if rows == "query" else seen.T
    schedule = MaskPlan.lower(layout, mask).tiles(rows, block_rows, block_cols)
    starts, stops = layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist()
    covered = torch.zeros(layout.total_tokens, dtype=torch.int32)
    work = []
    for row_start, row_end, first, last in schedule.tiles.tolist():
        sample = int(np.searchsorted(layout.cu_seqlens.numpy(), row_start, side="right")) - 1
        assert starts[sample] <= row_start < row_end <= stops[sample]
        assert row_end - row_start <= block_rows
        covered[row_start:row_end] += 1
        classes = {}
        previous = starts[sample]
        for col_start, col_end, masked in schedule.spans[first:last].tolist():
            assert previous <= col_start < col_end <= stops[sample]
            assert (col_start - starts[sample]) % block_cols == 0
            previous = col_end
            for block in range(col_start, col_end, block_cols):
                classes[block] = masked
        work.append(len(classes))
        for block in range(starts[sample], stops[sample], block_cols):
            part = seen[row_start:row_end, block : min(block + block_cols, stops[sample])]
            if block not in classes:
                assert not part.any()  # nothing is lost
            elif not classes[block]:
                assert part.all()  # an unmasked block is seen whole by every row
                assert block + block_cols <= stops[sample]
                assert rows == "query" or row_end - row_start == block_rows
    assert (covered == 1).all()
    assert work == sorted(work, reverse=True)  # heaviest first
    assert schedule.pairs == sum(work) * block_rows * block_cols


def test_interior_tiles_are_unmasked_and_empty_ones_skipped():
    """The point of the classes: 64 text tokens that cannot see 64 image tokens cost two squares, all unmasked."""
    layout = PackedLayout.from_segments([[(0, 64), (1, 64)]], num_modalities=2)
    schedule = MaskPlan.lower(layout, AttentionMask.isolated(2)).tiles("query", 16, 16)
    assert schedule.pairs == 2 * 64 * 64
    assert not schedule.spans[:, 2].any()
    causal = MaskPlan.lower(layout, AttentionMask(causal=True)).tiles("query", 16, 16)
    assert int(causal.spans[:, 2].sum()) == 8  # one masked span per tile, on the diagonal
    assert causal.pairs == 16 * 16 * (8 * 9 // 2)


def test_lowering_is_cached_on_the_layout():
    layout = random_layout(1)
    plan = MaskPlan.lower(layout, AttentionMask(causal=True))
    assert MaskPlan.lower(layout, AttentionMask(causal=True)) is plan
    assert MaskPlan.lower(layout, None) is not plan
    assert plan.tiles("query", 16, 16) is plan.tiles("query", 16, 16)


def test_masks_compare_by_value_whatever_they_were_built_from():
    eye = AttentionMask(visible=torch.eye(2, dtype=torch.bool))
    assert eye == AttentionMask(visible=np.eye(2, dtype=bool)) == AttentionMask.isolated(2)
    assert hash(eye) == hash(AttentionMask.isolated(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttentionMask(window=(1,)), ValueError, "window is"),
        (lambda: AttentionMask(window=5), ValueError, "window is 5, expected"),
        (lambda: AttentionMask(window=(1.5, 2)), ValueError, "window is"),
        (lambda: AttentionMask(causal=True, prefix=(1.5, 2)), ValueError, "prefix is"),
        (lambda: AttentionMask(causal=True, bidirectional=1), ValueError, "bidirectional is 1, expected"),
        (lambda: AttentionMask(visible=(True, False)), ValueError, "visible is"),
        (lambda: AttentionMask(window_scope="some"), ValueError, "window_scope is 'some'"),
        (lambda: AttentionMask(prefix=(1,)), ValueError, "set causal=True"),
        (lambda: AttentionMask(visible=((True,),)), ValueError, "for the layout's modalities"),
        (lambda: AttentionMask(causal=True, prefix=(1,)), ValueError, "expected 2 lengths"),
        (lambda: AttentionMask(causal=True, bidirectional=(7,)), ValueError, "names modality 7"),
        (
            lambda: AttentionMask(causal=True, prefix=(4, 4), window=(1, 0), window_scope="causal"),
            NotImplementedError,
            "leaves a gap",
        ),
    ],
)
def test_bad_masks_are_refused_by_name(make, error, message):
    layout = PackedLayout.from_counts([[3, 2], [1, 1]])
    with pytest.raises(error, match=message):
        MaskPlan.lower(layout, make())


def test_device_side_bounds_are_refused_until_token_tiles_exist():
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    layout = PackedLayout.from_cu_seqlens(bounds, total_tokens=7, max_seqlen=4)
    with pytest.raises(NotImplementedError, match="issue 3"):
        MaskPlan.lower(layout)
