"""Masks lowered to intervals, bits and tiles, against the pair-by-pair definition."""

import dataclasses
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mask_cases import device_bounds, merged, random_mask, seen_by_plan
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels import devices, mask_lowering_device
from mmkernels.layout import PackedLayout
from mmkernels.masks import MOST_KEY_LAYOUTS, MOST_PLANS, AttentionMask, KeyIntervals, MaskPlan
from mmkernels.testing import assert_tile_order, random_layout, reference_mask


def random_intervals(rng, layout):
    """Bounds that rise within each sample, some beyond it, some empty."""
    lengths = np.diff(layout.cu_seqlens.numpy())
    lo, hi = (np.concatenate([np.sort(rng.integers(0, n + 3, n)) for n in lengths]) for _ in range(2))
    return KeyIntervals(lo, hi)


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


@pytest.mark.parametrize("seed", range(40))
def test_given_intervals_join_the_rest(seed):
    """On the host and on device-side bounds."""
    rng = np.random.default_rng(seed)
    layout = random_layout(seed, max_length=9)
    mask = dataclasses.replace(random_mask(rng, layout), intervals=random_intervals(rng, layout))
    plan = MaskPlan.lower(layout, mask)
    assert torch.equal(seen_by_plan(plan), reference_mask(layout, mask)), mask
    for found, expected in zip(
        mask_lowering_device.tables(layout, layout, mask), (plan.q_table, plan.k_table), strict=True
    ):
        assert torch.equal(found, expected)


def test_intervals_that_fall_or_do_not_fit_are_named():
    layout = PackedLayout.from_counts([[2], [3]])
    with pytest.raises(ValueError, match=r"intervals\.hi falls at query 3"):
        MaskPlan.lower(layout, AttentionMask(intervals=KeyIntervals([0] * 5, [2, 2, 3, 1, 3])))
    with pytest.raises(ValueError, match=r"intervals\.lo is int64 \(4,\), expected whole numbers \[5\]"):
        MaskPlan.lower(layout, AttentionMask(intervals=KeyIntervals([0] * 4, [2] * 5)))


@pytest.mark.parametrize("lower", [MaskPlan.lower, lambda layout, mask: MaskPlan.lower(device_bounds(layout), mask)])
@pytest.mark.parametrize("bound", [None, [[1], [1, 2]], torch.zeros(2, requires_grad=True)])
def test_intervals_that_are_no_numbers_are_named(bound, lower):
    mask = AttentionMask(intervals=KeyIntervals(bound, [2, 2]))
    with pytest.raises(ValueError, match=r"AttentionMask: intervals\.lo"):
        lower(PackedLayout.from_counts([[2]]), mask)


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
    samples, work = [], []
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
        samples.append(sample)
        for block in range(starts[sample], stops[sample], block_cols):
            part = seen[row_start:row_end, block : min(block + block_cols, stops[sample])]
            if block not in classes:
                assert not part.any()  # nothing is lost
            elif not classes[block]:
                assert part.all()  # an unmasked block is seen whole by every row
                assert block + block_cols <= stops[sample]
                assert rows == "query" or row_end - row_start == block_rows
    assert (covered == 1).all()
    assert_tile_order(samples, work)
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


@pytest.mark.parametrize("rows", ["query", "key"])
@pytest.mark.parametrize("seed", range(20))
def test_joined_spans(seed, rows):
    """Short tiles walk what follows one another as one masked span; nothing else changes."""
    layout = random_layout(seed, num_samples=5, max_length=60)
    plan = MaskPlan.lower(layout, random_mask(np.random.default_rng(seed), layout))
    apart, joined = (plan.tiles(rows, 16, 8, "sample", columns) for columns in (0, 24))
    assert joined.pairs == apart.pairs
    assert torch.equal(joined.tiles[:, :2], apart.tiles[:, :2])
    walked = 0
    for (_, _, *was), (_, _, *now) in zip(apart.tiles.tolist(), joined.tiles.tolist(), strict=True):
        before, after = apart.spans[slice(*was)].tolist(), joined.spans[slice(*now)].tolist()
        follow = all(a[1] == b[0] for a, b in itertools.pairwise(before))
        if len(before) > 1 and follow and before[-1][1] - before[0][0] <= 24:
            before = [[before[0][0], before[-1][1], 1]]
        assert after == before
        walked += len(after)
    assert walked == len(joined.spans)


