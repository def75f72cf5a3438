"""PackedLayout against a token-by-token construction."""

import copy
import itertools
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels.layout import PackedLayout
from mmkernels.testing import random_layout


def tokens_of(samples, num_modalities, special):
    """The layout written token by token: (sample, modality, segment, position axes, source row)."""
    axes = max([1] + [np.size(length) for sample in samples for _, length in sample])
    next_row = [0] * num_modalities
    segment = 0
    for index, sample in enumerate(samples):
        for modality, length in sample:
            shape = (length,) if np.ndim(length) == 0 else tuple(length)
            shift = int(special[modality] is not None)
            if shift:
                yield index, modality, segment, (0,) * axes, -(special[modality] + 1)
            for place in np.ndindex(*shape):
                position = (0,) * (axes - len(shape)) + tuple(p + shift for p in place)
                yield index, modality, segment, position, next_row[modality]
                next_row[modality] += 1
            segment += 1


@pytest.mark.parametrize(
    ("samples", "special"),
    [
        ([[(0, 3), (1, 2)], [(1, 4), (0, 1), (1, 2)]], (None, None, None)),  # interleaved, a modality missing
        ([[], [(0, 1)], [], [(2, 5)]], (None, None, None)),  # empty samples, length 1
        ([[(0, 2), (1, (2, 3)), (2, 4)], [(1, (1, 1))]], (None, 5, 6)),  # grids and special tokens
        ([[(1, (2, 2, 3)), (0, 2)], [(1, (3, 1))]], (None, None, None)),  # three axes beside two and one
        ([[(0, 0), (1, 2), (1, (0, 5)), (1, (2, 0, 3))]], (None, None, None)),  # segments of no tokens
        ([[(1, 0)]], (None, 0, None)),  # only a special token, id 0
        ([], (None, None, None)),  # no samples at all
    ],
)
def test_matches_token_by_token(samples, special):
    layout = PackedLayout.from_segments(samples, num_modalities=3, special_tokens=special)
    expected = list(tokens_of(samples, 3, special))
    assert layout.total_tokens == len(expected)
    lengths = np.bincount([t[0] for t in expected], minlength=len(samples)) if samples else np.zeros(0, int)
    assert layout.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert layout.max_seqlen == lengths.max(initial=0)
    assert layout.modality_ids.tolist() == [t[1] for t in expected]
    assert layout.segment_ids.tolist() == [t[2] for t in expected]
    assert layout.positions.T.tolist() == [list(t[3]) for t in expected]
    assert layout.source_rows.tolist() == [t[4] for t in expected]
    counts = [sum(t[4] >= 0 and t[1] == m for t in expected) for m in range(3)]
    assert list(layout.stream_lengths) == counts


@pytest.mark.parametrize("special_tokens", [None, (7, None, 9)])
def test_from_counts_is_from_segments(special_tokens):
    """Two ways to the same buffer: the table in numpy, and segment by segment."""
    counts = np.random.default_rng(0).integers(0, 5, (40, 3))
    samples = [[(m, n) for m, n in enumerate(row) if n] for row in counts.tolist()]
    one = PackedLayout.from_counts(counts, special_tokens=special_tokens)
    other = PackedLayout.from_segments(samples, num_modalities=3, special_tokens=special_tokens)
    assert torch.equal(one._buffer, other._buffer)
    assert np.array_equal(one.segments, other.segments)
    assert one.stream_lengths == other.stream_lengths


def test_a_special_token_may_have_the_id_0():
    layout = PackedLayout.from_counts([[2]], special_tokens=(0,))
    assert (layout.total_tokens, layout.source_rows.tolist()) == (3, [-1, 0, 1])


