"""attention on CPU: rows that see nothing, lse and mass, strides, the operator's contract, what is refused."""

import math

import numpy as np
import pytest
import torch
from attention_oracle import CPU_IMPLS, MASKS, NUM_MODALITIES, Case, check, dense_oracle, make_qkv, shared_layout

from mmkernels import AttentionMask, PackedLayout, attention, attention_qkvpacked, dispatch, prepare_attention
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention.inputs import Request
from mmkernels.ops.attention.op import visible_pairs
from mmkernels.testing import random_layout, reference_mask

IMPLS = [*CPU_IMPLS, "reference"]


@pytest.mark.parametrize("cross", [False, True])
def test_reference_float64_equals_the_oracle(cross):
    layout = shared_layout(5)
    mask = AttentionMask(causal=True) if cross else AttentionMask(causal=True, bidirectional=(1,))
    k_layout = shared_layout(6) if cross else None
    case = Case(layout, mask, k_layout, heads=4, kv_heads=2, dtype=torch.float64, pair_bias=True, dropout_p=0.2)
    leaves = [leaf.double().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    torch.manual_seed(case.seed)
    ours = attention(
        q, k, v, layout=layout, k_layout=k_layout, mask=mask, pair_bias=bias, dropout_p=0.2, return_lse=True,
        return_modality_mass=True, impl="reference",
    )  # fmt: skip
    ref = dense_oracle(case, q, k, v, bias)
    for a, b in zip(ours, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(values[0].square().sum(), leaves) for values in (ours, ref))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing(impl):
    layout = PackedLayout.from_segments([[(0, 4), (1, 3)], [(0, 2)]], num_modalities=2)
    qkv = make_qkv(layout, 2, 2, 16, torch.float32, 0)
    q, k, v = qkv.split(2, 1)
    mask = AttentionMask(visible=[[False, False], [True, True]])
    out, lse = attention(q, k, v, layout=layout, mask=mask, return_lse=True, impl=impl)
    (gradient,) = torch.autograd.grad((out.sum(), torch.where(lse.isinf(), 0, lse).sum()), qkv)
    blind = layout.modality_ids == 0
    assert (out[blind] == 0).all()
    assert (lse[:, blind] == float("-inf")).all()
    assert (gradient[blind, :2] == 0).all()
    assert (gradient[7:] == 0).all()  # nobody sees the second sample's keys either
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["document", "causal", "visible_blind", "bidirectional"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_through_lse(kind, impl):
    layout = shared_layout(4)
    mask = MASKS[kind](layout, 4)
    check(layout, mask, impl=impl, heads=4, kv_heads=2, width=24, lse_gradient=True)
    qkv = make_qkv(layout, 4, 2, 24, torch.float32, 0)
    (only_lse,) = torch.autograd.grad(
        attention(*qkv.split((4, 2, 2), 1), layout=layout, mask=mask, return_lse=True, impl=impl)[1][:, -1].sum(), qkv
    )
    assert torch.isfinite(only_lse).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("impl", IMPLS)
def test_modality_mass(kind, impl):
    layout = shared_layout(6)
    mask = MASKS[kind](layout, 6)
    case = Case(layout, mask, heads=4, kv_heads=2, pair_bias=True, dropout_p=0.4)
    q, k, v, bias = case.arguments([leaf.requires_grad_() for leaf in case.leaves])
    _, mass = attention(
        q, k, v, layout=layout, mask=mask, pair_bias=bias, dropout_p=0.4, return_modality_mass=True, impl=impl
    )
    assert not mass.requires_grad
    sees = case.seen.any(1)
    torch.testing.assert_close(mass.sum(2), sees.float().unsqueeze(1).expand(-1, 4), rtol=0, atol=1e-6)
    # Nothing goes to a modality of which the query sees no token.
    for m in range(NUM_MODALITIES):
        assert (mass[~case.seen[:, layout.modality_ids == m].any(1), :, m] == 0).all()


# Inside one projection; with grouped heads; heads further apart than D; broadcast over heads and over tokens.
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(51, 3, 4, 16).unbind(1),
        lambda: torch.randn(51, 8, 16).split((4, 2, 2), 1),
        lambda: torch.randn(3, 51, 4, 40)[..., 5:21].unbind(0),
        lambda: [torch.randn(51, 1, 16).expand(51, 4, 16)] * 3,
        lambda: [torch.randn(1, 4, 16).expand(51, 4, 16)] * 3,
    ],
)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_strided_views_are_not_copied(impl, make, monkeypatch):
    layout = PackedLayout.from_counts([[20, 0], [11, 20]])
    q, k, v = make()
    do = torch.randn(51, 4, 32)[:, :, :16]
    results = []
    for copied in (True, False):
        leaves = [(t.contiguous() if copied else t).detach().requires_grad_() for t in (q, k, v)]
        if not copied:
            monkeypatch.setattr(torch.Tensor, "contiguous", None)  # a copy would need it
        out = attention(*leaves, layout=layout, mask=AttentionMask.isolated(2), impl=impl)
        results.append((out, *torch.autograd.grad(out, leaves, do)))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_last_dimension_may_be_strided(impl):
    layout = PackedLayout.from_counts([[9]])
    q = torch.randn(9, 16, 2).transpose(1, 2)
    expected = attention(*[q.contiguous()] * 3, layout=layout, impl=impl)
    torch.testing.assert_close(attention(q, q, q, layout=layout, impl=impl), expected)


