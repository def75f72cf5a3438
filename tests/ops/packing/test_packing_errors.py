"""What the packing operators refuse, and the words for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ops.packing.packing_cases import IMPLS
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels.layout import PackedLayout
from mmkernels.masks import MaskPlan
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad

LAYOUT = PackedLayout.from_counts([[2, 1], [1, 3]])
A, B, WHOLE, SPARE = torch.zeros(3, 4), torch.zeros(4, 4), torch.zeros(7, 4), torch.zeros(7, 4)
ROWS_OF_ONE = PackedLayout.from_counts([[1]] * 3)
PADDED, ROW = torch.zeros(2, 4, 4), torch.tensor([0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [[0, 3], [-1]])
def test_a_row_out_of_range_is_named_by_every_implementation(impl, rows):
    with pytest.raises(ValueError, match=r"gather_rows: rows run from .* expected 0 to 2"):
        gather_rows(A, torch.tensor(rows), impl=impl)


@pytest.mark.parametrize("impl", ["fast", ["cpp"]])
def test_an_unknown_implementation_is_named_with_the_function(impl):
    for function, arguments in ((pack, ([A, B], LAYOUT)), (pad, (WHOLE, LAYOUT)), (gather_rows, (A, ROW))):
        with pytest.raises(ValueError, match=f"^{function.__name__}: impl is .*, expected one of auto, reference"):
            function(*arguments, impl=impl)


@pytest.mark.parametrize("length", [np.array(5), np.int32(5), torch.tensor(5)], ids=repr)
def test_a_length_may_be_an_array_of_one_number(length):
    assert pad(WHOLE, LAYOUT, length=length)[0].shape == (2, 5, 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_memory_is_named_by_every_implementation(impl):
    with pytest.raises(ValueError, match="pack: out shares memory with stream 1"):
        pack([A, WHOLE[3:]], LAYOUT, out=WHOLE, impl=impl)
    rows = torch.zeros(6, dtype=torch.int64)  # written before they are read, the values of `packed` would be rows
    with pytest.raises(ValueError, match="gather_rows: out shares memory with rows"):
        gather_rows(torch.full((1, 2), 1 << 40), rows[:3], out=rows.view(3, 2), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 100_000])  # a view no longer begins at address 0
def test_a_storage_that_was_freed_is_named_not_read(impl, rows):
    freed = torch.zeros(7 + rows, 4)[rows:]
    freed.untyped_storage().resize_(0)
    calls = (
        lambda: unpack(freed, LAYOUT, impl=impl),
        lambda: pad(freed, LAYOUT, impl=impl),
        lambda: gather_rows(freed, ROW, impl=impl),
        lambda: segment_mean(freed, LAYOUT, impl=impl),
        lambda: gather_rows(WHOLE, torch.arange(7), out=freed, impl=impl),
    )
    for call in calls:
        with pytest.raises(ValueError, match="lies in a storage of 0 bytes, expected "):
            call()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_be_zeros_without_memory_or_a_negated_view(impl):
    packed, rows = torch.randn(7, 4), torch.tensor([3, 0, 3])
    for odd, plain in (
        (torch._efficientzerotensor(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        (torch._neg_view(-rows), rows),
    ):
        leaf = packed.clone().requires_grad_()
        found = gather_rows(leaf, odd, impl=impl)
        assert torch.equal(found, packed[plain])
        expected = torch.zeros(7, 4).index_add_(0, plain, torch.ones(3, 4))
        assert torch.equal(torch.autograd.grad(found.sum(), leaf)[0], expected)
        assert torch.equal(gather_rows(packed, odd, impl=impl), packed[plain])


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def _inference(t):
    with torch.inference_mode():
        return t.clone()


ODD = {
    "quantized, torch.qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "UninitializedParameter": lambda t: torch.nn.UninitializedParameter(),
    "Refusing, which does not": lambda t: t.as_subclass(Refusing),
    "a fake tensor": lambda t: FakeTensorMode().from_tensor(t),
}
NOT_WRITTEN = {
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "made under inference mode": _inference,
}


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("odd", [*ODD, *NOT_WRITTEN])
def test_what_holds_no_plain_numbers_is_named(impl, odd):
    calls = [
        ("out", lambda t: gather_rows(WHOLE, torch.arange(7), out=t, impl=impl)),
        ("out", lambda t: pack([A, B], LAYOUT, out=t, impl=impl)),
    ]
    if odd in ODD:
        calls += [
            ("packed", lambda t: unpack(t, LAYOUT, impl=impl)),
            ("packed", lambda t: gather_rows(t, ROW, impl=impl)),
            ("packed", lambda t: segment_mean(t, LAYOUT, impl=impl)),
            ("stream 0", lambda t: pack([t, B], LAYOUT, impl=impl)),
        ]
    if odd == "made under inference mode" and (impl == "cpp" or (impl == "auto" and "cpp" in IMPLS)):
        for fresh in (True, False):  # C++ may write there, whether it met the layout or not
            out = _inference(torch.ones(7, 4))
            layout = PackedLayout.from_counts([[2, 1], [1, 3]]) if fresh else LAYOUT
            assert pack([A, B], layout, out=out, impl=impl) is out
            assert torch.equal(out, pack([A, B], layout, impl="reference"))
        return
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^[a-z_]+: {name} is {odd}"):
            call((ODD | NOT_WRITTEN)[odd](torch.ones(7, 4)))


@pytest.mark.parametrize(("impl", "dtype"), [*zip(IMPLS, ("uint4", "uint4", "bits8"), strict=False)])
def test_a_dtype_without_a_kernel_is_named(impl, dtype):
    with pytest.raises(NotImplementedError, match=f"pad: impl='{impl}' has no kernel for torch.{dtype}"):
        pad(torch.empty(7, 4, dtype=getattr(torch, dtype)), LAYOUT, impl=impl)


def test_a_dtype_that_has_kernels_is_not_blamed_for_another():
    with pytest.raises(NotImplementedError) as raised:
        torch.ops.mm.segment_mean(WHOLE, torch.tensor([0, 3, 7], dtype=torch.uint32), "torch")
    assert "no kernel for torch.float32" not in str(raised.value)


# The end, a start, and a sample whose length passes int32 while the ends are right.
@pytest.mark.parametrize(("at", "bound"), [(-1, 2**30), (0, -1), (1, 2**31 - 1), (1, -(2**31)), (1, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_that_were_written_over_are_not_followed(impl, at, bound):
    layout = PackedLayout.from_counts([[2, 1], [1, 3]])
    layout.cu_seqlens[at] = bound
    layout.segment_cu_seqlens[at] = 9 if bound == 0 else bound
    calls = [
        lambda: segment_mean(WHOLE, layout, impl=impl),
        lambda: pad(WHOLE, layout, impl=impl),
        lambda: unpad(PADDED, layout, impl=impl),
        lambda: unpad(PADDED, layout, out=SPARE, impl=impl),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"the layout's bounds are torch\.int32"):
            call()
    with pytest.raises(ValueError, match=r"MaskPlan: (max_seqlen|cu_seqlens|segment_cu_seqlens) "):
        MaskPlan.lower(layout)


def test_segments_of_other_tokens_are_named():
    layout = PackedLayout.from_counts([[2, 1], [1, 3]])
    edited = [
        (layout.segments[:-1], "hold 4 tokens, the shortest 0, expected 7, the shortest at least 0"),
        (layout.segments * [1, 1, -1, 1], "hold -7 tokens, the shortest -3, expected 7"),
        (layout.segments * [1, 7, 1, 1], "have modalities from 0 to 7, expected 0 to 1"),
    ]
    for segments, message in edited:
        other = replace(layout, cache={})
        object.__setattr__(other, "segments", segments)  # past what replace refuses
        for impl in IMPLS:
            with pytest.raises(ValueError, match=f"pack: the layout's segments {message}"):
                pack([A, B], other, impl=impl)
            with pytest.raises(ValueError, match=f"unpack: the layout's segments {message}"):
                unpack(WHOLE, other, impl=impl)


def test_rows_that_were_written_over_lose_no_token():
    layout = PackedLayout.from_counts([[2, 1], [1, 3]])
    layout.source_rows[0] = 1  # twice then, and row 0 never; the others read the table of segments
    for call in (lambda: pack([A, B], layout, impl="torch"), lambda: unpack(WHOLE, layout, impl="torch")):
        with pytest.raises((RuntimeError, IndexError)):
            call()


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
        (lambda: unpack(WHOLE, LAYOUT, out=[A]), "unpack: out has 1 tensors, expected 2"),
        (lambda: unpack(WHOLE, LAYOUT, out=[A, A]), r"unpack: out\[1\] is torch.float32 \[3, 4\] on cpu, expected"),
        (lambda: unpack(WHOLE, LAYOUT, out=[WHOLE[:3], B]), "unpack: out shares memory with the input"),
        (lambda: unpack(WHOLE, LAYOUT, out=[SPARE[:3], SPARE[2:6]]), "unpack: the outputs share memory"),
        (lambda: pad(WHOLE, LAYOUT, length=3), "pad: length is 3, expected a whole number from 4"),
        (lambda: pad(WHOLE, LAYOUT, length=7.0), "pad: length is 7.0, expected a whole number from 4"),
        (lambda: pad(A, ROWS_OF_ONE, length=True), "pad: length is True, expected a whole number"),
        (lambda: pad(WHOLE, LAYOUT, length="7"), "pad: length is '7', expected a whole number"),
        (lambda: pad(WHOLE, LAYOUT, out=5), "pad: out is int, expected two tensors"),
        (lambda: pad(WHOLE, LAYOUT, out=(PADDED, None)), r"pad: out\[1\] is NoneType, expected a tensor"),
        (lambda: unpack(WHOLE, LAYOUT, out=5), "unpack: out is int, expected a list of tensors"),
        (lambda: pack([A, B], LAYOUT, out=[WHOLE]), "pack: out is list, expected a tensor"),
        (lambda: pack(None, LAYOUT), "pack: streams is NoneType, expected a list of tensors"),
        (lambda: pad(WHOLE, LAYOUT, out=(WHOLE, B)), r"pad: out\[0\] is torch.float32 \[7, 4\] on cpu, expected"),
        (lambda: pad(WHOLE, LAYOUT, out=(PADDED, PADDED[..., 0])), r"pad: out\[1\] is torch.float32 \[2, 4\] on cpu"),
        (
            lambda: unpad(PADDED[:1], LAYOUT),
            r"unpad: padded has shape \[1, 4, 4\], expected \[2, L, E\]",
        ),
        (lambda: unpad(PADDED[:, :3], LAYOUT), r"unpad: padded has shape \[2, 3, 4\], expected"),
        (lambda: unpad(PADDED, LAYOUT, out=PADDED.view(8, 4)[:7]), "unpad: out shares memory with the input"),
        (
            lambda: gather_rows(A, ROW, out=A),
            r"gather_rows: out is torch.float32 \[3, 4\] on cpu, expected .* \[1, 4\]",
        ),
        (lambda: gather_rows(A, ROW, out=A[1:2]), "gather_rows: out shares memory with the input"),
        (lambda: segment_mean(WHOLE, LAYOUT, out=WHOLE[:4]), "segment_mean: out shares memory with the input"),
        (lambda: unpack(A, LAYOUT), r"unpack: packed has shape \[3, 4\], expected \[7, E\]"),
        (lambda: segment_mean(A, LAYOUT), r"segment_mean: packed has shape \[3, 4\], expected \[7, E\]"),
        (lambda: segment_mean(torch.zeros(7, 4).long(), LAYOUT), "segment_mean: packed is torch.int64"),
        (lambda: gather_rows(A, torch.tensor([0, 3])), "gather_rows: rows run from 0 to 3, expected 0 to 2"),
        (lambda: gather_rows(A, torch.tensor([-1])), "gather_rows: rows run from -1 to -1, expected 0 to 2"),
        (lambda: gather_rows(A, torch.tensor([0.0])), "gather_rows: rows is torch.float32"),
        (lambda: gather_rows(A[0], torch.tensor([0])), r"gather_rows: packed has shape \[4\]"),
        (lambda: gather_rows(A, np.zeros(1, np.int64)), "gather_rows: rows is ndarray, expected a tensor"),
        (lambda: pack([A.numpy(), B], LAYOUT), "pack: stream 0 is ndarray, expected a tensor or None"),
        (lambda: unpad(PADDED.numpy(), LAYOUT), "unpad: padded is ndarray, expected a tensor"),
        (lambda: pack([A, B], None), "pack: layout is NoneType, expected PackedLayout"),
        (lambda: unpack(WHOLE, ROW), "unpack: layout is Tensor, expected PackedLayout"),
        (lambda: pad(WHOLE, None), "pad: layout is NoneType, expected PackedLayout"),
        (lambda: unpad(PADDED, None), "unpad: layout is NoneType, expected PackedLayout"),
        (
            lambda: pad(WHOLE, LAYOUT, length=2**31),
            "pad: length is 2147483648, expected a whole number from 4, .* to 2147",
        ),
        (lambda: pad(WHOLE, LAYOUT, length=2**70), "pad: length is 1180591620717411303424, expected"),
        (lambda: pack([A, B], LAYOUT, impl=["cpp"]), r"pack: impl is \['cpp'\], expected one of"),
        (lambda: segment_mean(WHOLE, None), "segment_mean: layout is NoneType, expected PackedLayout"),
        (lambda: pack([A, B.to_sparse()], LAYOUT), "pack: stream 1 is torch.sparse_coo, expected a strided tensor"),
        (lambda: pack([torch.nested.nested_tensor([A]), B], LAYOUT), "pack: stream 0 is nested, expected a strided"),
        (lambda: unpack(WHOLE.to_sparse(), LAYOUT), "unpack: packed is torch.sparse_coo, expected a strided tensor"),
        (lambda: unpad(torch.nested.nested_tensor([A, B]), LAYOUT), "unpad: padded is nested, expected a strided"),
        (lambda: gather_rows(A.to_sparse(), ROW), "gather_rows: packed is torch.sparse_coo, expected a strided"),
    ],
)
def test_errors_say_who_expected_what(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_any_iterable_of_streams_will_do():
    assert torch.equal(pack((s for s in (A, B)), LAYOUT), pack([A, B], LAYOUT))


def test_complex_rows_that_learn_are_gathered_where_nobody_records():
    packed = torch.randn(3, 2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match=r"gather_rows: packed is torch.complex64, its gradient needs"):
        gather_rows(packed, ROW)
    with torch.no_grad():
        assert torch.equal(gather_rows(packed, ROW), packed[ROW])


def test_a_layout_made_and_met_under_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        layout = PackedLayout.from_counts([[2, 1], [1, 3]])
        assert torch.equal(pack([A, B], layout), pack([A, B], LAYOUT))
    streams = [x.clone().requires_grad_() for x in (A, B)]
    pack(streams, layout).sum().backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in streams)


def test_special_tokens_are_refused():
    """Their rows lie in a token table that pack does not have."""
    layout = PackedLayout.from_counts([[2, 1]], special_tokens=[None, 101])
    with pytest.raises(ValueError, match=r"pack: segments of modality 1 start with a special token.*modality_embed"):
        pack([torch.zeros(2, 4), torch.zeros(1, 4)], layout)
    with pytest.raises(ValueError, match="unpack: segments of modality 1 start with a special token"):
        unpack(torch.zeros(4, 4), layout)


def test_layouts_without_a_segment_table_serve_what_needs_none():
    """As a layout from bounds on a GPU: its streams are not known, its samples are."""
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    layout = PackedLayout._from_device_bounds(bounds, 5, 3, torch.zeros(5, dtype=torch.uint8), 1)
    packed = torch.randn(5, 4)
    for call in (lambda: pack([packed], layout), lambda: unpack(packed, layout)):
        with pytest.raises(ValueError, match="the layout comes from cu_seqlens and does not know its streams"):
            call()
    torch.testing.assert_close(segment_mean(packed, layout), torch.stack([packed[:2].mean(0), packed[2:].mean(0)]))
    several = PackedLayout._from_device_bounds(bounds, 5, 3, torch.tensor([0, 1, 1, 0, 0], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"segment_mean: .* several modalities and does not know its segments"):
        segment_mean(packed, several)
    assert torch.equal(unpad(pad(packed, layout)[0], layout), packed)


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("gather_rows", lambda real, meta: (real(3, 4), meta(2).long()), "rows is on meta, packed on cpu"),
        ("gather_rows_out", lambda real, meta: (real(3, 4), real(2).long(), meta(2, 4)), "out is on meta, packed on"),
        ("pad", lambda real, meta: (meta(3, 4), real(2).int(), 3), "bounds is on cpu, packed on meta"),
        (
            "pack",
            lambda real, meta: ([real(1, 4), meta(2, 4)], real(2, 4).int(), real(3).byte(), real(3).int(), 3),
            "streams is on meta, streams on cpu",
        ),
        (
            "unpack_out",
            lambda real, meta: (real(3, 4), meta(1, 4).int(), real(3).byte(), real(3).int(), [real(3, 4)]),
            "segments is on meta, packed on cpu",
        ),
    ],
)
def test_operators_refuse_meta_tensors_beside_real_ones(operator, arguments, message):
    """Torch sends such a call to the function of shapes: what it returned, or was given, nobody had written."""
    given = arguments(torch.zeros, lambda *shape: torch.zeros(shape, device="meta"))
    with pytest.raises(ValueError, match=f"mm::{operator}: {message}"):
        getattr(torch.ops.mm, operator)(*given, "torch")
