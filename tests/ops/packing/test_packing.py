"""pack, unpack, gather_rows, segment_mean: every implementation against the definition, values and gradients."""

import numpy as np
import pytest
import torch

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing import op, reference
from mmkernels.ops.packing.api import gather_rows, pack, segment_mean, unpack
from mmkernels.testing import poisoned_empty

IMPLS = ["reference", "torch"] + (["cpp"] if dispatch.cpp_missing() is None else [])
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Interleaved and repeated modalities, an empty segment, an empty sample, a modality (3) that no sample has.
SAMPLES = [[(0, 3), (1, 5), (0, 2)], [], [(2, 4), (1, 0), (0, 1)], [(1, 7)]]
LAYOUTS = {
    "interleaved": PackedLayout.from_segments(SAMPLES, num_modalities=4),
    "one token": PackedLayout.from_counts([[0, 1]]),
    "no token": PackedLayout.from_segments([[], [(0, 0)]], num_modalities=2),
    "no sample": PackedLayout.from_counts(np.zeros((0, 2), int)),
    # Large enough that threads share the work, with lengths that do not divide it.
    "many": PackedLayout.from_counts(np.random.default_rng(0).integers(0, 90, (64, 3))),
}


def streams_of(layout, width, dtype=torch.float32, requires_grad=False):
    streams = [torch.randn(rows, width, dtype=torch.float32).to(dtype) for rows in layout.stream_lengths]
    return [s.requires_grad_(requires_grad) for s in streams]


def packed_by_index(streams, layout):
    """The definition by the layout's own per-token arrays, which pack itself does not read."""
    rows = [streams[m][r] for m, r in zip(layout.modality_ids.tolist(), layout.source_rows.tolist(), strict=True)]
    return torch.stack(rows) if rows else streams[0].new_zeros((0, streams[0].shape[1]))


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
def test_out_is_written_and_returned(impl):
    layout = LAYOUTS["interleaved"]
    streams = streams_of(layout, 8)
    out = torch.full((layout.total_tokens, 8), torch.nan)
    assert pack(streams, layout, out=out, impl=impl) is out
    assert torch.equal(out, packed_by_index(streams, layout))


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
    exact = reference.segment_mean(packed.double(), layout.segment_cu_seqlens)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_the_adjoints(impl):
    """In float64 by finite differences, and of the gradients too: every operator is linear."""
    layout = LAYOUTS["interleaved"]
    bounds, segments = layout.segment_cu_seqlens, torch.from_numpy(np.array(layout.segments))
    packed = torch.randn(layout.total_tokens, 2, dtype=torch.float64, requires_grad=True)
    streams = [s.double().requires_grad_() for s in streams_of(layout, 2)]
    rows = torch.tensor([3, 0, 3, 21, 3])
    functions = [
        (lambda *s: op.pack(list(s), segments, layout.total_tokens, impl), streams),
        (lambda p: tuple(op.unpack(p, segments, list(layout.stream_lengths), impl)), [packed]),
        (lambda p: op.gather_rows(p, rows, impl), [packed]),
        (lambda p: op.segment_mean(p, bounds, impl), [packed]),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_unused_stream_of_unpack_gets_zeros(impl):
    layout = LAYOUTS["interleaved"]
    packed = torch.randn(layout.total_tokens, 3, requires_grad=True)
    unpack(packed, layout, impl=impl)[1].sum().backward()
    assert torch.equal(packed.grad, (layout.modality_ids == 1).float()[:, None].expand(-1, 3))


@pytest.mark.parametrize("impl", IMPLS[1:])  # the reference shares all that opcheck looks at
def test_opcheck(impl):
    layout = LAYOUTS["interleaved"]
    segments = torch.from_numpy(np.array(layout.segments))
    streams = streams_of(layout, 4, requires_grad=True)
    packed = torch.randn(layout.total_tokens, 4, requires_grad=True)
    rows, out = torch.tensor([1, 1, 9]), torch.zeros(layout.total_tokens, 4)
    detached = [s.detach() for s in streams]
    bounds, lengths, total = layout.segment_cu_seqlens, list(layout.stream_lengths), layout.total_tokens
    calls = {
        "pack": (streams, segments, total, impl),
        "pack_out": (detached, segments, out, impl),
        "unpack": (packed, segments, lengths, impl),
        "gather_rows": (packed, rows, impl),
        "scatter_rows_sum": (torch.randn(3, 4, requires_grad=True), rows, total, impl),
        "segment_mean": (packed, bounds, impl),
        "segment_mean_backward": (torch.randn(layout.num_segments, 4, requires_grad=True), bounds, total, impl),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.mm, name).default, arguments)