def _operator_arguments(impl, extras=False):
    """q, k, v, pair_bias, rng; the lowered mask and scalars; mass_modalities and impl."""
    case = Case(random_layout(2, num_modalities=NUM_MODALITIES), None, heads=4, kv_heads=2, pair_bias=extras)
    plan = MaskPlan.lower(case.layout, AttentionMask(causal=True, bidirectional=(1,)))
    schedule = dispatch.load("attention", impl).schedule(plan, Request(torch.float32, 16, True, True, extras))
    *qkv, bias = (None if t is None else t.clone() for t in case.arguments(case.leaves))
    rng = torch.tensor([3, 5]) if extras else None
    lowered = (plan.q_table, plan.k_table, *schedule, 0.25, plan.has_visible, 0.2 if extras else 0.0)
    return (*qkv, bias, rng), lowered, (NUM_MODALITIES if extras else 0, impl)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, extras):
    inputs, lowered, tail = _operator_arguments(impl, extras)
    leaves = tuple(t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs)
    torch.library.opcheck(torch.ops.mm.attention_fwd.default, (*leaves, *lowered, *tail))
    out, lse, _ = torch.ops.mm.attention_fwd(*inputs, *lowered, *tail)
    for dlse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(out), dlse, *inputs, out, lse, *lowered, impl)
        torch.library.opcheck(torch.ops.mm.attention_bwd.default, backward)


def test_operators_refuse_meta_tensors_beside_real_ones():
    """Torch sends such a call to the function of shapes: what it returned nobody had written."""
    inputs, lowered, tail = _operator_arguments("torch", True)
    (q, *others), meta = inputs, lowered[0].to("meta")
    with pytest.raises(ValueError, match="mm::attention_fwd: q_table is on meta, q on cpu"):
        torch.ops.mm.attention_fwd(*inputs, meta, *lowered[1:], *tail)
    with pytest.raises(ValueError, match="mm::attention_fwd: k is on cpu, q on meta"):
        torch.ops.mm.attention_fwd(q.to("meta"), *others, *lowered, *tail)
    out, lse, _ = torch.ops.mm.attention_fwd(*inputs, *lowered, *tail)
    with pytest.raises(ValueError, match="mm::attention_bwd: lse is on meta, do on cpu"):
        torch.ops.mm.attention_bwd(out, None, *inputs, out, lse.to("meta"), *lowered, "torch")


