"""Masks lowered where only device-side bounds are known, against the host's, and what of the host is refused there."""

import numpy as np
import pytest
import torch
from mask_cases import device_bounds, merged, random_mask

from mmkernels import devices, mask_lowering_device
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, KeyIntervals, MaskPlan
from mmkernels.testing import random_layout, reference_mask


def test_segments_that_touch_stay_apart_beside_intervals_on_the_device():
    """Two images in a row, on a layout whose segments are known though the mask is lowered on the device."""
    layout = PackedLayout.from_segments([[(1, 3), (1, 2), (0, 1)], [(1, 2)]], num_modalities=2)
    mask = AttentionMask(causal=True, bidirectional=(1,))
    q_table, k_table = mask_lowering_device.tables(layout, layout, mask)
    plan = MaskPlan.lower(layout, mask)
    assert torch.equal(q_table, plan.q_table)
    assert torch.equal(k_table, plan.k_table)


def test_intervals_of_the_host_mean_the_same_on_device_side_bounds():
    """Beyond int64, where "unlimited" became nothing, and arrays that run backwards, which torch does not take."""
    layout = PackedLayout.from_counts([[2], [3]])
    mask = AttentionMask(intervals=KeyIntervals(np.zeros(5, int)[::-1], np.full(5, 2**64 - 1, np.uint64)))
    plan = MaskPlan.lower(layout, mask)
    assert plan.kv_hi.tolist() == [2, 2, 5, 5, 5]
    assert torch.equal(MaskPlan.lower(device_bounds(layout), mask).q_table, plan.q_table)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bound", [torch.tensor([2]), torch.full((5,), 1.7), torch.ones(5, dtype=torch.bool)])
def test_intervals_are_never_stretched_or_rounded_on_device_side_bounds(bound, device):
    bound = bound.to(device)
    layout, zeros = device_bounds(PackedLayout.from_counts([[2], [3]])), torch.zeros(5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"intervals\.hi is .* expected whole numbers \[5\]"):
        MaskPlan.lower(layout, AttentionMask(intervals=KeyIntervals(zeros, bound)))


@pytest.mark.parametrize("seed", range(150))
def test_lowering_on_the_device_equals_the_host(seed):
    """Run on CPU tensors; the code holds no read of a value, which the GPU stage checks by forbidding syncs."""
    layout = merged(random_layout(seed, max_length=12))
    mask = random_mask(np.random.default_rng(seed), layout)
    on_device = device_bounds(layout)
    host, device = MaskPlan.lower(layout, mask), MaskPlan.lower(on_device, mask)
    assert torch.equal(on_device.positions, layout.positions)
    # Empty segments have no token that could tell of them, so numbers may differ, but not which tokens share one.
    assert torch.equal(on_device.segment_ids.diff() != 0, layout.segment_ids.diff() != 0)
    assert torch.equal(host.q_table, device.q_table), mask
    assert torch.equal(host.k_table, device.k_table), mask


def test_lowering_on_the_device_does_not_make_the_host_wait(monkeypatch):
    """Every tensor from the host goes through `ready`, which pins it for a GPU, and keeps its dtype on the way."""
    layout = PackedLayout.from_counts([[4], [3]])
    lo, hi = np.zeros(7, np.int32), np.full(7, 3)
    mask = AttentionMask(causal=True, prefix=(2, 1), intervals=KeyIntervals(lo, hi))
    sent, pinned = [], []
    monkeypatch.setattr(devices, "ready", lambda what, tensor, device: pinned.append(tensor.clone()) or pinned[-1])
    to = torch.Tensor.to

    def recorded(self, *args, **options):
        if any(isinstance(arg, torch.device) for arg in args):
            sent.append((self, args, options))
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    found = mask_lowering_device.tables(device_bounds(layout), device_bounds(layout), mask)
    assert [t.tolist() for t in pinned] == [[2, 1], lo.tolist(), hi.tolist()]
    for (tensor, args, options), memory in zip(sent, pinned, strict=True):
        assert tensor is memory
        assert (args, options) == ((layout.device,), {"non_blocking": True})
    monkeypatch.undo()
    assert torch.equal(found[0], MaskPlan.lower(layout, mask).q_table)


def test_what_a_captured_graph_would_read_from_the_host_again_is_refused(monkeypatch):
    """Its memory is somebody else's by the time of a replay.  A prefix of one length is a number, which stays."""
    layout = device_bounds(PackedLayout.from_counts([[4], [3]]))
    monkeypatch.setattr(devices, "captures", lambda device: True)
    found = mask_lowering_device.tables(layout, layout, AttentionMask(causal=True, prefix=(2, 2)))
    assert torch.equal(found[0], MaskPlan.lower(layout, AttentionMask(causal=True, prefix=(2, 2))).q_table)
    for mask, what in (
        (AttentionMask(causal=True, prefix=(2, 1)), "prefix lengths"),
        (AttentionMask(intervals=KeyIntervals(np.zeros(7, int), np.full(7, 3))), "intervals.lo"),
    ):
        with pytest.raises(ValueError, match=f"AttentionMask: {what} are on the host, from where a graph"):
            mask_lowering_device.tables(layout, layout, mask)


@pytest.mark.parametrize("rows", ["query", "key"])
@pytest.mark.parametrize("seed", range(60))
def test_token_tiles_from_the_device_cover_what_is_seen(seed, rows):
    layout = merged(random_layout(seed, max_length=30))
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, layout)
    block_rows, block_cols = (int(n) for n in rng.choice([4, 8, 16], 2))
    seen = reference_mask(layout, mask)
    seen = seen if rows == "query" else seen.T
    plan = MaskPlan.lower(device_bounds(layout), mask)
    assert plan.schedules == ("token",)
    schedule = plan.tiles(rows, block_rows, block_cols, "token")
    total = layout.total_tokens
    assert len(schedule.tiles) == -(-total // block_rows)  # of T alone: a CUDA graph's grid
    assert len(schedule.spans) == 3 * len(schedule.tiles)
    for tile, (row_start, row_end, first, last) in enumerate(schedule.tiles.tolist()):
        assert (row_start, row_end) == (tile * block_rows, min((tile + 1) * block_rows, total))
        visited = torch.zeros(total, dtype=torch.bool)
        for col_start, col_end, masked in schedule.spans[first:last].tolist():
            assert col_start % block_cols == 0 or col_start == col_end
            assert 0 <= col_start <= col_end <= total
            assert not visited[col_start:col_end].any()
            visited[col_start:col_end] = True
            if not masked:
                assert (col_end - col_start) % block_cols == 0
                assert seen[row_start:row_end, col_start:col_end].all()
                assert rows == "query" or row_end - row_start == block_rows or col_start == col_end
        assert not seen[row_start:row_end, ~visited].any()


def test_device_side_bounds_refuse_what_would_sync():
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    layout = PackedLayout.from_cu_seqlens(bounds, total_tokens=7, max_seqlen=4)
    plan = MaskPlan.lower(layout)
    with pytest.raises(NotImplementedError, match="allow token tiles only"):
        plan.tiles("query", 16, 16)
    with pytest.raises(NotImplementedError, match="would sync"):
        plan.cost("token", 16, 16)
    with pytest.raises(NotImplementedError, match="would sync"):
        _ = plan.visible_pairs
