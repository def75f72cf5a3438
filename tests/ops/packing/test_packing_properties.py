"""Properties of packing over drawn layouts: every row once, inverses bit-equal, whatever the threads and the widths."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops.packing.packing_cases import IMPLS

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad

SEGMENT = st.tuples(st.integers(0, 3), st.integers(0, 9))
LAYOUT = st.lists(st.lists(SEGMENT, max_size=4), max_size=6)  # empty samples, empty segments, missing modalities
LONGER = st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 90)), max_size=3), max_size=20)
WIDTH = st.sampled_from([1, 3, 16, 129, 1024])  # below and above what is copied by vectors
DTYPE = st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint16])
NATIVE = [impl for impl in IMPLS if impl not in ("torch", "reference")]


def numbered(layout, width, dtype):
    """Streams whose rows all differ, as bytes; in any dtype, whose bits are all that matters."""
    total, streams = 0, []
    for rows in layout.stream_lengths:
        ids = torch.arange(total, total + rows, dtype=torch.int32)
        row = (
            ids.view(torch.uint8).view(rows, 4).repeat(1, -(-width * dtype.itemsize // 4))[:, : width * dtype.itemsize]
        )
        streams.append(row.contiguous().view(dtype))
        total += rows
    return streams


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(LAYOUT, WIDTH, DTYPE)
@pytest.mark.parametrize("impl", NATIVE)
def test_every_row_lands_once_and_comes_back(impl, samples, width, dtype):
    layout = PackedLayout.from_segments(samples, num_modalities=4)
    streams = numbered(layout, width, dtype)
    packed = pack(streams, layout, impl=impl)
    source = [(m, int(row)) for m, row in zip(layout.modality_ids.tolist(), layout.source_rows.tolist(), strict=True)]
    assert sorted(source) == [(m, row) for m, rows in enumerate(layout.stream_lengths) for row in range(rows)]
    for token, (m, row) in enumerate(source):
        assert torch.equal(bits(packed[token]), bits(streams[m][row]))
    for back, stream in zip(unpack(packed, layout, impl=impl), streams, strict=True):
        assert torch.equal(bits(back), bits(stream))
    padded, mask = pad(packed, layout, length=layout.max_seqlen + 2, impl=impl)
    assert int(mask.sum()) == layout.total_tokens
    assert not bits(padded)[~mask].any()
    assert torch.equal(bits(unpad(padded, layout, impl=impl)), bits(packed))
    rows = torch.randperm(layout.total_tokens)
    assert torch.equal(bits(gather_rows(gather_rows(packed, rows, impl=impl), rows.argsort(), impl=impl)), bits(packed))


@settings(max_examples=15, deadline=None)
@example([[(0, 60), (1, 45), (2, 30)]] * 64, 770)
@given(LONGER, st.integers(1, 600))
@pytest.mark.parametrize("impl", NATIVE)
def test_nothing_depends_on_the_thread_count(impl, samples, width):
    """Large enough for several tasks; gradients too, since their sums could be split anywhere."""
    layout, threads = PackedLayout.from_segments(samples, num_modalities=3), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            packed = torch.randn(layout.total_tokens, width).bfloat16().requires_grad_()
            rows = torch.randint(max(layout.total_tokens, 1), (layout.total_tokens,))
            outputs = [gather_rows(packed, rows, impl=impl), segment_mean(packed, layout, impl=impl)]
            outputs += [*pad(packed, layout, impl=impl), *unpack(packed, layout, impl=impl)]
            gradients = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), packed)
            results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", NATIVE)
def test_large_calls_stream_past_the_cache_and_change_nothing(impl):
    """20 MB and odd row lengths: heads, cache lines and tails of runs; outputs off a cache line too."""
    layout = PackedLayout.from_counts([[3, 700], [1501, 0], [0, 4], [900, 2300]])
    for width in (3701, 4096):
        streams = [torch.randint(0, 255, (rows, width), dtype=torch.uint8) for rows in layout.stream_lengths]
        expected = pack(streams, layout, impl="reference")
        memory = torch.zeros(layout.total_tokens * width + 13, dtype=torch.uint8)
        out = memory[13:].view(layout.total_tokens, width)
        assert torch.equal(pack(streams, layout, out=out, impl=impl), expected)
        assert not memory[:13].any()
        padded, mask = torch.full((4, 3200, width), 9, dtype=torch.uint8), torch.zeros(4, 3200, dtype=torch.bool)
        pad(expected, layout, length=3200, out=(padded, mask), impl=impl)
        assert torch.equal(padded[mask], expected)
        assert not padded[~mask].any()
        rows = torch.randperm(layout.total_tokens)
        assert torch.equal(gather_rows(expected, rows, out=torch.empty_like(expected), impl=impl), expected[rows])


@pytest.mark.extended
@pytest.mark.parametrize("impl", NATIVE)
def test_more_than_two_gigabytes(impl):
    """Row numbers times row bytes pass 2**31: 32-bit arithmetic would wrap.  About 9 GB of memory."""
    rows, width = 530_000, 4096
    layout = PackedLayout.from_counts([[rows // 2, 7], [rows - rows // 2, 5]])
    streams = [torch.zeros(n, width, dtype=torch.uint8) for n in layout.stream_lengths]
    for stream in streams:
        stream[:, 0] = torch.arange(len(stream)) % 251
        stream[:, -1] = torch.arange(len(stream)) % 241
    packed = pack(streams, layout, impl=impl)
    assert packed.numel() > 2**31
    ends = packed[:, [0, -1]]
    where = layout.source_rows.long()
    assert torch.equal(ends[:, 0].long(), where % 251)
    assert torch.equal(ends[:, 1].long(), where % 241)
    for back, stream in zip(unpack(packed, layout, impl=impl), streams, strict=True):
        assert torch.equal(back[:, 0], stream[:, 0])
        assert torch.equal(back[-1], stream[-1])
    del streams, back, stream
    last = torch.tensor([layout.total_tokens - 1, 0])
    assert torch.equal(gather_rows(packed, last, impl=impl), packed[last])
    padded, mask = pad(packed, layout, impl=impl)
    assert padded.numel() > 2**31
    assert torch.equal(padded[1, int(mask[1].sum()) - 1], packed[-1])
    assert torch.equal(unpad(padded, layout, impl=impl)[-1], packed[-1])
