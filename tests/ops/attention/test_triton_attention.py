"""The Triton kernels through the interpreter: values and gradients under the error rule, isolation, strides, tiles.

Small blocks, so that a short sample still has full, partial and skipped tiles; the interpreter takes about a second for
a hundred tokens.  bf16 is refused there (its products are wrong in the interpreter) and is owed to a GPU.
"""

import pytest
import torch
from attention_oracle import MASKS, NUM_MODALITIES, check, make_qkv, shared_layout

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention import configs
from mmkernels.ops.attention.configs import Config
from mmkernels.testing import poisoned_empty

pytestmark = pytest.mark.interpreter

WIDE, TALL = Config(16, 32, 4, 1), Config(32, 16, 4, 1)
SHAPES = [(1, 1, 16), (2, 1, 24), (2, 2, 8), (1, 1, 33)]


@pytest.fixture(autouse=True)
def _small_blocks():
    # Unequal sides, so that rows and columns cannot be confused.
    with configs.override(fwd=TALL, dkdv=TALL, dq=WIDE):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_error_rule(kind, dtype):
    seed = list(MASKS).index(kind) + (11 if dtype == torch.float16 else 0)
    layout = shared_layout(seed, max_length=16)
    mask = MASKS[kind](layout, seed)
    heads, kv_heads, width = SHAPES[seed % len(SHAPES)]
    with poisoned_empty():
        check(layout, mask, impl="triton", dtype=dtype, heads=heads, kv_heads=kv_heads, width=width, seed=seed)


# Nothing; one token between empty samples; whole blocks exactly, and one token to either side.
@pytest.mark.parametrize("counts", [[[0, 0]], [[0, 0], [1, 0], [0, 0]], [[31, 1], [33, 0], [0, 64]]], ids=str)
def test_edges(counts):
    layout = PackedLayout.from_counts(counts)
    with poisoned_empty():
        check(
            layout,
            AttentionMask(causal=True, visible=[[1, 0], [1, 1]]),
            impl="triton",
            dtype=torch.float32,
            heads=1,
            kv_heads=1,
        )


def test_full_tiles_run_unmasked_and_blind_rows_are_zero():
    layout = PackedLayout.from_counts([[64, 32, 32]])
    mask = AttentionMask(visible=[[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    spans = MaskPlan.lower(layout, mask).tiles("query", TALL.rows, TALL.cols).spans
    assert (spans[:, 2] == 0).all()  # this case takes the unmasked loop alone
    check(layout, mask, impl="triton", dtype=torch.float32, heads=1, kv_heads=1)
    qkv = make_qkv(layout, 1, 1, 16, torch.float32, 0)
    with poisoned_empty():
        out, lse = attention(*qkv.split(1, 1), layout=layout, mask=mask, return_lse=True, impl="triton")
        (gradient,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert (out[96:] == 0).all()
    assert (lse[:, 96:] == float("-inf")).all()
    assert (gradient[96:] == 0).all()


def test_gradient_through_lse_equals_the_reference():
    layout = shared_layout(2, max_length=16)
    mask = MASKS["visible_blind"](layout, 2)
    qkv = make_qkv(layout, 2, 1, 16, torch.float32, 0)
    weights = torch.randn(2, layout.total_tokens)
    gradients = []
    for impl in ("triton", "reference"):
        out, lse = attention(*qkv.split((2, 1, 1), 1), layout=layout, mask=mask, return_lse=True, impl=impl)
        loss = out.square().sum() + (torch.where(lse.isinf(), 0, lse) * weights).sum()
        gradients.append(torch.autograd.grad(loss, qkv)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [1e30, float("nan")])
@pytest.mark.parametrize("kind", ["document", "visible_blind", "causal"])
def test_samples_are_isolated_bit_for_bit(kind, poison):
    layout = PackedLayout.from_segments([[(0, 5)], [(1, 20), (0, 17)], [(2, 3)]], num_modalities=NUM_MODALITIES)
    mask = MASKS[kind](layout, 1)
    keep = slice(5, 42)
    results = []
    for spoil in (False, True):
        qkv = make_qkv(layout, 1, 1, 16, torch.float32, 0)
        do = torch.randn((45, 1, 16), generator=torch.Generator().manual_seed(1))
        if spoil:
            with torch.no_grad():
                for t in (qkv, do):
                    t[: keep.start], t[keep.stop :] = poison, poison
        out, lse = attention(*qkv.split(1, 1), layout=layout, mask=mask, return_lse=True, impl="triton")
        results.append((out[keep], lse[:, keep], torch.autograd.grad(out, qkv, do)[0][keep]))
    for clean, spoilt in zip(*results, strict=True):
        assert torch.equal(clean, spoilt)


def test_strided_views_of_one_projection():
    layout = shared_layout(1, max_length=16)
    projection = torch.randn(layout.total_tokens, 3, 2, 16)
    strided = attention(*projection.unbind(1), layout=layout, impl="triton")
    copied = attention(*(t.contiguous() for t in projection.unbind(1)), layout=layout, impl="triton")
    assert torch.equal(strided, copied)


def test_default_tiles_give_the_same_numbers():
    layout = PackedLayout.from_counts([[50, 20], [0, 9]])
    mask = AttentionMask(causal=True)
    q, k, v = torch.randn(79, 3, 1, 16).unbind(1)
    with configs.override(fwd=configs.select("sm_80", "fp32", 16).fwd[0]):
        small = attention(q, k, v, layout=layout, mask=mask, impl="triton")
    with configs.override(fwd=configs.select("sm_90", "bf16", 64).fwd[0]):
        layout = PackedLayout.from_counts([[50, 20], [0, 9]])  # schedules are cached on the layout
        default = attention(q, k, v, layout=layout, mask=mask, impl="triton")
    torch.testing.assert_close(small, default, rtol=1e-6, atol=1e-6)


def test_bf16_is_refused():
    layout = PackedLayout.from_counts([[4]])
    q = torch.randn(4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bf16"):
        attention(q, q, q, layout=layout, impl="triton")