@pytest.mark.parametrize("seed", range(4))
def test_device_bounds_make_the_layout_of_host_bounds(seed):
    """As on a GPU, by a function that reads nothing."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 5, 9)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    total = int(bounds[-1])
    for kinds in (1, 2):
        ids = torch.from_numpy(rng.integers(0, kinds, total).astype(np.uint8))
        host = PackedLayout.from_cu_seqlens(
            bounds, total_tokens=total, max_seqlen=5, modality_ids=ids, num_modalities=kinds
        )
        device = PackedLayout._from_device_bounds(bounds, total, 5, ids, kinds)
        assert torch.equal(device.positions, host.positions)
        filled = torch.unique_consecutive(host.segment_ids, return_inverse=True)[1]  # empty samples count with one kind
        assert torch.equal(device.segment_ids, host.segment_ids if kinds == 1 else filled.int())
        if kinds == 2:
            with pytest.raises(ValueError, match="num_segments: a layout from device-side bounds"):
                _ = device.num_segments
            with pytest.raises(ValueError, match="stream_lengths: a layout from cu_seqlens"):
                _ = device.stream_lengths


def test_from_counts_is_one_segment_per_present_modality():
    layout = PackedLayout.from_counts([[2, 0, 1], [0, 0, 0], [1, 3, 0]])
    assert layout.segments.tolist() == [[0, 0, 2, 0], [0, 2, 1, 0], [2, 0, 1, 2], [2, 1, 3, 0]]
    assert layout.segment_cu_seqlens.tolist() == [0, 2, 3, 4, 7]


def test_from_cu_seqlens_equals_one_modality():
    ours = PackedLayout.from_cu_seqlens(torch.tensor([0, 3, 3, 7], dtype=torch.int32), total_tokens=7, max_seqlen=4)
    other = PackedLayout.from_counts([[3], [0], [4]])
    assert ours.modality_ids.tolist() == other.modality_ids.tolist()
    assert ours.positions.tolist() == other.positions.tolist()
    ids = torch.tensor([0, 1, 1, 0, 0, 1, 1], dtype=torch.uint8)
    mixed = PackedLayout.from_cu_seqlens(
        ours.cu_seqlens, total_tokens=7, max_seqlen=4, modality_ids=ids, num_modalities=2
    )
    assert mixed.modality_ids.tolist() == ids.tolist()
    segments = PackedLayout.from_segments([[(0, 1), (1, 2)], [], [(0, 2), (1, 2)]], num_modalities=2)
    assert mixed.positions.tolist() == segments.positions.tolist()  # a stretch of one modality is a segment


@pytest.mark.parametrize("seed", range(8))
def test_from_cu_seqlens_cuts_where_sample_or_modality_changes(seed):
    """Beside a loop over tokens; with empty samples in a row, and one modality on both sides of a bound."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 12) * (rng.random(12) < 0.6)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = rng.integers(0, 3, bounds[-1]).astype(np.uint8)
    samples = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        runs = [(modality, len(list(run))) for modality, run in itertools.groupby(ids[start:stop].tolist())]
        samples.append(runs or [(0, 0)])
    expected = PackedLayout.from_segments(samples, num_modalities=3)
    ours = PackedLayout.from_cu_seqlens(
        torch.from_numpy(bounds), total_tokens=len(ids), max_seqlen=5, modality_ids=torch.from_numpy(ids),
        num_modalities=3,
    )  # fmt: skip
    assert torch.equal(ours._buffer, expected._buffer)
    assert np.array_equal(ours.segments, expected.segments)
    assert ours.stream_lengths == expected.stream_lengths


def test_from_cu_seqlens_does_nothing_sample_by_sample():
    """The varlen faces come this way for each new tensor of bounds: a loop took 20 us a sample."""
    calls = []
    for num_samples in (10, 1000):
        bounds = torch.arange(0, 2 * num_samples + 1, 2, dtype=torch.int32)
        ids = torch.arange(2 * num_samples).remainder(2).to(torch.uint8)
        arguments = {"total_tokens": 2 * num_samples, "max_seqlen": 2, "modality_ids": ids, "num_modalities": 2}
        made = []
        sys.setprofile(lambda frame, event, of, made=made: made.append(event))
        try:
            PackedLayout.from_cu_seqlens(bounds, **arguments)
        finally:
            sys.setprofile(None)
        calls.append(len(made))
    assert calls[1] < calls[0] + 100, calls


def test_pickle_sends_one_buffer_and_no_cache():
    layout = PackedLayout.from_counts(np.full((50, 2), 100))
    layout.cache["x"] = lambda: "what no pickle holds"
    data = pickle.dumps(layout)
    assert len(data) < 1.1 * layout._buffer.nbytes
    copy = pickle.loads(data)
    assert copy.cache == {} != layout.cache
    assert not copy.segments.flags.writeable
    assert copy.segments.tolist() == layout.segments.tolist()
    for name in ("cu_seqlens", "positions", "segment_ids", "source_rows", "segment_cu_seqlens", "modality_ids"):
        assert torch.equal(getattr(copy, name), getattr(layout, name)), name


