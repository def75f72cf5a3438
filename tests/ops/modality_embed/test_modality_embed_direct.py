"""The way past the dispatcher: that plain calls take it, both ways, and that everything else does not."""

import gc
import sys

import pytest
import torch

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed.api import modality_embed

if dispatch.cpp_missing() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)
from mmkernels.ops.modality_embed import cpp_impl

LAYOUT = PackedLayout.from_segments([[(0, 3), (1, (2, 2))], [(1, (1, 3)), (0, 2)], []], num_modalities=3)
WIDTH, VOCABULARY = 12, 7


def inputs(norm="layernorm", dtype=torch.float32):
    """Ids, a grid and an absent modality: what modality_embed takes, all floats learning."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return [torch.tensor([0, 6, 6, 2, 1]), draw(7, WIDTH), None], {
        "modality_weight": draw(3, WIDTH),
        "token_weight": torch.nn.Parameter(draw(VOCABULARY, WIDTH)),
        "position_weights": [draw(4, WIDTH), (draw(2, WIDTH), draw(3, WIDTH)), None],
        "norm": norm,
        "norm_weight": draw(WIDTH) if norm else None,
        "norm_bias": draw(WIDTH) if norm == "layernorm" else None,
    }


def gradients(streams, tensors, **more):
    tables = tensors["position_weights"]
    leaves = [streams[1], *(tensors[name] for name in ("modality_weight", "token_weight", "norm_weight", "norm_bias"))]
    leaves = [leaf for leaf in (*leaves, tables[0], *tables[1]) if leaf is not None and leaf.requires_grad]
    out = modality_embed(streams, LAYOUT, **tensors, **more)
    return out, torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))


@pytest.fixture
def long_way(monkeypatch):
    """The names of the operators that the dispatcher was asked for."""
    taken = []
    for name in ("_fwd", "_bwd"):
        whole = getattr(cpp_impl, name)
        watched = lambda *args, name=name, whole=whole: (taken.append(name), whole(*args))[1]  # noqa: E731
        monkeypatch.setattr(cpp_impl, name, watched)
    return taken


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", None])
def test_plain_calls_take_it_and_are_bit_equal(norm, dropout_p, long_way, monkeypatch):
    streams, tensors = inputs(norm)
    torch.manual_seed(1)
    out, grads = gradients(streams, tensors, dropout_p=dropout_p)
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(modality_embed(streams, LAYOUT, **tensors, dropout_p=dropout_p), out)
    assert long_way == []
    for name in ("_direct_fwd", "_direct_bwd"):
        monkeypatch.setattr(cpp_impl, name, lambda *args: None)
    torch.manual_seed(1)
    expected, expected_grads = gradients(streams, tensors, dropout_p=dropout_p)
    assert long_way == ["_fwd", "_bwd"]
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, expected_grads))


def test_streams_of_other_dtypes_take_it(long_way):
    streams, tensors = inputs()
    half = streams[1].detach().bfloat16().requires_grad_()
    out, grads = gradients([streams[0], half, None], tensors)
    assert out.dtype is grads[0].dtype is torch.bfloat16
    mixed = modality_embed([streams[0], half, torch.zeros(0, WIDTH, dtype=torch.float16)], LAYOUT, **tensors)
    assert torch.equal(mixed, out)  # a stream without rows has no dtype that matters
    assert long_way == []


class Mine(torch.Tensor):
    pass


def negated(tensor):
    return torch._neg_view(-tensor.detach())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s, t: s.__setitem__(1, s[1].detach().as_subclass(Mine)), id="subclass"),
        pytest.param(lambda s, t: s.__setitem__(1, negated(s[1])), id="negated view"),
        pytest.param(lambda s, t: s.__setitem__(1, s[1].detach().T.contiguous().T), id="columns apart"),
        pytest.param(lambda s, t: t.update(norm_weight=t["norm_weight"].detach().repeat(2)[::2]), id="strided"),
    ],
)
def test_whatever_does_not_lie_as_it_must_goes_the_long_way(change, long_way):
    streams, tensors = inputs()
    plain = {name: value for name, value in tensors.items() if name != "norm_weight"}
    change(streams, tensors)
    out, _ = gradients(streams, tensors)
    assert "_fwd" in long_way
    plain["norm_weight"] = tensors["norm_weight"].clone()
    taken = len(long_way)
    whole = streams[1].as_subclass(torch.Tensor).clone(memory_format=torch.contiguous_format).resolve_neg()
    again, _ = gradients([streams[0], whole, None], plain)
    assert long_way[taken:] == []
    torch.testing.assert_close(out.as_subclass(torch.Tensor), again)


def test_parameters_in_bf16_go_the_long_way(long_way):
    gradients(*inputs(dtype=torch.bfloat16))
    assert long_way == ["_fwd", "_bwd"]


def test_autocast_and_compiled_graphs_take_it(long_way):
    streams, tensors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = gradients(streams, tensors)
    assert out.dtype is torch.bfloat16
    compiled, grads = torch.compile(gradients, backend="aot_eager")(streams, tensors)
    expected, expected_grads = gradients(streams, tensors)
    assert torch.equal(compiled, expected)
    assert all(map(torch.equal, grads, expected_grads))
    assert long_way == []


@pytest.mark.parametrize("norm", ["layernorm", None])
def test_a_learning_stream_without_rows_takes_it(norm, long_way):
    """As a front end gives it in a batch that lacks its modality."""
    streams, tensors = inputs(norm)
    streams[2] = torch.zeros(0, WIDTH, requires_grad=True)
    out = modality_embed(streams, LAYOUT, **tensors)
    assert torch.autograd.grad(out, streams[2], torch.ones_like(out))[0].shape == (0, WIDTH)
    assert long_way == []


def test_tensors_that_lie_nowhere_go_the_long_way(long_way):
    """Zeros that torch has not written yet: their address is null."""
    streams, tensors = inputs()
    nothing = torch._efficientzerotensor(tuple(streams[1].shape))
    assert torch.equal(
        modality_embed([streams[0], nothing, None], LAYOUT, **tensors),
        modality_embed([streams[0], torch.zeros_like(streams[1]), None], LAYOUT, **tensors),
    )
    assert long_way == ["_fwd"]
    out = modality_embed(streams, LAYOUT, **tensors)
    (gradient,) = torch.autograd.grad(out, streams[1], torch._efficientzerotensor(tuple(out.shape)))
    assert not gradient.any()
    assert long_way == ["_fwd", "_bwd"]


def test_whoever_looks_on_sees_the_operators():
    streams, tensors = inputs()
    with torch.profiler.profile() as profile:
        gradients(streams, tensors)
    names = {event.name for event in profile.events()}
    assert {"mm_cpp::modality_embed_fwd", "mm_cpp::modality_embed_bwd"} <= names


@pytest.mark.parametrize("norm", ["layernorm", None])
def test_nothing_is_kept_or_lost(norm):
    """References of what is passed, returned and refused, over many calls."""
    streams, tensors = inputs(norm)
    bad = [torch.tensor([0, 6, 6, 2, VOCABULARY]), *streams[1:]]  # an id outside the table

    def call():
        gradients(streams, tensors)
        with pytest.raises(IndexError):
            modality_embed(bad, LAYOUT, **tensors)

    call()
    watched = [None, True, torch.float32, *streams, *bad, *tensors.values(), LAYOUT.positions, LAYOUT.modality_ids]
    gc.collect()
    before = [sys.getrefcount(x) for x in watched]
    for _ in range(50):
        call()
    after = [sys.getrefcount(x) for x in watched]
    assert all(abs(a - b) < 25 for a, b in zip(after, before, strict=True))


def test_results_lie_where_the_inputs_do():
    """Also where a default device sends torch's own new tensors elsewhere."""
    streams, tensors = inputs()
    with torch.device("meta"):
        out = modality_embed(streams, LAYOUT, **tensors)
    assert out.device.type == "cpu"


