"""attention on CPU: the error rule over random ragged layouts, edges, isolation, the operator's contract."""

import pytest
import torch
from attention_oracle import CROSS_MASKS, MASKS, NUM_MODALITIES, Case, check, dense_oracle, make_qkv, shared_layout

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention.inputs import Request
from mmkernels.ops.attention.op import visible_pairs
from mmkernels.testing import poisoned_empty, random_layout, reference_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads, key heads, width: MHA, GQA and MQA; widths at both ends, not powers of two, odd.
SHAPES = [(2, 2, 16), (4, 2, 8), (3, 1, 40), (1, 1, 64), (4, 4, 33), (2, 1, 80), (1, 1, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_error_rule(kind, dtype):
    for seed in range(7):
        layout = shared_layout(seed)
        heads, kv_heads, width = SHAPES[seed]
        mask = MASKS[kind](layout, seed)
        with poisoned_empty():
            check(layout, mask, impl="torch", dtype=dtype, heads=heads, kv_heads=kv_heads, width=width, seed=seed)


@pytest.mark.parametrize("kind", MASKS)
def test_reference_error_rule(kind):
    layout = shared_layout(3)
    mask = MASKS[kind](layout, 3)
    check(layout, mask, impl="reference", dtype=torch.float32, heads=4, kv_heads=2, mass=True)


@pytest.mark.parametrize("extras", [{"pair_bias": True}, {"dropout_p": 0.3}, {"pair_bias": True, "dropout_p": 0.1}])
@pytest.mark.parametrize("kind", ["document", "causal", "visible_blind"])
def test_reference_extras(kind, extras):
    layout = shared_layout(2)
    mask = MASKS[kind](layout, 2)
    check(layout, mask, impl="reference", heads=4, kv_heads=2, mass=True, lse_gradient=True, **extras)


@pytest.mark.parametrize("kind", CROSS_MASKS)
def test_reference_cross(kind):
    layout, k_layout = shared_layout(1), shared_layout(4)
    mask = CROSS_MASKS[kind](layout, 1)
    check(layout, mask, k_layout=k_layout, impl="reference", heads=4, kv_heads=2, mass=True, pair_bias=True)


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


# Nothing at all; empty samples around one token; tile and vector edges; one modality missing everywhere.
@pytest.mark.parametrize(
    "counts", [[[0, 0]], [[0, 0], [1, 0], [0, 0]], [[127, 1], [0, 129]], [[5, 0], [7, 0]]], ids=str
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_edges(counts, impl):
    layout = PackedLayout.from_counts(counts)
    for mask in (None, AttentionMask(causal=True), AttentionMask.isolated(2)):
        check(layout, mask, impl=impl, dtype=torch.float32)


@pytest.mark.parametrize("impl", ["torch", "reference"])
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
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradient_through_lse(kind, impl):
    layout = shared_layout(4)
    mask = MASKS[kind](layout, 4)
    check(layout, mask, impl=impl, heads=4, kv_heads=2, width=24, lse_gradient=True)
    qkv = make_qkv(layout, 4, 2, 24, torch.float32, 0)
    (only_lse,) = torch.autograd.grad(
        attention(*qkv.split((4, 2, 2), 1), layout=layout, mask=mask, return_lse=True, impl=impl)[1][:, -1].sum(), qkv
    )
    assert torch.isfinite(only_lse).all()


@pytest.mark.parametrize("poison", [1e30, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["document", "causal", "isolated", "visible_blind", "bidirectional_window"])
def test_samples_are_isolated_bit_for_bit(kind, dtype, poison):
    for seed in range(4):
        layout = random_layout(seed, num_modalities=NUM_MODALITIES)
        mask = MASKS[kind](layout, seed)
        bounds = layout.cu_seqlens.tolist()
        keep = slice(bounds[seed % layout.num_samples], bounds[seed % layout.num_samples + 1])
        clean, poisoned = (make_qkv(layout, 4, 2, 16, dtype, seed) for _ in range(2))
        do = torch.randn(layout.total_tokens, 4, 16).to(dtype)
        poisoned_do = do.clone()
        with torch.no_grad():
            for t in (poisoned, poisoned_do):
                t[: keep.start], t[keep.stop :] = poison, poison
        results = []
        for qkv, gradient_out in ((clean, do), (poisoned, poisoned_do)):
            out, lse = attention(*qkv.split((4, 2, 2), 1), layout=layout, mask=mask, return_lse=True)
            results.append((out[keep], lse[:, keep], torch.autograd.grad(out, qkv, gradient_out)[0][keep]))
        for ours, other in zip(*results, strict=True):
            assert torch.equal(ours, other)


def test_strided_views_of_one_projection_are_not_copied(monkeypatch):
    layout = PackedLayout.from_counts([[20], [31]])
    q, k, v = torch.randn(51, 3, 4, 16).unbind(1)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), layout=layout)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # a copy would need it
    assert torch.equal(attention(q, k, v, layout=layout), expected)


def test_last_dimension_may_be_strided():
    layout = PackedLayout.from_counts([[9]])
    q = torch.randn(9, 16, 2).transpose(1, 2)
    torch.testing.assert_close(attention(q, q, q, layout=layout), attention(*[q.contiguous()] * 3, layout=layout))


def test_repeats_are_bit_equal():
    layout = random_layout(1, num_modalities=NUM_MODALITIES, max_length=90)
    qkv = make_qkv(layout, 4, 2, 32, torch.float32, 0)
    runs = []
    for _ in range(3):
        out = attention(*qkv.split((4, 2, 2), 1), layout=layout, mask=AttentionMask.isolated(NUM_MODALITIES))
        runs.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(torch.equal(a, b) for later in runs[1:] for a, b in zip(runs[0], later, strict=True))


def _operator_arguments(impl, extras=False):
    """q, k, v, pair_bias, rng; the lowered mask and scalars; mass_modalities and impl."""
    case = Case(random_layout(2, num_modalities=NUM_MODALITIES), None, heads=4, kv_heads=2, pair_bias=extras)
    plan = MaskPlan.lower(case.layout, AttentionMask(causal=True, bidirectional=(1,)))
    from mmkernels import dispatch

    schedule = dispatch.load("attention", impl).schedule(plan, Request(torch.float32, 16, True, True, extras))
    *qkv, bias = (None if t is None else t.clone() for t in case.arguments(case.leaves))
    rng = torch.tensor([3, 5]) if extras else None
    lowered = (plan.q_table, plan.k_table, *schedule, 0.25, plan.has_visible, 0.2 if extras else 0.0)
    return (*qkv, bias, rng), lowered, (NUM_MODALITIES if extras else 0, impl)


@pytest.mark.parametrize(("impl", "extras"), [("torch", False), ("reference", False), ("reference", True)])
def test_opcheck(impl, extras):
    inputs, lowered, tail = _operator_arguments(impl, extras)
    leaves = tuple(t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs)
    torch.library.opcheck(torch.ops.mm.attention_fwd.default, (*leaves, *lowered, *tail))
    out, lse, _ = torch.ops.mm.attention_fwd(*inputs, *lowered, *tail)
    for dlse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(out), dlse, *inputs, out, lse, *lowered, impl)
        torch.library.opcheck(torch.ops.mm.attention_bwd.default, backward)


def test_torch_compile_takes_other_layouts_without_recompiling():
    mask = AttentionMask.isolated(NUM_MODALITIES)

    def block(qkv, layout):
        return attention(*qkv.unbind(1), layout=layout, mask=mask) * 2

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seed in range(5):
        layout = random_layout(seed, num_modalities=NUM_MODALITIES)
        qkv = torch.randn(layout.total_tokens, 3, 2, 16, requires_grad=True)
        expected = block(qkv, layout)
        ours = compiled(qkv, layout)
        assert torch.equal(ours, expected)
        assert torch.equal(*(torch.autograd.grad(o.square().sum(), qkv)[0] for o in (ours, expected)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # static, then dynamic


def test_torch_compile_names_an_unprepared_layout():
    layout = PackedLayout.from_counts([[6]])
    qkv = torch.randn(6, 3, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(*x.unbind(1), layout=layout), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call\s+mmkernels.prepare_attention"):
        compiled(qkv)


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
        ({"dropout_p": 1.0}, "dropout_p is 1.0, expected 0 <= dropout_p < 1"),
        ({"pair_bias": torch.zeros(4, 1, 2)}, r"pair_bias is \(4, 1, 2\), expected floating point \(4, 1, 1\)"),
        ({"pair_bias": 0.5}, "pair_bias is float, expected"),
        ({"k_layout": PackedLayout.from_counts([[8]])}, "k_layout has 1 samples, expected layout's 2"),
        ({"k_layout": PackedLayout.from_counts([[5], [4]])}, "k has 8 tokens, expected the layout's 9"),
        ({"mask": AttentionMask.isolated(3)}, "visible has rows"),
        ({"mask": torch.ones(8, 8, dtype=torch.bool)}, "mask is Tensor, expected AttentionMask or None"),
        ({"layout": torch.tensor([0, 5, 8])}, "layout is Tensor, expected PackedLayout"),
        ({"q": [[0.0]]}, "q is list, expected a tensor"),
        ({"impl": "fast"}, "impl is 'fast', expected one of"),
        ({"q": torch.randn(8, 4, 16).to("meta")}, "q is on meta, expected the layout's cpu"),
        ({name: torch.ones(8, 4, 16, dtype=torch.int32) for name in "qkv"}, "q is torch.int32, expected float32"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_second_order_gradients_are_refused(impl):
    q = torch.randn(8, 4, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(_call(q=q, impl=impl).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: only first-order"):
        gradient.sum().backward()


def test_an_implementation_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _call(impl="triton")
