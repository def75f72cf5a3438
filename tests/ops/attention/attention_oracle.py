"""What attention is compared with: a dense float64 oracle and torch's SDPA, both on the brute-force mask.

T tokens, H heads, G key/value heads, D head width.  Queries, keys and values are one leaf [T, H + 2 G, D], so that
every test also runs on strided views.
"""

import functools
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from mmkernels import AttentionMask, attention
from mmkernels.testing import assert_error_rule, random_layout, reference_mask

NUM_MODALITIES = 3


def _visibility(seed, blind=False):
    """A random [M, M] that is not symmetric; with `blind`, modality 0 sees nothing but is seen."""
    visible = np.random.default_rng(seed).random((NUM_MODALITIES, NUM_MODALITIES)) < 0.6
    visible[:, 1] = True
    if blind:
        visible[0] = False
    return visible


def _prefix(layout, seed):
    lengths = layout.cu_seqlens.diff().numpy()
    return tuple(np.random.default_rng(seed).integers(0, lengths + 2).tolist())


# Every kind of interval the plan can hold, and bits on top of the common ones.  Each takes (layout, seed).
MASKS = {
    "document": lambda layout, seed: None,
    "causal": lambda layout, seed: AttentionMask(causal=True),
    "window": lambda layout, seed: AttentionMask(window=(seed % 5, 3)),
    "causal_window": lambda layout, seed: AttentionMask(causal=True, window=(4, -1)),
    "prefix": lambda layout, seed: AttentionMask(causal=True, prefix=_prefix(layout, seed)),
    "bidirectional": lambda layout, seed: AttentionMask(causal=True, bidirectional=(1,)),
    "bidirectional_window": lambda layout, seed: AttentionMask(
        causal=True, bidirectional=(0, 2), window=(6, -1), window_scope="causal"
    ),
    "isolated": lambda layout, seed: AttentionMask.isolated(NUM_MODALITIES),
    "visible": lambda layout, seed: AttentionMask(visible=_visibility(seed)),
    "visible_blind": lambda layout, seed: AttentionMask(visible=_visibility(seed, blind=True)),
    "visible_causal": lambda layout, seed: AttentionMask(causal=True, visible=_visibility(seed)),
}


@functools.cache
def shared_layout(seed, max_length=24):
    return random_layout(seed, num_modalities=NUM_MODALITIES, max_length=max_length)


def make_qkv(layout, heads, kv_heads, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.total_tokens, heads + 2 * kv_heads, width)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def dense_oracle(q, k, v, seen, scale):
    """out, lse in the inputs' dtype, from the definition."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, 2)
    p = torch.where(seen, torch.exp(scores - torch.where(lse.isinf(), 0, lse).unsqueeze(2)), 0)
    return torch.einsum("hqk,khd->qhd", p, v), lse


def torch_best(q, k, v, seen, scale, cu_seqlens):
    """out and lse by torch's SDPA per sample, in the inputs' dtype.  lse takes no part in autograd."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    blind = ~seen.any(1)
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [torch.zeros(q.shape[1], 0)]
    for start, stop in pairwise(cu_seqlens):
        if start == stop:
            continue
        heads = [t[start:stop].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        # SDPA has no answer for a row that sees nothing: let it see all, then overwrite.
        allowed = seen[start:stop, start:stop] | blind[start:stop, None]
        out = F.scaled_dot_product_attention(*heads, attn_mask=allowed, scale=scale)[0].transpose(0, 1)
        outs.append(out.masked_fill(blind[start:stop, None, None], 0))
        bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _, lse = flash(*(t.detach() for t in heads), attn_mask=bias, scale=scale)
        lses.append(lse[0].masked_fill(blind[start:stop], float("-inf")))
    return torch.cat(outs), torch.cat(lses, 1)


# Pair by pair in Python, so each layout's is made once and shared by dtypes.  Layouts compare by identity.
brute_force = functools.lru_cache(maxsize=256)(reference_mask)


def check(layout, mask, *, impl, dtype, heads=2, kv_heads=2, width=16, seed=0, scale=None):
    """Values, lse and gradients of one case under the error rule."""
    groups = (heads, kv_heads, kv_heads)
    qkv = make_qkv(layout, heads, kv_heads, width, dtype, seed)
    out, lse = attention(*qkv.split(groups, 1), layout=layout, mask=mask, scale=scale, return_lse=True, impl=impl)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    (gradient,) = torch.autograd.grad(out, qkv, do)
    compare(layout, mask, qkv, groups, scale, out, lse, do, gradient)


def compare(layout, mask, qkv, groups, scale, out, lse, do, gradient):
    """Raises AssertionError unless out, lse and the gradient of qkv keep to the error rule."""
    scale = scale if scale is not None else qkv.shape[2] ** -0.5
    seen = brute_force(layout, mask)
    wide = qkv.detach().double().requires_grad_()
    ref_out, ref_lse = dense_oracle(*wide.split(groups, 1), seen, scale)
    (ref_gradient,) = torch.autograd.grad(ref_out, wide, do.double())
    same = qkv.detach().clone().requires_grad_()
    same_out, same_lse = torch_best(*same.split(groups, 1), seen, scale, layout.cu_seqlens.tolist())
    same_gradient = torch.zeros_like(same)
    if same_out.requires_grad:
        (same_gradient,) = torch.autograd.grad(same_out, same, do)
    assert_error_rule("out", out.detach(), ref_out.detach(), same_out.detach())
    assert_error_rule("lse", lse.detach(), ref_lse.detach(), same_lse.detach())
    parts = zip(*(g.split(groups, 1) for g in (gradient, ref_gradient, same_gradient)), strict=True)
    for name, (ours, ref, torchs) in zip(("dq", "dk", "dv"), parts, strict=True):
        assert_error_rule(name, ours, ref, torchs)


def check_plan(plan, layout, mask, *, dtype, scale_factor=1.0, heads=4, kv_heads=2, width=32):
    """The reference on `plan` (perhaps spoilt) held to the error rule of what `mask` means on `layout`.

    The reference is used because it is exact: what fails the rule is then the mistake, not the rounding.
    """
    from mmkernels.ops.attention import reference

    groups = (heads, kv_heads, kv_heads)
    qkv = make_qkv(layout, heads, kv_heads, width, dtype, 0)
    scale = width**-0.5
    arguments = (plan.table, *reference.schedule(plan, qkv, True), scale * scale_factor, plan.has_visible, "reference")
    out, lse = torch.ops.mm.attention_fwd(*qkv.split(groups, 1), *arguments)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad(out, qkv, do)
    compare(layout, mask, qkv, groups, scale, out, lse, do, gradient)
