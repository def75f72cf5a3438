"""pack, unpack, pad, unpad, gather_rows, segment_mean: every implementation against the definition."""

import pytest
import torch
from ops.packing.packing_cases import FLOATS, IMPLS, LAYOUTS, packed_by_index, padded_by_loop, streams_of

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad
from mmkernels.testing import poisoned_empty


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [1, 7, 300])  # scalar rows, odd bytes, more than one strip of sums
def test_pack_and_unpack_are_the_definition_and_inverse(impl, name, width):
    layout = LAYOUTS[name]
    streams = streams_of(layout, width)
    with poisoned_empty():
        packed = pack(streams, layout, impl=impl)
        back = unpack(packed, layout, impl=impl)
    assert torch.equal(packed, packed_by_index(streams, layout))
    assert all(torch.equal(a, b) for a, b in zip(back, streams, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float64, torch.complex64, *FLOATS])
def test_rows_move_in_any_dtype(impl, dtype):
    layout = LAYOUTS["interleaved"]
    streams = [(s * 100).to(dtype) for s in streams_of(layout, 5)]
    packed = pack(streams, layout, impl=impl)
    assert packed.dtype == dtype
    assert torch.equal(packed, packed_by_index(streams, layout))
    rows = torch.tensor([4, 4, 0])
    assert torch.equal(gather_rows(packed, rows, impl=impl), packed[rows])
    padded, mask = pad(packed, layout, impl=impl)
    assert torch.equal(padded[mask], packed)
    assert not padded[~mask].any()
    assert torch.equal(unpad(padded, layout, impl=impl), packed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64])
def test_rows_move_in_dtypes_that_torch_hardly_knows(impl, dtype):
    layout = LAYOUTS["interleaved"]
    streams = [torch.randint(256, (rows, 8), dtype=torch.uint8) for rows in layout.stream_lengths]
    packed = pack([s.view(dtype) for s in streams], layout, impl=impl)
    assert packed.dtype == dtype
    assert torch.equal(packed.view(torch.uint8), pack(streams, layout))
    padded, _ = pad(packed, layout, impl=impl)
    assert torch.equal(padded.view(torch.uint8), pad(packed.view(torch.uint8), layout)[0])
    assert torch.equal(unpad(padded, layout, impl=impl).view(torch.uint8), packed.view(torch.uint8))
    for stream, back in zip(streams, unpack(packed, layout, impl=impl), strict=True):
        assert torch.equal(back.view(torch.uint8), stream)


@pytest.mark.parametrize("impl", IMPLS)
def test_streams_may_be_views(impl):
    """Columns of a wider tensor (rows lie apart), a transposed tensor (elements lie apart), one row expanded."""
    layout = PackedLayout.from_counts([[3, 2, 2], [1, 4, 2]])
    streams = [torch.randn(4, 20)[:, 6:12], torch.randn(6, 6).T, torch.randn(1, 6).expand(4, 6)]
    packed = pack(streams, layout, impl=impl)
    assert torch.equal(packed, packed_by_index(streams, layout))
    wide = torch.randn(layout.total_tokens, 20)[:, 3:9]
    for ours, theirs in zip(unpack(wide, layout, impl=impl), unpack(wide.contiguous(), layout), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(gather_rows(wide, torch.arange(3), impl=impl), wide[:3])
    torch.testing.assert_close(segment_mean(wide, layout, impl=impl), segment_mean(wide.contiguous(), layout))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [1, 7, 300])
def test_pad_and_unpad_are_the_definition_and_inverse(impl, name, width):
    layout = LAYOUTS[name]
    packed = torch.randn(layout.total_tokens, width)
    for length in (None, layout.max_seqlen + 3):
        with poisoned_empty():
            padded, mask = pad(packed, layout, length=length, impl=impl)
            back = unpad(padded, layout, impl=impl)
        expected, seen = padded_by_loop(packed, layout, length or layout.max_seqlen)
        assert torch.equal(padded, expected)
        assert torch.equal(mask, seen)
        assert torch.equal(back, packed)