def test_joined_spans_of_a_short_sample():
    """A tile of one span keeps it as it is: whole blocks need no mask."""
    plan = MaskPlan.lower(PackedLayout.from_counts([[16], [20], [40]]))
    assert plan.tiles("query", 64, 8, "sample", 24).spans.tolist() == [[0, 16, 0], [16, 36, 1], [36, 76, 0]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttentionMask(window=(1,)), ValueError, "window is"),
        (lambda: AttentionMask(window=5), ValueError, "window is 5, expected"),
        (lambda: AttentionMask(window=(1.5, 2)), ValueError, "window is"),
        (lambda: AttentionMask(causal=True, prefix=(1.5, 2)), ValueError, "prefix is"),
        (lambda: AttentionMask(causal=True, bidirectional=1), ValueError, "bidirectional is 1, expected"),
        (lambda: AttentionMask(visible=(True, False)), ValueError, "visible is"),
        (lambda: AttentionMask(visible=[[0.0, -np.inf], [0.0, 0.0]]), ValueError, "visible is .*, expected bool"),
        (lambda: AttentionMask(visible=[["no", "yes"], ["no", "no"]]), ValueError, "visible is .*, expected bool"),
        (lambda: AttentionMask(visible=[[2, 1], [1, 1]]), ValueError, "visible is .*, expected bool"),
        (lambda: AttentionMask(visible=np.ones((2, 2, 2), bool)), ValueError, r"visible is (?s:.)*, expected bool"),
        (lambda: AttentionMask(intervals=([0], [1])), ValueError, "intervals is tuple, expected KeyIntervals"),
        (lambda: AttentionMask(causal="False"), ValueError, "causal is 'False', expected a bool"),
        (lambda: AttentionMask(align="left"), ValueError, "align is 'left'"),
        (lambda: AttentionMask.isolated("3"), ValueError, "isolated: num_modalities is '3', expected 1 to 32"),
        (lambda: AttentionMask.isolated(0), ValueError, "isolated: num_modalities is 0, expected 1 to 32"),
        (lambda: "causal", ValueError, "MaskPlan: mask is str, expected AttentionMask or None"),
        (lambda: AttentionMask(window_scope="some"), ValueError, "window_scope is 'some'"),
        (lambda: AttentionMask(prefix=(1,)), ValueError, "set causal=True"),
        (lambda: AttentionMask(visible=((True,),)), ValueError, "for the modalities of queries and keys"),
        (lambda: AttentionMask(causal=True, prefix=(1,)), ValueError, "expected 2 lengths"),
        (lambda: AttentionMask(causal=True, prefix=(2, -1)), ValueError, "expected 2 lengths >= 0"),
        (lambda: AttentionMask(causal=True, bidirectional=(7,)), ValueError, "names modality 7"),
        (
            lambda: AttentionMask(causal=True, prefix=(1, 4), window=(1, 0), window_scope="causal"),
            NotImplementedError,
            "begins beyond its sample's prefix",
        ),
    ],
)
def test_bad_masks_are_refused_by_name(make, error, message):
    layout = PackedLayout.from_counts([[3, 2], [1, 1]])
    with pytest.raises(error, match=message):
        MaskPlan.lower(layout, make())


@pytest.mark.parametrize("make", [MaskPlan.lower, MaskPlan])
def test_what_is_no_layout_is_refused_by_name(make):
    layout = PackedLayout.from_counts([[3, 2]])
    with pytest.raises(ValueError, match="MaskPlan: k_layout is int, expected PackedLayout"):
        make(layout, None, 3)
    with pytest.raises(ValueError, match="MaskPlan: layout is Tensor, expected PackedLayout"):
        make(layout.cu_seqlens, AttentionMask())
    with pytest.raises(ValueError, match="MaskPlan: mask is PackedLayout, expected AttentionMask or None"):
        make(layout, layout)


@pytest.mark.parametrize("far", [2**31, 2**62, 2**63 - 1, 2**70])
@pytest.mark.parametrize("host", [True, False])
def test_what_means_unlimited_is_unlimited(far, host):
    """Numbers to which int64 cannot add a place in the batch."""
    lengths, total = [3, 5, 1], 9
    layout = PackedLayout.from_counts([[n] for n in lengths])
    if not host:
        layout = device_bounds(layout)
    first = np.zeros(total, np.int64)
    masks = [AttentionMask(window=(far, far)), AttentionMask(causal=True, prefix=(far,) * 3)]
    if far < 2**63:
        masks.append(AttentionMask(intervals=KeyIntervals(first, np.full(total, far))))
    masks.append(
        AttentionMask(intervals=KeyIntervals(first, np.full(total, 2**64 - 1, np.uint64))) if host else masks[0]
    )
    expected = MaskPlan.lower(layout, None)
    for mask in masks:
        plan = MaskPlan.lower(layout, mask)
        assert torch.equal(plan.kv_lo, expected.kv_lo)
        assert torch.equal(plan.kv_hi, expected.kv_hi)