@pytest.mark.parametrize("kind", MASKS)
def test_flops_count_visible_pairs(kind):
    layout = shared_layout(6)
    mask = MASKS[kind](layout, 6)
    plan = MaskPlan.lower(layout, mask)
    pairs = int(reference_mask(layout, mask).sum())
    assert visible_pairs(plan.q_table, plan.k_table, plan.has_visible) == plan.visible_pairs == pairs
    qkv = make_qkv(layout, 4, 2, 16, torch.float32, 0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        attention(*qkv.split((4, 2, 2), 1), layout=layout, mask=mask).sum().backward()
    assert counter.get_total_flops() == 14 * pairs * 4 * 16


def _call(**changes):
    layout = PackedLayout.from_counts([[5], [3]])
    arguments = {"q": torch.randn(8, 4, 16), "k": torch.randn(8, 2, 16), "v": torch.randn(8, 2, 16), "layout": layout}
    arguments |= changes
    return attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(8, 64)}, r"q has shape \(8, 64\), expected \[T, heads, D\]"),
        ({"q": torch.randn(7, 4, 16)}, "q has 7 tokens, expected the layout's 8"),
        ({"k": torch.randn(8, 3, 16), "v": torch.randn(8, 3, 16)}, "k has 3 heads, expected a divisor of q's 4"),
        ({"v": torch.randn(8, 4, 16)}, r"k is \(8, 2, 16\) and v \(8, 4, 16\)"),
        ({"v": torch.randn(8, 2, 16).bfloat16()}, "v is torch.bfloat16, expected q's torch.float32"),
        ({"q": torch.randn(8, 4, 4), "k": torch.randn(8, 2, 4), "v": torch.randn(8, 2, 4)}, "width is 4, expected 8"),
        ({"scale": 0.0}, "scale is 0.0, expected a positive finite number"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": "1"}, "scale is '1', expected a positive finite number"),
        ({"scale": True}, "scale is True, expected a positive finite number"),
        ({"scale": math.inf}, "scale is inf, expected a positive finite number"),
        ({"scale": np.float32("inf")}, r"scale is np.float32\(inf\), expected a positive finite number"),
        ({"scale": 1e39}, "scale is 1e.39, expected a positive finite number, as float32 holds it"),
        ({"scale": 10**400}, "scale is 10+, expected a positive finite number"),
        ({"dropout_p": True}, "dropout_p is True, expected a number"),
        ({"scale": torch.nn.Parameter(torch.tensor(0.25))}, "scale is a tensor, expected a number; multiply q by it"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0, expected a number, 0 <= dropout_p < 1"),
        ({"dropout_p": None}, "dropout_p is None, expected a number"),
        ({"dropout_p": torch.tensor(0.5)}, "dropout_p is tensor"),
        ({"deterministic": "yes"}, "deterministic is 'yes', expected True, False or None"),
        ({"deterministic": torch.ones(2)}, r"deterministic is tensor\(.*, expected True, False or None"),
        (
            {"pair_bias": torch.zeros(4, 1, 2)},
            r"pair_bias is torch.float32 \(4, 1, 2\), expected floating point \(4, 1, 1\)",
        ),
        ({"pair_bias": torch.zeros(4, 1, 1).long()}, "pair_bias is torch.int64 .*, expected floating point"),
        ({"pair_bias": 0.5}, "pair_bias is float, expected"),
        ({"k_layout": PackedLayout.from_counts([[8]])}, "k_layout has 1 samples, expected layout's 2"),
        ({"k_layout": PackedLayout.from_counts([[5], [4]])}, "k has 8 tokens, expected the layout's 9"),
        ({"mask": AttentionMask.isolated(3)}, "visible has rows"),
        ({"mask": torch.ones(8, 8, dtype=torch.bool)}, "mask is Tensor, expected AttentionMask or None"),
        ({"layout": torch.tensor([0, 5, 8])}, "layout is Tensor, expected PackedLayout"),
        ({"q": [[0.0]]}, "q is list, expected a tensor"),
        ({"impl": "fast"}, "impl is 'fast', expected one of"),
        ({"impl": ["cpp"]}, r"impl is \['cpp'\], expected one of"),
        ({"q": torch.randn(8, 4, 16).to("meta")}, "q is on meta, expected the layout's cpu"),
        ({name: torch.ones(8, 4, 16, dtype=torch.int32) for name in "qkv"}, "q is torch.int32, expected float32"),
        ({"v": torch.zeros(8, 4, 16).to_sparse()}, "v is torch.sparse_coo, expected a strided tensor"),
        ({"q": torch.nested.nested_tensor([torch.zeros(8, 16)], layout=torch.jagged)}, "q is nested, expected"),
    ],
)
def test_bad_arguments(changes, message):
    layout = PackedLayout.from_counts([[5], [3]])
    _call(layout=layout)  # after which a call of the same kind goes a shorter way
    with pytest.raises(ValueError, match=message):
        _call(**{"layout": layout, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(8, 2, 4, 16)}, r"qkv is \(8, 2, 4, 16\), expected a tensor \[T, 3,"),
        ({"qkv": torch.zeros(7, 3, 4, 16)}, "q has 7 tokens, expected the layout's 8"),
        ({"qkv": torch.zeros(8, 3, 4, 4)}, "head width is 4"),
        ({"layout": None}, "layout is NoneType"),
        ({"mask": "causal"}, "mask is str"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": torch.tensor(0.5)}, "scale is a tensor"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"pair_bias": 0.5}, "pair_bias is float"),
        ({"deterministic": 1}, "deterministic is 1"),
        ({"impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_bad_arguments_of_attention_qkvpacked_name_it(changes, message):
    good = {"qkv": torch.zeros(8, 3, 4, 16), "layout": PackedLayout.from_counts([[5], [3]])}
    with pytest.raises(ValueError, match=f"^attention_qkvpacked: {message}"):
        attention_qkvpacked(**{**good, **changes})
    with pytest.raises(TypeError, match=r"attention_qkvpacked.* 'window'"):
        attention_qkvpacked(**good, window=3)


def test_bad_arguments_of_prepare_attention():
    layout = PackedLayout.from_counts([[5], [3]])
    for dtype in ("float32", torch.int32):
        with pytest.raises(ValueError, match=r"prepare_attention: dtype is .*, expected float32, bfloat16"):
            prepare_attention(layout, dtype=dtype, head_dim=16)
    for width in (4, 1000, 16.5):
        with pytest.raises(ValueError, match=f"head_dim is {width}, expected 8 to 256"):
            prepare_attention(layout, dtype=torch.float32, head_dim=width)
    good = {"layout": layout, "dtype": torch.float32, "head_dim": 16}
    for name, value in (("deterministic", "yes"), ("impl", "fast")):
        with pytest.raises(ValueError, match=f"prepare_attention: {name} is '{value}', expected"):
            prepare_attention(**good, **{name: value})
    for name, value in (("layout", torch.tensor([0, 5, 8])), ("k_layout", [5, 3]), ("mask", torch.ones(8, 8))):
        with pytest.raises(ValueError, match=f"prepare_attention: {name} is {type(value).__name__}, expected"):
            prepare_attention(**{**good, name: value})


def test_autocast_decides_the_dtype_as_in_torchs_attention():
    q, k, v = (torch.randn(8, 4, 16) for _ in range(3))
    layout = PackedLayout.from_counts([[5], [3]])
    expected = attention(*(t.bfloat16() for t in (q, k, v)), layout=layout)
    for _ in range(2):  # a call that was met before, too
        attention(q, k, v, layout=layout)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention(q, k, v, layout=layout), expected)
            assert torch.equal(attention(q, k.bfloat16(), v, layout=layout), expected)
            packed = attention_qkvpacked(torch.stack([q, k, v], 1).requires_grad_(), layout=layout)
            assert torch.equal(packed, expected)
            exact = [t.double() for t in (q, k, v)]
            assert attention(*exact, layout=layout, impl="reference").dtype == torch.float64


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_torch_func(impl, met):
    """vmap passes gradients on, grad and jacrev work, and what has no rule is refused."""
    layout = PackedLayout.from_counts([[6], [4]])
    xs = torch.randn(3, 10, 2, 16, requires_grad=True)
    k, v = torch.randn(2, 10, 2, 16)

    def attend(q, layout=layout):
        return attention(q, k, v, layout=layout, impl=impl)

    def squares(q):
        return attend(q).square().sum()

    fresh = PackedLayout.from_counts([[6], [4]])
    expected = torch.stack([attend(x, fresh) for x in xs])
    (wanted,) = torch.autograd.grad(expected.square().sum(), xs)
    if met:
        attend(xs[0])
    found = torch.vmap(attend)(xs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), xs)[0], wanted)
    layout.cache.clear()
    torch.testing.assert_close(torch.func.grad(squares)(xs[0].detach()), wanted[0])
    torch.testing.assert_close(torch.vmap(torch.func.grad(squares))(xs.detach()), wanted)
    jacobian = torch.func.jacrev(lambda q: attend(q)[0, 0])(xs[0].detach())
    (row,) = torch.autograd.grad(attend(xs[0])[0, 0, 3], xs)
    torch.testing.assert_close(jacobian[3], row[0])
    with pytest.raises(NotImplementedError):  # forward mode would give zeros
        torch.func.jvp(attend, (xs[0].detach(),), (xs[0].detach(),))
    with pytest.raises(NotImplementedError):
        torch.func.hessian(squares)(xs[0].detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_second_order_gradients_are_refused(impl):
    q = torch.randn(8, 4, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(_call(q=q, impl=impl).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: only first-order"):
        gradient.sum().backward()


def test_an_implementation_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _call(impl="triton")
