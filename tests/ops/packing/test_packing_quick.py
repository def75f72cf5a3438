"""The way past the dispatcher: that plain calls take it, and that everything else does not."""

import gc
import sys

import pytest
import torch
from ops.packing.packing_cases import IMPLS, LAYOUTS, packed_by_index, streams_of
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing import op, quick
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad

pytestmark = pytest.mark.skipif("cpp" not in IMPLS, reason="the extension is not built")

LAYOUT = LAYOUTS["interleaved"]
ROWS = torch.tensor([3, 1, 1])
NAMES = ("pack", "unpack", "pad", "unpad", "gather_rows", "segment_mean")


def calls(width=4, dtype=torch.float32):
    """Each operator as (a call with out or without, what it gives)."""
    streams = streams_of(LAYOUT, width, dtype)
    packed = packed_by_index(streams, LAYOUT)
    padded, mask = pad(packed, LAYOUT, impl="reference")
    return {
        "pack": (lambda out=None: pack(streams, LAYOUT, out=out), packed),
        "unpack": (lambda out=None: unpack(packed, LAYOUT, out=out), streams),
        "pad": (lambda out=None: pad(packed, LAYOUT, out=out), (padded, mask)),
        "unpad": (lambda out=None: unpad(padded, LAYOUT, out=out), packed),
        "gather_rows": (lambda out=None: gather_rows(packed, ROWS, out=out), packed[ROWS]),
        "segment_mean": (
            lambda out=None: segment_mean(packed, LAYOUT, out=out),
            segment_mean(packed, LAYOUT, impl="reference"),
        ),
    }


def like(result):
    """Memory of its own in the form of a result."""
    if isinstance(result, torch.Tensor):
        return torch.full_like(result, 9)
    return type(result)(map(like, result))


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.fixture
def long_way(monkeypatch):
    """The names of the operators that went on to the contract."""
    taken = []

    def watched(name, whole):
        return lambda *args, **kwargs: (taken.append(name), whole(*args, **kwargs))[1]

    for name in NAMES:
        monkeypatch.setattr(op, name, watched(name, getattr(op, name)))
    return taken


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_calls_take_it(name, dtype, long_way):
    call, expected = calls(dtype=dtype)[name]
    call()  # makes the layout's segment table
    long_way.clear()
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            fresh = call()
            given = like(expected)
            written = call(given)
        assert len(tensors(fresh)) == len(tensors(given))
        for made, target, returned, wanted in zip(*map(tensors, (fresh, given, written, expected)), strict=True):
            torch.testing.assert_close(made, wanted)
            assert torch.equal(target, made)
            assert returned is target
            assert not made.requires_grad
    assert long_way == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_or_lost(name):
    """References of what is passed, returned and refused, over many calls."""
    calls()["pack"][0]()
    streams = streams_of(LAYOUT, 4)
    packed, wide = packed_by_index(streams, LAYOUT), torch.zeros(LAYOUT.total_tokens, 5)
    table, bounds = LAYOUT.cache["quick_segments"], LAYOUT.cu_seqlens
    padded, mask = pad(packed, LAYOUT, length=10)
    bad = [streams[0], streams[1], None, streams[3]]
    arguments = {
        "pack": [(streams, table, None), (streams, table, packed.clone()), (bad, table, None), (streams, table, wide)],
        "unpack": [(packed, table, None), (packed, table, [s.clone() for s in streams]), (packed, table, streams[:2])],
        "pad": [(packed, bounds, 10, None), (packed, bounds, 10, (padded, mask)), (packed, bounds, 1, None)],
        "unpad": [(padded, bounds, len(packed), None), (padded, bounds, 3, None)],
        "gather_rows": [(packed, ROWS, None), (packed, ROWS, packed[:3].clone()), (packed, ROWS + 100, None)],
        "segment_mean": [(packed, LAYOUT.segment_cu_seqlens, None), (packed, bounds, wide)],
    }[name]
    function = getattr(quick, name)
    for args in arguments:
        function(*args)
        watched = [None, True, torch.float32, torch.bool, table, bounds, packed, padded, mask, *streams, wide]
        watched += [x for arg in args if isinstance(arg, tuple | list) for x in [arg, *arg]]
        gc.collect()
        before = [sys.getrefcount(x) for x in watched]
        for _ in range(50):
            function(*args)
        after = [sys.getrefcount(x) for x in watched]
        assert all(abs(a - b) < 25 for a, b in zip(after, before, strict=True)), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_whoever_looks_on_sees_the_operators():
    """A dispatch mode, a tracer of graphs, torch.jit.trace and the profiler."""
    call, expected = calls()["pack"]
    call()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(call(), expected)
    assert any("pack" in name for name in seen)
    packed = torch.randn(LAYOUT.total_tokens, 4)
    graph = make_fx(lambda p: gather_rows(p, ROWS))(packed)
    assert torch.equal(graph(packed + 1), packed[ROWS] + 1)
    traced = torch.jit.trace(lambda p: segment_mean(p, LAYOUT), packed, check_trace=False)
    torch.testing.assert_close(traced(packed + 1), segment_mean(packed + 1, LAYOUT))
    with torch.profiler.profile() as profile:
        unpack(packed, LAYOUT)
    assert any("unpack" in event.name for event in profile.events())


def test_transforms_go_the_long_way(long_way):
    """Inside torch.func every tensor that looks plain may be a wrapper of another one, or meant for one."""
    packed = torch.randn(LAYOUT.total_tokens, 4)
    torch.func.grad(lambda p: gather_rows(p, ROWS).sum())(packed)
    torch.vmap(lambda p: p.sum() + gather_rows(packed, ROWS).sum())(packed)
    with forward_ad.dual_level():
        gather_rows(packed, ROWS)
    assert long_way == ["gather_rows"] * 3


