"""Config.late of the Triton kernels through the interpreter: products that come a block later change no bit.

The sums are the same in the same order, so that they are compared bit for bit with those in their place, and with
float64.  That the products are then in flight while a softmax is computed, test_late_compiles.py shows.
"""

from dataclasses import replace

import pytest
import torch
from attention_oracle import Case, check

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention import configs, triton_kernels
from mmkernels.ops.attention.configs import KERNELS, NEVER_LATE, Candidates, Config
from mmkernels.testing import poisoned_empty

pytestmark = pytest.mark.interpreter

# Unequal sides, so that rows and columns cannot be confused.
WIDE, TALL = Config(16, 32, 4, 1), Config(32, 16, 4, 1)
TILES = {"fwd": TALL, "dkdv": TALL, "dq": WIDE}
# Loops of no, one and several whole blocks, before and after masked ones; a sample that ends within a block.
COUNTS = [[64, 30, 40], [0, 16, 0], [9, 0, 17]]
VISIBLE = AttentionMask(visible=[[True, True, False], [False, True, False], [False, False, False]])  # and blind rows
CASES = {
    "full": (None, {"heads": 2, "kv_heads": 1}),
    "causal, dropout, mass": (AttentionMask(causal=True), {"dropout_p": 0.3, "mass": True, "lse_gradient": True}),
    "visible, everything": (VISIBLE, {"dropout_p": 0.3, "pair_bias": True, "mass": True}),
    "padded width": (AttentionMask(causal=True, window=(70, -1)), {"width": 24, "pair_bias": True}),
}


@pytest.fixture(autouse=True)
def _spans_of_their_own(monkeypatch):
    """Tiles of few columns too walk whole blocks in the loop that is meant here."""
    monkeypatch.setattr(triton_kernels, "JOINED", 0)


def overridden(late, tma=False):
    moved = ("fwd", "dkdv") if late else ()
    return configs.override(**{name: replace(c, tma=tma, late=name in moved) for name, c in TILES.items()})


def results(name, dtype, late, schedule="sample", tma=False):
    """out, lse, perhaps mass, and the gradients."""
    mask, options = CASES[name]
    options = {"heads": 1, "kv_heads": 1, "width": 16} | options
    with_mass, with_lse = options.pop("mass", False), options.pop("lse_gradient", False)
    case = Case(PackedLayout.from_counts(COUNTS), mask, dtype=dtype, **options)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    torch.manual_seed(0)
    with overridden(late, tma), configs.override(schedule=schedule), poisoned_empty():
        out, lse, *masses = attention(
            q, k, v, layout=case.layout, mask=mask, pair_bias=bias, dropout_p=case.dropout_p, return_lse=True,
            return_modality_mass=with_mass, impl="triton", deterministic=True,
        )  # fmt: skip
        do, dlse = case.gradients
        loss = (out * do).sum() + ((torch.where(lse.isinf(), 0, lse) * dlse).sum() if with_lse else 0)
        return out, lse, *masses, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bit_for_bit(name, dtype):
    schedule, tma = ("sample", True) if dtype == torch.float16 else ("token", False)
    expected, found = (results(name, dtype, late, schedule, tma) for late in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("mask", [None, AttentionMask(causal=True)], ids=["full", "causal"])
def test_a_span_reads_nothing_before_it(mask):
    """The block before a span's first is another sample's, whose NaN times 0 would be seen."""
    sample = slice(10, 58)
    found = []
    for poison in (1.0, float("nan")):
        layout = PackedLayout.from_counts([[10], [48], [7]])
        qkv = torch.randn(65, 3, 1, 16, generator=torch.Generator().manual_seed(0))
        qkv[: sample.start] = qkv[sample.stop :] = poison
        with overridden(True), configs.override(schedule="sample"):
            found.append(attention(*qkv.unbind(1), layout=layout, mask=mask, impl="triton")[sample])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["full", "visible, everything"])
def test_error_rule(name, dtype):
    mask, options = CASES[name]
    with overridden(True), poisoned_empty():
        check(PackedLayout.from_counts(COUNTS), mask, impl="triton", dtype=dtype, **options)


def test_the_cases_have_spans_of_several_whole_blocks():
    for mask, _ in CASES.values():
        plan = MaskPlan.lower(PackedLayout.from_counts(COUNTS), mask)
        for rows, config in (("query", TALL), ("query", WIDE), ("key", TALL)):
            spans = plan.tiles(rows, config.rows, config.cols, "sample", 0).spans
            assert any(end - start >= 2 * config.cols for start, end, masked in spans.tolist() if not masked)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_that_have_none_refuse_it(kernel):
    candidates = dict.fromkeys(KERNELS, (TALL,)) | {kernel: (replace(TALL, late=True),)}
    if kernel in NEVER_LATE:
        with pytest.raises(ValueError, match=f"late is True for {kernel}"):
            Candidates(**candidates)
    else:
        Candidates(**candidates)