def test_a_layout_keeps_a_limited_number_of_plans():
    layout = PackedLayout.from_counts([[3], [2]])
    first = MaskPlan.lower(layout)
    for i in range(2 * MOST_PLANS):
        MaskPlan.lower(layout, AttentionMask(causal=True, window=(i, 0)))
        MaskPlan.lower(layout, AttentionMask(), PackedLayout.from_counts([[1], [i]]))
    plans = [found for key, found in layout.cache.items() if isinstance(key, AttentionMask)]
    assert len(plans) == MOST_PLANS
    assert max(map(len, plans)) <= MOST_KEY_LAYOUTS
    for i in range(2 * MOST_KEY_LAYOUTS):
        MaskPlan.lower(layout, AttentionMask(), PackedLayout.from_counts([[1], [i]]))
    assert len(layout.cache[AttentionMask()]) == MOST_KEY_LAYOUTS
    again = MaskPlan.lower(layout)
    assert torch.equal(again.q_table, first.q_table)


def test_threads_may_share_a_layout_that_meets_many_masks():
    layout = PackedLayout.from_counts([[3], [2]])

    def lower(first):
        return [MaskPlan.lower(layout, AttentionMask(causal=True, window=(first + i, 0))) for i in range(300)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(lower, range(0, 6000, 1000)))
    finally:
        sys.setswitchinterval(interval)
    assert all(len(plans) == 300 for plans in results)
    assert sum(isinstance(key, AttentionMask) for key in layout.cache) <= MOST_PLANS


def random_cross_mask(rng, layout):
    """Any combination of the mask's parts that cross-attention takes."""
    M = layout.num_modalities
    return AttentionMask(
        causal=bool(rng.integers(2)),
        window=tuple(int(w) for w in rng.choice([-1, 0, 1, 3, 9], 2)),
        window_scope="all" if rng.integers(2) else "causal",
        visible=rng.integers(0, 2, (M, M)).astype(bool) if rng.integers(2) else None,
        align="bottom_right" if rng.integers(2) else "top_left",
    )


@pytest.mark.parametrize("seed", range(150))
def test_cross_plan_equals_definition(seed):
    layout, k_layout = random_layout(seed, max_length=9), random_layout(seed + 1000, max_length=9)
    mask = random_cross_mask(np.random.default_rng(seed), layout)
    plan = MaskPlan.lower(layout, mask, k_layout)
    assert MaskPlan.lower(layout, mask, k_layout) is plan
    expected = reference_mask(layout, mask, k_layout)
    key = torch.arange(k_layout.total_tokens, dtype=torch.int32)
    query = torch.arange(layout.total_tokens, dtype=torch.int32)[:, None]
    inside = (key >= plan.kv_lo[:, None]) & (key < plan.kv_hi[:, None])
    assert torch.equal(inside, (query >= plan.q_lo) & (query < plan.q_hi))
    assert torch.equal(inside & ((plan.q_bits[:, None] & plan.k_bits) != 0), expected), mask
    assert plan.visible_pairs == int(expected.sum())
    for found, of_host in zip(
        mask_lowering_device.tables(layout, k_layout, mask), (plan.q_table, plan.k_table), strict=True
    ):
        assert torch.equal(found, of_host)


@pytest.mark.parametrize(
    ("mask", "k_counts", "message"),
    [
        (AttentionMask(causal=True, prefix=(1, 1)), [[4], [2]], "prefix has no meaning in cross-attention"),
        (AttentionMask(causal=True, bidirectional=(0,)), [[4], [2]], "bidirectional has no meaning"),
        (AttentionMask(), [[4]], "k_layout has 1 samples, expected layout's 2"),
    ],
)
def test_cross_refuses_by_name(mask, k_counts, message):
    with pytest.raises(ValueError, match=message):
        MaskPlan.lower(PackedLayout.from_counts([[3], [5]]), mask, PackedLayout.from_counts(k_counts))


