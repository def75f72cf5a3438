"""Gradients, opcheck, torch.compile and torch.func of the packing operators."""

import pytest
import torch
import torch._dynamo.testing
from ops.packing.packing_cases import IMPLS, LAYOUTS, streams_of, where_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing import api, op, schemas
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_the_adjoints(impl):
    """In float64 by finite differences, and of the gradients too: every operator is linear."""
    layout = LAYOUTS["interleaved"]
    bounds, samples, where = layout.segment_cu_seqlens, layout.cu_seqlens, where_of(layout)
    packed = torch.randn(layout.total_tokens, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(layout.num_samples, 12, 2, dtype=torch.float64, requires_grad=True)
    streams = [s.double().requires_grad_() for s in streams_of(layout, 2)]
    rows = torch.tensor([3, 0, 3, 21, 3])
    functions = [
        (lambda *s: op.pack(list(s), *where, layout.total_tokens, impl), streams),
        (lambda p: tuple(op.unpack(p, *where, list(layout.stream_lengths), impl)), [packed]),
        (lambda p: op.pad(p, samples, 12, impl)[0], [packed]),
        (lambda p: op.unpad(p, samples, layout.total_tokens, impl), [padded]),
        (lambda p: op.gather_rows(p, rows, impl), [packed]),
        (lambda p: op.segment_mean(p, bounds, impl), [packed]),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_plain_gradient_is_not_the_dispatchers(impl):
    """torch.library's own way takes 60 to 150 us a call.  What the operator registers gives the same."""
    layout = LAYOUTS["interleaved"]
    packed = torch.randn(layout.total_tokens, 3, requires_grad=True)
    rows, bounds = torch.tensor([3, 0, 3]), layout.segment_cu_seqlens
    for name, where in (("gather_rows", rows), ("segment_mean", bounds)):
        plain, registered = getattr(op, name)(packed, where, impl), getattr(torch.ops.mm, name)(packed, where, impl)
        grad = torch.randn_like(plain)
        assert "Generated" in registered.grad_fn.name()
        assert "Generated" not in plain.grad_fn.name()
        assert torch.equal(*(torch.autograd.grad(result, packed, grad)[0] for result in (plain, registered)))
    streams = streams_of(layout, 3, requires_grad=True)
    for result in (pack(streams, layout, impl=impl), unpack(packed, layout, impl=impl)[0]):
        assert "Generated" not in result.grad_fn.name()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_unused_stream_of_unpack_gets_zeros(impl):
    layout = LAYOUTS["interleaved"]
    packed = torch.randn(layout.total_tokens, 3, requires_grad=True)
    unpack(packed, layout, impl=impl)[1].sum().backward()
    assert torch.equal(packed.grad, (layout.modality_ids == 1).float()[:, None].expand(-1, 3))


@pytest.mark.parametrize("impl", IMPLS[1:])  # the reference shares all that opcheck looks at
def test_opcheck(impl):
    layout, T = LAYOUTS["interleaved"], LAYOUTS["interleaved"].total_tokens
    where, samples, bounds = where_of(layout), layout.cu_seqlens, layout.segment_cu_seqlens
    streams, rows = streams_of(layout, 4, requires_grad=True), torch.tensor([1, 1, 9])
    shapes = ((T,), (layout.num_samples, 12), (3,), (layout.num_segments,))
    packed, padded, gathered, means = (torch.randn(*shape, 4, requires_grad=True) for shape in shapes)
    inputs = {
        "pack": (streams, *where, T),
        "unpack": (packed, *where, list(layout.stream_lengths)),
        "pad": (packed, samples, 12),
        "unpad": (padded, samples, T),
        "gather_rows": (packed, rows),
        "scatter_rows_sum": (gathered, rows, T),
        "segment_mean": (packed, bounds),
        "segment_mean_backward": (means, bounds, T),
    }
    assert inputs.keys() == schemas.OPERATORS.keys()
    for name, arguments in inputs.items():
        torch.library.opcheck(getattr(torch.ops.mm, name).default, (*arguments, impl))
        out = getattr(op, name)(*arguments, impl)
        plain = torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, arguments)
        outputs = [o.detach() for o in out] if isinstance(out, tuple | list) else [out.detach()]
        outputs = [outputs] if name == "unpack" else outputs
        written = plain[: schemas.OPERATORS[name].num_inputs]
        torch.library.opcheck(getattr(torch.ops.mm, f"{name}_out").default, (*written, *outputs, impl))


def test_compiles_as_one_graph():
    layout = LAYOUTS["interleaved"]
    rows = torch.tensor([2, 2, 8])

    def run(streams):
        packed = pack(streams, layout)
        padded, mask = pad(packed, layout)
        return (
            gather_rows(packed, rows).sum()
            + segment_mean(packed, layout).square().sum()
            + unpack(unpad(padded * mask[..., None], layout), layout)[1].sum()
        )

    eager, compiled = streams_of(layout, 4, requires_grad=True), None
    run(eager).backward()
    compiled = [s.detach().clone().requires_grad_() for s in eager]
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_other_layouts_do_not_compile_again(recwarn):
    """Every batch has other lengths.  The second and third may compile: then the sizes are known to change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(streams, layout):
        packed = pack(streams, layout)
        padded, mask = pad(packed, layout)
        rows = unpack(unpad(padded, layout), layout)[0]
        return segment_mean(packed, layout).square().sum() + (rows.cos().sum() + mask.sum())

    call, compiled = torch.compile(run, fullgraph=True, backend=counter), []
    for seed in range(12):
        counts = torch.randint(2, 9, (seed % 4 + 2, 2), generator=torch.Generator().manual_seed(seed))
        layout = PackedLayout.from_counts(counts)
        expected = streams_of(layout, 4, requires_grad=True)
        given = [s.detach().clone().requires_grad_() for s in expected]
        run(expected, layout).backward()
        call(given, layout).backward()
        for a, b in zip(given, expected, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        compiled.append(counter.frame_count)
    assert compiled[-1] == compiled[4] <= 4
    assert not any("not writable" in str(warning.message) for warning in recwarn)  # from guards on layout.segments


def test_the_first_call_of_a_process_compiles_once(monkeypatch):
    """What it looks up and keeps for calls outside of graphs must not make the second call compile anew."""
    monkeypatch.setattr(api, "_RESOLVED", {})
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    layout, packed = LAYOUTS["interleaved"], torch.randn(LAYOUTS["interleaved"].total_tokens, 4)
    call = torch.compile(lambda packed: pad(packed, layout)[0].sum(), fullgraph=True, backend=counter)
    assert call(packed) == call(packed)
    assert counter.frame_count == 1


def test_out_compiles_as_one_graph():
    layout = LAYOUTS["interleaved"]
    streams = streams_of(layout, 4)
    rows = torch.tensor([2, 2, 8])

    def run(streams, packed, padded, mask, gathered):
        pack(streams, layout, out=packed)
        pad(packed, layout, out=(padded, mask))
        gather_rows(packed, rows, out=gathered)
        return packed.sum() + padded.sum() + gathered.sum()

    def memory():
        T, B, L = layout.total_tokens, layout.num_samples, layout.max_seqlen
        return torch.zeros(T, 4), torch.zeros(B, L, 4), torch.zeros(B, L, dtype=torch.bool), torch.zeros(3, 4)

    eager, compiled = memory(), memory()
    total = run(streams, *eager)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(streams, *compiled), total)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_a_parameter_without_grad_mode_goes_straight_to_the_kernel():
    """The path past the dispatcher gives what the registered operator gives, and records nothing."""
    packed, rows = torch.nn.Parameter(torch.randn(5, 3)), torch.tensor([3, 1])
    with torch.no_grad():
        out = gather_rows(packed, rows)
    assert not out.requires_grad
    assert torch.equal(out, gather_rows(packed, rows))
    assert gather_rows(packed, rows).requires_grad


@pytest.mark.parametrize("before_autograd", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_make_fx_records_every_operator(impl, before_autograd):
    """A trace before autograd saw of a short call on the CPU nothing but the memory of its result."""
    layout = PackedLayout.from_counts([[2, 1], [1, 3]])
    rows = torch.tensor([3, 0, 3])
    pack([torch.zeros(3, 4), torch.zeros(4, 4)], layout)  # after which short calls serve

    def all_of_them(text, image, rows):
        packed = pack([text, image], layout, impl=impl)
        padded, mask = pad(packed, layout, impl=impl)
        again = unpack(unpad(padded, layout, impl=impl), layout, impl=impl)
        return *again, mask, gather_rows(packed, rows, impl=impl), segment_mean(packed, layout, impl=impl)

    given = torch.randn(3, 4), torch.randn(4, 4), rows
    program = make_fx(all_of_them, pre_dispatch=before_autograd)(*(torch.zeros_like(t) for t in given))
    for found, expected in zip(program(*given), all_of_them(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_fake_tensors_of_a_mode_without_real_ones_are_named():
    layout = PackedLayout.from_counts([[2], [1]])
    with FakeTensorMode():
        rows = torch.zeros(3, 4)
        for call, name in (
            (lambda: pack([rows], layout), "pack: stream 0"),
            (lambda: segment_mean(rows, layout), "segment_mean: packed"),
            (lambda: unpad(torch.zeros(2, 2, 4), layout), "unpad: padded"),
        ):
            with pytest.raises(ValueError, match=f"{name} is a fake tensor .*allow_non_fake_inputs=True"):
                call()
