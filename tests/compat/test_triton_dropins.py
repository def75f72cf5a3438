"""The drop-ins over the Triton kernels, in the interpreter: intervals, bits, heads as samples; device-side bounds."""

import pytest
import torch
import torch.nn.functional as F

from mmkernels.compat import mask_reading, padded
from mmkernels.compat.flash_attn import flash_attn_func
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as ours
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, KeyIntervals

pytestmark = pytest.mark.interpreter

B, H, L, D = 2, 2, 21, 16
LENGTHS = torch.tensor([21, 9])
REAL = torch.arange(L) < LENGTHS[:, None]
KEYS = REAL[:, None, None]
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()
MASKS = {"padding": KEYS, "causal": KEYS & CAUSAL, "left": KEYS.flip(-1), "hole": KEYS & (torch.arange(L) != 4)}


def qkv(contiguous=False):
    q, k, v = (t.transpose(1, 2) for t in torch.randn(B, L, 3, H, D).unbind(2))
    tensors = (t.contiguous() for t in (q, k, v)) if contiguous else (q, k, v)
    return [t.detach().requires_grad_() for t in tensors]


def same(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grad_output = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad_output) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, contiguous):
    leaves = qkv(contiguous)
    found = ours(*leaves, MASKS[name], impl="triton")
    same(found, F.scaled_dot_product_attention(*leaves, MASKS[name]), leaves)


def test_lengths_and_window():
    leaves = qkv()
    seen = KEYS & REAL[:, None, :, None] & CAUSAL & ~CAUSAL.tril(-5)
    found = ours(*leaves, lengths=LENGTHS, is_causal=True, window=(4, -1), impl="triton")
    same(found, F.scaled_dot_product_attention(*leaves, seen), leaves)


def test_bounds_that_only_the_device_knows():
    """As lengths on a GPU are taken: nothing is read back, tiles are cut from tokens."""
    leaves = qkv()
    lo, hi = mask_reading.of_lengths(L, L, LENGTHS, LENGTHS, True, (-1, -1), False)
    bounds = torch.arange(B + 1, dtype=torch.int32) * L
    layout = PackedLayout._from_device_bounds(bounds, B * L, L, torch.zeros(B * L, dtype=torch.uint8), 1)
    mask = AttentionMask(intervals=KeyIntervals(lo.reshape(-1), hi.reshape(-1)))
    found = padded.attend(*leaves, padded.PaddedPlan(layout, None, mask, False, None), impl="triton")
    same(found, F.scaled_dot_product_attention(*leaves, KEYS & REAL[:, None, :, None] & CAUSAL), leaves)


def test_flash_attn_goes_through_the_same(monkeypatch):
    real = padded.attention
    monkeypatch.setattr(padded, "attention", lambda *t, **o: real(*t, **(o | {"impl": "triton"})))
    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in qkv()]
    found = flash_attn_func(*leaves, causal=True)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=True).transpose(1, 2)
    same(found, expected, leaves)