def test_to_the_same_device_is_the_layout_itself_and_meta_keeps_the_host():
    layout = random_layout(4)
    assert layout.to("cpu") is layout
    with pytest.raises(ValueError, match=r"PackedLayout.to: device is torch.float16, expected a device"):
        layout.to(torch.float16)
    moved = layout.to("meta")
    assert moved.host is layout
    assert moved.positions.shape == layout.positions.shape
    assert moved.modality_ids.dtype == torch.uint8


def test_pin_memory_pins_the_one_buffer(monkeypatch):
    """What DataLoader(pin_memory=True) calls; without a GPU nothing can be pinned, so a copy stands for it."""
    layout = PackedLayout.from_segments([[(0, 2), (1, (2, 3))], [(1, (1, 1))]], num_modalities=2)
    layout.cache["something"] = 1
    pinned = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: any(self is t for t in pinned))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    moved = layout.pin_memory()
    assert len(pinned) == 1
    assert moved.pin_memory() is moved
    assert moved.cache == {} != layout.cache
    assert moved.host is moved
    for name in ("cu_seqlens", "modality_ids", "positions", "segment_ids", "source_rows", "segment_cu_seqlens"):
        assert torch.equal(getattr(moved, name), getattr(layout, name))
        assert getattr(moved, name).untyped_storage().data_ptr() == pinned[0].untyped_storage().data_ptr()


def test_a_layout_goes_from_one_gpu_to_another(monkeypatch):
    """Nothing is pinned, as only the host's memory can be.  "meta" stands for the first; `to` does not move."""
    moved = PackedLayout.from_counts([[3, 2]]).to("meta")
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: asked.append(device) or self)
    assert moved.to("cuda:1").host is moved.host
    assert asked == [torch.device("cuda:1")]