@pytest.mark.parametrize("seed", range(100))
def test_a_prefix_and_a_window_are_refused_where_they_leave_a_gap_alone(seed):
    layout = merged(random_layout(seed, max_length=9))
    rng = np.random.default_rng(seed)
    prefix = tuple(int(n) for n in rng.integers(0, 16, layout.num_samples) * rng.integers(0, 2, layout.num_samples))
    bidirectional = (1,) if rng.integers(2) else ()
    mask = AttentionMask(True, (int(rng.choice([0, 2, 5, 9, 30])), -1), "causal", prefix, bidirectional)
    expected = reference_mask(layout, mask)
    if (expected.int().diff(dim=1) == 1).sum() > (~expected[:, 0]).sum():  # some row begins to see twice
        with pytest.raises(NotImplementedError, match="begins beyond its sample's prefix"):
            MaskPlan.lower(layout, mask)
        return
    assert torch.equal(seen_by_plan(MaskPlan.lower(layout, mask)), expected)
    if layout.max_seqlen - 1 - mask.window[0] <= min((n for n in prefix if n), default=layout.max_seqlen):
        assert torch.equal(seen_by_plan(MaskPlan.lower(device_bounds(layout), mask)), expected)
    else:
        with pytest.raises(NotImplementedError, match="may begin, as far as"):
            MaskPlan.lower(device_bounds(layout), mask)


@pytest.mark.parametrize("make", [MaskPlan.lower, MaskPlan])
@pytest.mark.parametrize("real_beside_fake", [True, False])
def test_a_plan_is_counted_under_fake_tensors(real_beside_fake, make):
    """By the host's tables: numpy was given memory in which nothing is."""
    layout = PackedLayout.from_counts([[3, 2], [1, 4]])
    mask = AttentionMask(causal=True, visible=[[True, False], [True, True]])
    with FakeTensorMode(allow_non_fake_inputs=real_beside_fake):
        plan = make(layout, mask)
        found = plan.visible_pairs, plan.cost("sample", 4, 4), plan.tiles("query", 4, 4, joined=64)
    plan = MaskPlan(layout, mask)
    assert found[:2] == (plan.visible_pairs, plan.cost("sample", 4, 4))
    assert torch.equal(found[2].spans, plan.tiles("query", 4, 4, joined=64).spans)


def test_a_new_mask_takes_few_calls():
    """Layouts are new in every step, and so are their plans: each of numpy's functions in Python costs 2 to 10 us."""
    layout, mask = PackedLayout.from_counts(np.full((4, 2), 40)), AttentionMask(causal=True, bidirectional=(1,))
    MaskPlan(layout, mask)
    made = []
    sys.setprofile(lambda frame, event, of: made.append(event))
    try:
        MaskPlan(layout, mask)
    finally:
        sys.setprofile(None)
    assert made.count("call") + made.count("c_call") < 110, made


def test_a_lowered_mask_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    """Tables and tiles: from other memory the host may wait for the GPU, in each step whose layout is new.

    "meta" stands for the GPU, and for pinned memory what `ready` makes.
    """
    layout = PackedLayout.from_counts([[4, 2], [3, 0]]).to("meta")
    made, sent, to = [], [], torch.Tensor.to
    monkeypatch.setattr(devices, "ready", lambda what, tensor, device: made.append(tensor.clone()) or made[-1])
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *args, **options: sent.append((self, args, options)) or to(self, *args, **options),
    )
    plan = MaskPlan.lower(layout, AttentionMask(causal=True))
    tiles = plan.tiles("query", 4, 4)
    assert [len(t) for t in made] == [4, 4, len(tiles.tiles), len(tiles.spans)]
    for (tensor, args, options), ready in zip(sent, made, strict=True):
        assert tensor is ready
        assert (args, options) == ((layout.device,), {"non_blocking": True})


def test_a_captured_graph_takes_no_tables_from_the_host(monkeypatch):
    host = PackedLayout.from_counts([[4, 2]])
    layout = host.to("meta")
    lowered = MaskPlan.lower(layout)
    monkeypatch.setattr(devices, "captures", lambda device: True)
    assert MaskPlan.lower(layout) is lowered
    for ask in (
        lambda: MaskPlan.lower(layout, AttentionMask(causal=True)), lambda: lowered.tiles("key", 4, 4),
        lambda: host.to("meta"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"the tables of a (mask|layout) are on the host, from where a graph that"):
            ask()