def test_compiles_as_one_graph():
    layout = LAYOUTS["interleaved"]
    rows = torch.tensor([2, 2, 8])

    def run(streams):
        packed = pack(streams, layout)
        return (
            gather_rows(packed, rows).sum()
            + segment_mean(packed, layout).square().sum()
            + unpack(packed, layout)[1].sum()
        )

    eager, compiled = streams_of(layout, 4, requires_grad=True), None
    run(eager).backward()
    compiled = [s.detach().clone().requires_grad_() for s in eager]
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.skipif("cpp" not in IMPLS, reason="the extension is not built")
def test_cpp_does_not_depend_on_the_thread_count():
    layout, threads = LAYOUTS["many"], torch.get_num_threads()
    packed = torch.randn(layout.total_tokens, 770).bfloat16()
    rows = torch.randint(layout.total_tokens, (5000,))
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            grad = op.torch.ops.mm.scatter_rows_sum(gather_rows(packed, rows), rows, layout.total_tokens, "cpp")
            results.append((segment_mean(packed, layout, impl="cpp"), grad, *unpack(packed, layout, impl="cpp")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LAYOUT = PackedLayout.from_counts([[2, 1], [1, 3]])
A, B, WHOLE = torch.zeros(3, 4), torch.zeros(4, 4), torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([A], LAYOUT), "pack: got 1 streams, expected 2"),
        (lambda: pack([A, A], LAYOUT), r"pack: stream 1 has shape \[3, 4\], expected \[4, 4\]"),
        (lambda: pack([A, torch.zeros(4, 5)], LAYOUT), r"pack: stream 1 has shape \[4, 5\], expected \[4, 4\]"),
        (lambda: pack([A, B.half()], LAYOUT), "pack: stream 1 is torch.float16 on cpu, expected torch.float32"),
        (lambda: pack([A[0], B], LAYOUT), r"pack: a stream has shape \[4\], expected \[rows, E\]"),
        (lambda: pack([A, None], LAYOUT), r"pack: stream 1 has shape \[0, 4\], expected \[4, 4\]"),
        (lambda: pack([None, None], LAYOUT), "pack: every stream is None"),
        (lambda: pack([A, B], LAYOUT, out=torch.zeros(6, 4)), r"pack: out is torch.float32 \[6, 4\]"),
        (lambda: pack([A, B], LAYOUT, out=torch.zeros(4, 7).T), "pack: out has strides"),
        (lambda: pack([A.clone().requires_grad_(), B], LAYOUT, out=torch.zeros(7, 4)), "out= has no gradient"),
        (lambda: pack([WHOLE[:3], WHOLE[3:]], LAYOUT, out=WHOLE), "pack: out shares memory with stream 0"),
        (lambda: unpack(A, LAYOUT), r"unpack: packed has shape \[3, 4\], expected \[7, E\]"),
        (lambda: segment_mean(A, LAYOUT), r"segment_mean: packed has shape \[3, 4\], expected \[7, E\]"),
        (lambda: segment_mean(torch.zeros(7, 4).long(), LAYOUT), "segment_mean: packed is torch.int64"),
        (lambda: gather_rows(A, torch.tensor([0, 3])), "gather_rows: rows run from 0 to 3, expected 0 to 2"),
        (lambda: gather_rows(A, torch.tensor([-1])), "gather_rows: rows run from -1 to -1, expected 0 to 2"),
        (lambda: gather_rows(A, torch.tensor([0.0])), "gather_rows: rows is torch.float32"),
        (lambda: gather_rows(A[0], torch.tensor([0])), r"gather_rows: packed has shape \[4\]"),
    ],
)
def test_errors_say_who_expected_what(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_special_tokens_are_refused():
    """Their rows lie in a token table that pack does not have."""
    layout = PackedLayout.from_counts([[2, 1]], special_tokens=[None, 101])
    with pytest.raises(ValueError, match=r"pack: segments of modality 1 start with a special token.*modality_embed"):
        pack([torch.zeros(2, 4), torch.zeros(1, 4)], layout)
    with pytest.raises(ValueError, match="unpack: segments of modality 1 start with a special token"):
        unpack(torch.zeros(4, 4), layout)


def test_layouts_from_bounds_have_no_streams():
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    modalities = torch.tensor([0, 1, 0, 1, 1], dtype=torch.uint8)
    layout = PackedLayout.from_cu_seqlens(
        bounds, total_tokens=5, max_seqlen=3, modality_ids=modalities, num_modalities=2
    )
    packed = torch.randn(5, 4)
    for call in (lambda: pack([packed, packed], layout), lambda: unpack(packed, layout)):
        with pytest.raises(ValueError, match="the layout comes from cu_seqlens and does not know its streams"):
            call()
    torch.testing.assert_close(segment_mean(packed, layout), torch.stack([packed[:2].mean(0), packed[2:].mean(0)]))
