"""attention on tensors out of the ordinary: strides that overlap, zeros without memory, storages that were freed."""

import pytest
import torch
from torch.utils._pytree import tree_map

from mmkernels import PackedLayout, attention, attention_qkvpacked

LAYOUT = PackedLayout.from_counts([[5], [1], [2], [40]])
SHAPE = (48, 2, 16)
BY_TORCH = ["torch", "reference"]
ODD = {
    "one token for all": lambda x: x[:1].expand(SHAPE),
    "one head for all": lambda x: x[:, :1].expand(SHAPE),
    "one number for all": lambda x: x[:1, :1, :1].expand(SHAPE),
    "windows of tokens": lambda x: x.flatten().as_strided(SHAPE, (1, 16, 1)),
    "windows of heads": lambda x: x.flatten().as_strided(SHAPE, (16, 1, 1)),
    "zeros without memory": lambda x: torch._efficientzerotensor(SHAPE),
}


def _solved(impl, q, k, v, do):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, layout=LAYOUT, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


@pytest.mark.parametrize("at", range(4), ids=["q", "k", "v", "do"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("impl", BY_TORCH)
def test_numbers_that_share_memory_or_have_none_count_like_any(impl, odd, at):
    given = list(torch.randn(4, *SHAPE))
    given[at] = ODD[odd](given[at])
    plain = [t.clone(memory_format=torch.contiguous_format).double() for t in given]
    for ours, ref in zip(_solved(impl, *given), _solved("reference", *plain), strict=True):
        torch.testing.assert_close(ours.double(), ref, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["q", "k", "v", "pair_bias"])
@pytest.mark.parametrize("impl", BY_TORCH)
def test_a_storage_that_was_freed_is_named_not_read(impl, name):
    given = dict.fromkeys("qkv", torch.randn(SHAPE)) | {"pair_bias": torch.zeros(2, 1, 1)}
    given[name] = given[name].clone()
    given[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"attention: {name} lies in a storage of 0 bytes, expected "):
        attention(**given, layout=LAYOUT, impl=impl)


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.to_sparse(), "{} is torch.sparse_coo, expected a strided tensor"),
        (lambda t: torch.nested.nested_tensor([t, t]), "{} is nested, expected a strided tensor"),
        (lambda t: t.as_subclass(Refusing), "{} is Refusing, which does not answer torch's functions, expected a str"),
        (lambda t: torch.nn.UninitializedParameter(), "{} is UninitializedParameter, expected one that is initialised"),
        (lambda t: t.to(torch.complex64), "{} is torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "{} is torch.float8_e4m3fn"),
        (lambda t: torch.empty(t.shape, dtype=torch.float4_e2m1fn_x2), "{} is torch.float4_e2m1fn_x2"),
        (
            lambda t: torch.quantize_per_channel(t, torch.ones(len(t)), torch.zeros(len(t)), 0, torch.qint8),
            "{} is torch.qint8",
        ),
    ],
)
@pytest.mark.parametrize("name", ["q", "pair_bias", "qkv"])
@pytest.mark.filterwarnings("ignore:torch.quantize|The PyTorch API of nested")
def test_what_is_no_plain_tensor_of_numbers_is_named(name, make, message):
    given = dict.fromkeys("qkv", torch.randn(SHAPE)) | {"pair_bias": torch.zeros(2, 1, 1)}
    if name == "qkv":
        given, call = {"qkv": torch.randn(48, 3, 2, 16)}, attention_qkvpacked
    else:
        call = attention
    given[name] = make(given[name])
    # What can be taken apart all the same is refused as q, the first part.
    pattern = message.format("q(kv)?" if name == "qkv" else name)
    with pytest.raises(ValueError, match=f"^{call.__name__}: {pattern}"):
        call(**given, layout=LAYOUT)


def test_a_projection_whose_storage_was_freed_is_named():
    qkv = torch.randn(48, 3, 2, 16)
    qkv.untyped_storage().resize_(0)
    for impl in ("auto", *BY_TORCH):
        with pytest.raises(ValueError, match="attention_qkvpacked: qkv lies in a storage of 0 bytes, expected 18432"):
            attention_qkvpacked(qkv, layout=LAYOUT, impl=impl)


class Wrapped(torch.Tensor):
    """As quantizing and sharding libraries make them: what it holds may lie elsewhere in memory than it says."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def inner(t):
            return t.inner if isinstance(t, cls) else t

        found = func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, found)


@pytest.mark.parametrize("impl", BY_TORCH)
def test_wrapped_tensors_are_computed_with_what_they_hold(impl):
    q, kv, do = torch.randn(3, *SHAPE).unbind(0)
    k, v = torch.stack([kv, kv.sin()], 1).unbind(1)
    expected = _solved(impl, q, k, v, do)
    leaves = [q.requires_grad_(), Wrapped(k).requires_grad_(), Wrapped(v).requires_grad_()]
    out = attention(*leaves, layout=LAYOUT, impl=impl)
    for ours, plain in zip((out, *torch.autograd.grad(out, leaves, do)), expected, strict=True):
        torch.testing.assert_close(ours.inner.detach() if isinstance(ours, Wrapped) else ours, plain)
