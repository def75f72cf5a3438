"""Runs, against brute force: they never see one another, they are as fine as contiguous pieces can be, and each one's
kind is what its mask is.  This is what lets the CPU path leave the mask out."""

from itertools import pairwise

import numpy as np
import pytest
from attention_oracle import MASKS, NUM_MODALITIES, brute_force, shared_layout

from mmkernels import AttentionMask, PackedLayout
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention.torch_runs import BLIND, CAUSAL, FULL, MASKED, runs


def _runs(layout, mask):
    plan = MaskPlan.lower(layout, mask)
    return runs(layout.cu_seqlens.numpy(), plan.q_table.numpy(), plan.k_table.numpy(), plan.has_visible).tolist()


def _pieces(found):
    return [(start + i * length, length, kind) for start, length, count, kind in found for i in range(count)]


@pytest.mark.parametrize("kind", MASKS)
def test_runs_against_brute_force(kind):
    for seed in range(8):
        layout = shared_layout(seed)
        mask = MASKS[kind](layout, seed)
        seen = brute_force(layout, mask).numpy()
        pieces = _pieces(_runs(layout, mask))
        assert sum(length for _, length, _ in pieces) == layout.total_tokens
        inside = np.zeros_like(seen)
        for start, length, piece_kind in pieces:
            at = slice(start, start + length)
            inside[at, at] = True
            own = seen[at, at]
            assert piece_kind != FULL or own.all()
            assert piece_kind != CAUSAL or (own == np.tri(length, dtype=bool)).all()
            assert piece_kind != BLIND or not own.any()
            if piece_kind == MASKED:
                assert own.any()
                assert not own.all()
        assert not (seen & ~inside).any()


def test_isolated_modalities_need_no_mask():
    layout = PackedLayout.from_counts([[5, 7, 3], [5, 0, 3], [0, 0, 4]])
    mask = AttentionMask.isolated(3)
    assert [kind for *_, kind in _runs(layout, mask)] == [FULL] * 6
    # Text, image, text of one sample: the two texts see each other across the image, so the sample stays whole.
    layout = PackedLayout.from_segments([[(0, 2), (1, 3), (0, 2)], [(1, 4), (0, 1)]], num_modalities=3)
    assert _pieces(_runs(layout, mask)) == [(0, 7, MASKED), (7, 4, FULL), (11, 1, FULL)]


def test_equal_neighbours_are_one_batch():
    layout = PackedLayout.from_counts([[4], [4], [0], [4], [6], [4]])
    assert _runs(layout, None) == [[0, 4, 3, FULL], [12, 6, 1, FULL], [18, 4, 1, FULL]]
    assert _runs(layout, AttentionMask(causal=True))[0] == [0, 4, 3, CAUSAL]
    # Masked ones each have a mask of their own.
    assert [count for _, _, count, _ in _runs(layout, AttentionMask(window=(1, 1)))] == [1] * 5


def test_a_modality_that_sees_nothing_is_blind():
    layout = PackedLayout.from_counts([[3, 2]])
    assert _runs(layout, AttentionMask(visible=[[False, False], [False, True]])) == [[0, 3, 1, BLIND], [3, 2, 1, FULL]]


def test_runs_are_the_finest_contiguous_pieces():
    for seed in range(8):
        layout = shared_layout(seed)
        mask = MASKS["visible"](layout, seed)
        seen = brute_force(layout, mask).numpy()
        bounds = {0, *(start + length for start, length, _ in _pieces(_runs(layout, mask)))}
        for start, stop in pairwise(layout.cu_seqlens.tolist()):
            segments = layout.segment_cu_seqlens.tolist()
            for cut in (c for c in segments if start < c < stop):
                crosses = seen[start:cut, cut:stop].any() or seen[cut:stop, start:cut].any()
                assert (cut in bounds) == (not crosses)
    assert NUM_MODALITIES == 3