@pytest.mark.parametrize("name", ["modality_weight", "norm_weight", "token_weight"])
def test_a_storage_that_was_freed_is_named_not_read(name):
    """Of a vector of the norm it meant that there is none."""
    streams, tensors = inputs()
    out = modality_embed(streams, LAYOUT, **tensors)
    tensors[name].untyped_storage().resize_(0)
    for call in (lambda: modality_embed(streams, LAYOUT, **tensors), out.sum().backward):
        with pytest.raises(RuntimeError, match=f"{name} lies in a storage of 0 bytes"):
            call()


@pytest.mark.parametrize("name", ["modality_weight", "norm_weight", "norm_bias", "token_weight", "stream 1"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_torchs_kernels_are_given_no_storage_that_was_freed(impl, name):
    streams, tensors = inputs()
    out = modality_embed(streams, LAYOUT, **tensors, impl=impl)
    (streams[1] if name == "stream 1" else tensors[name]).untyped_storage().resize_(0)
    for call in (lambda: modality_embed(streams, LAYOUT, **tensors, impl=impl), out.sum().backward):
        with pytest.raises(ValueError, match=f"modality_embed: {name} lies in a storage of 0 bytes, expected "):
            call()


def test_ids_whose_storage_was_freed_are_named():
    streams, tensors = inputs()
    streams[0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="stream 0 lies in a storage of 0 bytes"):
        modality_embed(streams, LAYOUT, **tensors)


def test_a_norm_weight_of_another_shape_is_refused():
    streams, tensors = inputs()
    tensors["norm_weight"] = tensors["norm_weight"].detach()[None]
    with pytest.raises(ValueError, match=r"norm_weight is \(1, 12\), expected \[12\]"):
        modality_embed(streams, LAYOUT, **tensors)