def test_subclasses_go_the_long_way(long_way):
    class Mine(torch.Tensor):
        pass

    packed = torch.randn(LAYOUT.total_tokens, 4)
    assert torch.equal(gather_rows(packed.as_subclass(Mine), ROWS).as_subclass(torch.Tensor), packed[ROWS])
    assert long_way == ["gather_rows"]


def test_negated_views_are_averaged_and_indexed_as_what_they_are_and_not_written():
    packed = torch.randn(LAYOUT.total_tokens, 4)
    negated = torch._neg_view(packed)
    torch.testing.assert_close(segment_mean(negated, LAYOUT), segment_mean(-packed, LAYOUT))
    assert torch.equal(gather_rows(packed, torch._neg_view(-ROWS)), packed[ROWS])
    for dtype, view in ((torch.float32, torch._neg_view), (torch.complex64, torch.conj)):
        with pytest.raises(ValueError, match="gather_rows: out is a negated or conjugate view"):
            gather_rows(packed.to(dtype), ROWS, out=view(torch.empty(len(ROWS), 4, dtype=dtype)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "segment_mean"])  # which takes no complex numbers
def test_conjugate_and_negated_views_are_resolved(name):
    """Their memory holds other numbers than they do."""
    number = torch.randn(LAYOUT.total_tokens, 4, dtype=torch.complex64)
    imaginary = number.conj().imag
    whole_rows = imaginary.as_strided((LAYOUT.total_tokens, 3), (8, 1))  # as nothing else makes them
    for view in (number.conj(), imaginary, imaginary[:, :1], whole_rows):
        whole = view.clone().resolve_conj().resolve_neg()
        if name == "pack":
            halves = PackedLayout.from_counts([[LAYOUT.total_tokens]])
            pack([whole], halves)
            assert torch.equal(pack([view], halves), whole)
        elif name == "unpad":
            one = PackedLayout.from_counts([[LAYOUT.total_tokens]])
            assert torch.equal(unpad(view[None], one), whole)
        else:
            call = {
                "unpack": lambda x: unpack(x, LAYOUT)[0],
                "pad": lambda x: pad(x, LAYOUT)[0],
                "gather_rows": lambda x: gather_rows(x, ROWS),
            }[name]
            assert torch.equal(call(view), call(whole))


def test_tensors_that_lie_nowhere_go_the_long_way(long_way):
    """Zeros that torch has not written yet: their address is null."""
    nothing = torch._efficientzerotensor((LAYOUT.total_tokens, 4))
    assert not gather_rows(nothing, ROWS).any()
    assert not segment_mean(nothing, LAYOUT).any()
    assert not pad(nothing, LAYOUT)[0].any()
    assert long_way == ["gather_rows", "segment_mean", "pad"]


def test_a_mean_of_complex_numbers_is_refused():
    with pytest.raises(ValueError, match=r"segment_mean: packed is torch.complex64, expected float32"):
        segment_mean(torch.randn(LAYOUT.total_tokens, 4, dtype=torch.complex64), LAYOUT)


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_notices_that_out_was_written(impl):
    """It saved the old values of `out`; without the version it would use the new ones, and say nothing."""
    factor = torch.randn(LAYOUT.total_tokens, 4, requires_grad=True)
    streams = streams_of(LAYOUT, 4)
    out = pack(streams, LAYOUT)
    product = (factor * out).sum()
    pack([s + 1 for s in streams], LAYOUT, out=out, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    for call, expected in calls().values():
        out = like(expected)
        before = [o._version for o in tensors(out)]
        call(out)
        assert all(o._version > b for o, b in zip(tensors(out), before, strict=True))


def test_new_tensors_lie_where_the_input_does():
    """Also where a default device sends torch's own new tensors elsewhere."""
    packed = torch.randn(LAYOUT.total_tokens, 4)
    with torch.device("meta"):
        assert gather_rows(packed, ROWS).device.type == "cpu"
        assert unpack(packed, LAYOUT)[0].device.type == "cpu"


def test_a_layout_on_another_device_is_named():
    elsewhere = PackedLayout.from_counts([[3, 2]]).to("meta")
    with pytest.raises(ValueError, match="the streams are on cpu, the layout on meta"):
        pack([torch.zeros(3, 4), torch.zeros(2, 4)], elsewhere)
    with pytest.raises(ValueError, match="unpack: packed is on cpu, the layout on meta"):
        unpack(torch.zeros(5, 4), elsewhere)


def test_another_device_is_never_offered_to_the_cpp_path(monkeypatch):
    """A refusal costs as much as a kernel's launch."""
    for name in NAMES:
        monkeypatch.setattr(quick, name, lambda *args: pytest.fail("offered"))
    layout, rows = PackedLayout.from_counts([[3], [2]]).to("meta"), torch.empty(2, dtype=torch.int32, device="meta")
    packed, padded = torch.empty(5, 4, device="meta"), torch.empty(2, 3, 4, device="meta")
    for call, values, where in (
        (pack, [packed], layout), (unpack, packed, layout), (pad, packed, layout), (unpad, padded, layout),
        (gather_rows, packed, rows), (segment_mean, packed, layout),
    ):  # fmt: skip
        with pytest.raises(dispatch.UnavailableError, match="there are no kernels for meta tensors"):
            call(values, where)


def test_more_streams_than_the_layout_has_are_named():
    layout = PackedLayout.from_counts([[2, 1]])
    streams = [torch.zeros(2, 4), torch.zeros(1, 4)]
    pack(streams, layout)
    with pytest.raises(ValueError, match="got 3 streams, expected 2"):
        pack([*streams, torch.zeros(0, 4)], layout)