@pytest.mark.parametrize("impl", IMPLS)
def test_unpad_reads_any_strides_and_nothing_beyond_a_sample(impl):
    layout = LAYOUTS["interleaved"]
    packed = torch.randn(layout.total_tokens, 6)
    padded, mask = pad(packed, layout, length=20)
    padded[~mask] = torch.nan
    apart = torch.randn(4, 30, 9)
    apart[:, :20, 2:8] = padded
    for view in (apart[:, :20, 2:8], padded.transpose(0, 1).contiguous().transpose(0, 1), padded.mT.contiguous().mT):
        assert torch.equal(unpad(view, layout, impl=impl), packed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_out_is_written_and_returned(impl, name):
    """NaN before: whatever a call leaves out shows."""
    layout = LAYOUTS[name]
    streams = streams_of(layout, 8)
    packed, rows = packed_by_index(streams, layout), torch.arange(layout.total_tokens).flip(0)
    padded, mask = pad(packed, layout, impl="reference")

    def blank(like):
        return torch.full_like(like, torch.nan) if like.is_floating_point() else ~like

    calls = [
        (lambda out: pack(streams, layout, out=out, impl=impl), packed),
        (lambda out: unpack(packed, layout, out=out, impl=impl), streams),
        (lambda out: pad(packed, layout, out=out, impl=impl), (padded, mask)),
        (lambda out: unpad(padded, layout, out=out, impl=impl), packed),
        (lambda out: gather_rows(packed, rows, out=out, impl=impl), packed.flip(0)),
        (lambda out: segment_mean(packed, layout, out=out, impl=impl), segment_mean(packed, layout, impl=impl)),
    ]
    for call, expected in calls:
        many = not isinstance(expected, torch.Tensor)
        out = [blank(e) for e in expected] if many else blank(expected)
        returned = call(out)
        assert len(returned) == len(out)
        for given, got, wanted in zip(
            *((out, returned, expected) if many else ([out], [returned], [expected])), strict=True
        ):
            assert got is given
            assert torch.equal(got, wanted)


def test_a_missing_modality_may_be_none():
    layout = PackedLayout.from_counts([[2, 0], [1, 0]])
    stream = torch.randn(3, 4)
    assert torch.equal(pack([stream, None], layout), stream)
    assert [tuple(s.shape) for s in unpack(stream, layout)] == [(3, 4), (0, 4)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["interleaved", "many", "no token"])
def test_segment_mean(impl, dtype, name):
    """Against float64, within one rounding of the dtype; an empty segment gives 0, not NaN."""
    layout = LAYOUTS[name]
    packed = torch.randn(layout.total_tokens, 300).to(dtype)
    with poisoned_empty():
        means = segment_mean(packed, layout, impl=impl)
    exact = segment_mean(packed.double(), layout, impl="reference")
    assert means.dtype == dtype
    torch.testing.assert_close(means.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_gather_rows_gradient_sums_repeats_in_fp32(impl, dtype, index):
    """A row gathered 300 times: summed in bf16 itself, the gradient would stall at 256."""
    rows = torch.cat([torch.full((300,), 2), torch.tensor([0, 5, 0])]).to(index)
    packed = torch.randn(6, 9).to(dtype).requires_grad_()
    with poisoned_empty():
        out = gather_rows(packed, rows, impl=impl)
        out.backward(torch.ones_like(out))
    counts = torch.tensor([2.0, 0, 300, 0, 0, 1]).to(dtype)
    assert torch.equal(packed.grad, counts[:, None].expand(6, 9))


@pytest.mark.parametrize("impl", IMPLS)
def test_gather_no_rows(impl):
    packed = torch.randn(6, 9, requires_grad=True)
    gather_rows(packed, torch.zeros(0, dtype=torch.long), impl=impl).sum().backward()
    assert torch.equal(packed.grad, torch.zeros(6, 9))