def test_bounds_are_read_under_fake_tensors_too():
    """Real ones: numpy was given memory in which nothing is."""
    bounds, ids = torch.tensor([0, 3, 7], dtype=torch.int32), torch.zeros(7, dtype=torch.uint8)
    expected = PackedLayout.from_cu_seqlens(bounds, total_tokens=7, max_seqlen=4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = PackedLayout.from_cu_seqlens(bounds, total_tokens=7, max_seqlen=4)
        fake = mode.from_tensor(bounds)
        with pytest.raises(ValueError, match="from_cu_seqlens: cu_seqlens is a fake tensor, expected one with numbers"):
            PackedLayout.from_cu_seqlens(fake, total_tokens=7, max_seqlen=4)
        with pytest.raises(ValueError, match="from_cu_seqlens: modality_ids is a fake tensor"):
            PackedLayout.from_cu_seqlens(
                bounds, total_tokens=7, max_seqlen=4, modality_ids=mode.from_tensor(ids), num_modalities=1
            )
    assert torch.equal(found._buffer, expected._buffer)


def test_bounds_may_be_a_negated_view_or_zeros_that_lie_nowhere():
    negated = torch._neg_view(torch.tensor([0, -1, -2], dtype=torch.int32))
    layout = PackedLayout.from_cu_seqlens(
        negated, total_tokens=2, max_seqlen=1, modality_ids=torch._efficientzerotensor((2,), dtype=torch.uint8)
    )
    assert layout.cu_seqlens.tolist() == [0, 1, 2]
    assert layout.modality_ids.tolist() == [0, 0]


def test_repr_is_one_line():
    assert repr(PackedLayout.from_counts([[2, 1]])) == (
        "PackedLayout(1 samples, 2 segments, 3 tokens, longest 3, 2 modalities, cpu)"
    )


def from_bounds(*bounds):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    return PackedLayout.from_cu_seqlens(bounds, total_tokens=4, max_seqlen=4)


def two_tokens(**arguments):
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    return PackedLayout.from_cu_seqlens(bounds, **{"total_tokens": 2, "max_seqlen": 2, **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PackedLayout.from_segments([[(2, 1)]], num_modalities=2), "sample 0 has modality 2, expected 0 to 1"),
        (lambda: PackedLayout.from_segments([[(0, -1)]], num_modalities=1), "sample 0 has length -1"),
        (
            lambda: PackedLayout.from_segments([[(0, (1, 1, 1, 1))]], num_modalities=1),
            r"length \(1, 1, 1, 1\), expected",
        ),
        (lambda: PackedLayout.from_segments([], num_modalities=0), "num_modalities is 0, expected 1 to 32"),
        (lambda: PackedLayout.from_counts([[1]], special_tokens=(-1,)), r"special_tokens\[0\] is -1, expected"),
        (
            lambda: PackedLayout.from_segments([[(0, 2**31 - 1)]], num_modalities=1, special_tokens=(0,)),
            r"more than 2\*\*31 - 1 tokens at sample 0",
        ),
        (lambda: two_tokens(max_seqlen=-1), "max_seqlen is -1, expected a whole number >= 0"),
        (lambda: two_tokens(modality_ids=torch.zeros(2, dtype=torch.int32)), "modality_ids is torch.int32"),
        (lambda: two_tokens(modality_ids=torch.zeros(3, dtype=torch.uint8)), r"\(3,\), expected uint8 \[2\]"),
        (lambda: PackedLayout.from_segments([], num_modalities=33), "num_modalities is 33, expected 1 to 32"),
        (lambda: PackedLayout.from_segments([[(0, 2**31)]], num_modalities=1), "2\\*\\*31"),
        (lambda: PackedLayout.from_segments([[(0, 2.5)]], num_modalities=1), "sample 0 has length 2.5, expected n"),
        (lambda: PackedLayout.from_segments([[(0.5, 1)]], num_modalities=1), "sample 0 has modality 0.5"),
        (
            lambda: PackedLayout.from_segments([(0, 5)], num_modalities=1),
            r"sample 0 is \(0, 5\), expected a list of \(modality, length\)",
        ),
        (
            lambda: PackedLayout.from_segments([[], [(0, 3, 4)]], num_modalities=1),
            r"sample 1 is \[\(0, 3, 4\)\], expected",
        ),
        (lambda: PackedLayout.from_segments([[(0.0, 5)]], num_modalities=1), "sample 0 has modality 0.0, expected"),
        (lambda: PackedLayout.from_segments([[(np.arange(2), 5)]], num_modalities=1), r"modality array\(\[0, 1\]\)"),
        (lambda: PackedLayout.from_segments([[(0, True)]], num_modalities=1), "sample 0 has length True, expected n"),
        (lambda: PackedLayout.from_segments([[(0, "3")]], num_modalities=1), "sample 0 has length '3', expected n"),
        (lambda: PackedLayout.from_segments([], num_modalities=True), "num_modalities is True, expected 1 to 32"),
        (lambda: two_tokens(total_tokens=True), "total_tokens is True, expected a whole number"),
        (
            lambda: PackedLayout.from_counts([[1, 2], [3]]),
            r"from_counts: counts\[1\] has 1 entries, expected 2 as counts\[0\]",
        ),
        (lambda: PackedLayout.from_counts(torch.zeros(1, 1, device="meta")), "counts is no array .* meta device"),
        (lambda: PackedLayout.from_counts(torch.zeros(1, 1).bfloat16()), "counts is no array .* BFloat16"),
        (lambda: PackedLayout.from_segments([], num_modalities="2"), "num_modalities is '2', expected 1 to 32"),
        (lambda: two_tokens(max_seqlen="6"), "max_seqlen is '6', expected a whole number >= 0"),
        (lambda: two_tokens(modality_ids=np.zeros(2, np.uint8)), "modality_ids is ndarray, expected a uint8 tensor"),
        (lambda: PackedLayout.from_counts([[0.5]]), "counts is float64, expected integers"),
        (lambda: PackedLayout.from_counts([1, 2]), "counts has shape"),
        (lambda: PackedLayout.from_counts([[1, 2], [3, -1]]), r"counts\[1, 1\] is -1, expected 0 to 2\*\*31 - 1"),
        (lambda: PackedLayout.from_counts([[2**31]]), r"counts\[0, 0\] is 2147483648"),
        (lambda: PackedLayout.from_counts([[2**30], [2**30]]), "counts sum to 2147483648 tokens, expected at most"),
        (lambda: PackedLayout.from_counts(np.zeros((2, 33), int)), "num_modalities is 33, expected 1 to 32"),
        (
            lambda: PackedLayout.from_segments([[(0, (2**22, 2**22, 2**22))]], num_modalities=1),  # 0 in int64
            r"more than 2\*\*31 - 1 tokens at sample 0",
        ),
        (lambda: PackedLayout.from_counts([[1]], special_tokens=(1, 2)), "special_tokens has 2 entries"),
        (lambda: PackedLayout.from_counts([[1]], special_tokens=5), "special_tokens is int, expected a token id or"),
        (lambda: PackedLayout.from_counts([[1]], special_tokens=[True]), r"special_tokens\[0\] is True, expected"),
        (lambda: PackedLayout.from_counts([[1]], special_tokens=(2**31,)), r"special_tokens\[0\] is 2147483648"),
        (lambda: PackedLayout.from_cu_seqlens([0, 2], total_tokens=2, max_seqlen=2), "cu_seqlens is list"),
        (lambda: two_tokens(num_modalities=33), "num_modalities is 33, expected 1 to 32"),
        (lambda: two_tokens(modality_ids=torch.tensor([0, 1]).byte()), "modality_ids has 1, expected 0 to 0"),
        (lambda: two_tokens(modality_ids=torch.zeros(2).byte().to("meta")), "modality_ids is on meta"),
        (
            lambda: PackedLayout.from_cu_seqlens(torch.tensor([0, 2], dtype=torch.int32), total_tokens=3, max_seqlen=2),
            "expected non-decreasing values from 0 to total_tokens 3",
        ),
        (
            lambda: PackedLayout.from_cu_seqlens(torch.tensor([0, 2], dtype=torch.int32), total_tokens=2, max_seqlen=1),
            "max_seqlen is 1, but a sample has 2 tokens",
        ),
        (lambda: two_tokens(total_tokens=2**31), "total_tokens is 2147483648, expected at most 2.*31 - 1"),
        (
            lambda: two_tokens(modality_ids=torch.zeros(2).byte().to_sparse()),
            "modality_ids is torch.sparse_coo, expected",
        ),
        (
            lambda: PackedLayout.from_cu_seqlens(torch.zeros(2).int().to_sparse(), total_tokens=2, max_seqlen=2),
            "cu_seqlens is torch.sparse_coo, expected a strided tensor",
        ),
        (lambda: from_bounds(0, 3, 1, 4), "runs from 0 to 4, expected non-decreasing values from 0 to total_tokens 4"),
        (lambda: from_bounds(1, 2, 4), "cu_seqlens runs from 1 to 4, expected non-decreasing values from 0"),
        (lambda: PackedLayout.from_cu_seqlens(torch.tensor([0, 2]), total_tokens=2, max_seqlen=2), "expected int32"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["cu_seqlens", "modality_ids", "positions", "source_rows", "segment_cu_seqlens"])
def test_a_layout_with_a_tensor_of_another_is_refused(name):
    """Its segments, its twin on the host and what pickle carries would be of the first."""
    layout = PackedLayout.from_counts([[3, 2], [4, 0]])
    for other in (getattr(layout, name).clone(), getattr(layout, name).long(), None):
        with pytest.raises(ValueError, match=f"PackedLayout: {name} was replaced, expected what the layout was built"):
            replace(layout, **{name: other})
    for moved in (layout, copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout)).to("meta")):
        assert not moved.segments.flags.writeable
        with pytest.raises(ValueError, match="PackedLayout: segments was replaced, expected what the layout was built"):
            replace(moved, segments=moved.segments[::-1])  # as many tokens: nothing else would notice
    with pytest.raises(ValueError, match="PackedLayout: total_tokens is 8, expected 9 as modality_ids has"):
        replace(layout, total_tokens=8)
    for moved in (layout.to("meta"), pickle.loads(pickle.dumps(layout))):
        assert replace(moved, cache={}, calls={}).total_tokens == 9
    with torch.inference_mode():
        assert replace(pickle.loads(pickle.dumps(layout)), cache={}).to("meta").total_tokens == 9


def test_a_layout_moves_inside_transforms_and_graphs():
    layout = PackedLayout.from_counts([[3, 2], [4, 0]])

    def moved(x):
        return (x * layout.to("meta").total_tokens).sum()

    x = torch.ones(3)
    assert torch.func.grad(moved)(x).tolist() == [9, 9, 9]
    assert torch.vmap(moved)(x).tolist() == [9, 9, 9]
    assert torch.compile(moved, fullgraph=True, backend="eager")(x) == 27
