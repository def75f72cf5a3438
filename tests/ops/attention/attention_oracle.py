"""What attention is compared with: a dense float64 oracle and torch's SDPA, both on the brute-force mask.

T tokens, H heads, G key/value heads, D head width, M modalities.  In self-attention queries, keys and values are one
leaf [T, H + 2 G, D], so that every test also runs on strided views.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
import torch
import torch.nn.functional as F

from mmkernels import AttentionMask, attention, dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.attention.reference import dropout_keep
from mmkernels.testing import assert_error_rule, random_layout, reference_mask

NUM_MODALITIES = 3
# Those that can run here, of the CPU's row of the table; the reference is too slow for thousands of cases.
CPU_IMPLS = [
    impl
    for impl in dispatch.TABLE["attention"]["cpu"]
    if impl != "reference"
    and dispatch.missing("attention", impl, device=torch.device("cpu"), dtype=torch.float32) is None
]


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


# What cross-attention takes.
CROSS_MASKS = {
    "document": lambda layout, seed: None,
    "causal": lambda layout, seed: AttentionMask(causal=True),
    "causal_top_left": lambda layout, seed: AttentionMask(causal=True, align="top_left"),
    "window": lambda layout, seed: AttentionMask(window=(seed % 5, 3)),
    "visible_causal": lambda layout, seed: AttentionMask(causal=True, visible=_visibility(seed, blind=True)),
}


@functools.cache
def shared_layout(seed, max_length=24):
    return random_layout(seed, num_modalities=NUM_MODALITIES, max_length=max_length)


# Pair by pair in Python, so each layout's is made once and shared by dtypes.  Layouts compare by identity.
brute_force = functools.lru_cache(maxsize=256)(reference_mask)


@dataclass(frozen=True)
class Case:
    """One call of attention and all that its results are compared with."""

    layout: PackedLayout
    mask: AttentionMask | None
    k_layout: PackedLayout | None = None
    heads: int = 2
    kv_heads: int = 2
    width: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    pair_bias: bool = False
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def softmax_scale(self) -> float:
        return self.width**-0.5 if self.scale is None else self.scale

    @property
    def keys(self) -> PackedLayout:
        return self.layout if self.k_layout is None else self.k_layout

    @functools.cached_property
    def seen(self) -> torch.Tensor:
        return brute_force(self.layout, self.mask, self.k_layout)

    @functools.cached_property
    def leaves(self) -> list[torch.Tensor]:
        """[qkv] or [q, kv], and the pair bias in fp32."""
        generator = torch.Generator().manual_seed(self.seed)
        groups = [self.heads + 2 * self.kv_heads] if self.k_layout is None else [self.heads, 2 * self.kv_heads]
        tokens = [self.layout.total_tokens, self.keys.total_tokens]
        leaves = [
            torch.randn(T, n, self.width, generator=generator).to(self.dtype)
            for T, n in zip(tokens, groups, strict=False)
        ]
        if self.pair_bias:
            M = (self.layout.num_modalities, self.keys.num_modalities)
            leaves.append(torch.randn(self.heads, *M, generator=generator))
        return leaves

    def arguments(self, leaves):
        """q, k, v, pair_bias as views of leaves of any dtype."""
        bias = leaves[-1] if self.pair_bias else None
        if self.k_layout is None:
            return *leaves[0].split((self.heads, self.kv_heads, self.kv_heads), 1), bias
        return leaves[0], *leaves[1].split(self.kv_heads, 1), bias

    @functools.cached_property
    def gradients(self):
        """Of out, in its dtype, and of lse."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        do = torch.randn(self.layout.total_tokens, self.heads, self.width, generator=generator).to(self.dtype)
        return do, torch.randn(self.heads, self.layout.total_tokens, generator=generator)

    @functools.cached_property
    def keep(self):
        """bool [H, Tq, Tk]: the dropout mask that a call under torch.manual_seed(seed) draws; None without dropout."""
        if self.dropout_p == 0.0:
            return None
        torch.manual_seed(self.seed)
        rng = torch.randint(2**63 - 1, (2,))
        axes = (torch.arange(n) for n in (self.heads, self.layout.total_tokens, self.keys.total_tokens))
        return dropout_keep(rng, *torch.meshgrid(*axes, indexing="ij"), self.dropout_p)


def make_qkv(layout, heads, kv_heads, width, dtype, seed):
    case = Case(layout, None, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, seed=seed)
    return case.leaves[0].requires_grad_()


def dense_oracle(case, q, k, v, bias):
    """out, lse and modality mass in the inputs' dtype, from the definition."""
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * case.softmax_scale
    scores = _add_bias(case, scores, bias).masked_fill(~case.seen, -inf)
    lse = torch.logsumexp(scores, 2)
    p = torch.where(case.seen, torch.exp(scores - torch.where(lse.isinf(), 0, lse).unsqueeze(2)), 0)
    return torch.einsum("hqk,khd->qhd", _drop(case, p), v), lse, _mass(case, p)


def _add_bias(case, scores, bias):
    if bias is None:
        return scores
    return scores + bias.to(scores.dtype)[:, case.layout.modality_ids.long()][:, :, case.keys.modality_ids.long()]


def _drop(case, p):
    keep = case.keep
    return p if keep is None else p * keep / (1 - case.dropout_p)


def _mass(case, p):
    of_key = F.one_hot(case.keys.modality_ids.long(), case.keys.num_modalities)
    return torch.einsum("hqk,km->qhm", p, of_key.to(p.dtype))


def torch_best(case, q, k, v, bias):
    """out, lse and mass as torch computes them best in the inputs' dtype.  lse and mass take no part in autograd."""
    lse, mass = _torch_lse_and_mass(case, *(None if t is None else t.detach() for t in (q, k, v, bias)))
    if case.dropout_p:
        return _torch_rounded(case, q, k, v, bias), lse, mass  # SDPA draws masks of its own
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    blind = ~case.seen.any(1)
    q_modality, k_modality = case.layout.modality_ids.long(), case.keys.modality_ids.long()
    outs, lses = [q[:0]], [lse[:, :0]]  # of no sample, but part of the graph
    for rows, keys in zip(*(_samples(side) for side in (case.layout, case.keys)), strict=True):
        if rows.start == rows.stop or keys.start == keys.stop:
            outs.append(torch.zeros_like(q[rows]))
            lses.append(torch.full_like(lse[:, rows], -inf))
            continue
        heads = [t[at].transpose(0, 1).unsqueeze(0) for t, at in ((q, rows), (k, keys), (v, keys))]
        # SDPA has no answer for a row that sees nothing: let it see all, then overwrite.
        allowed = case.seen[rows, keys] | blind[rows, None]
        if bias is not None:
            dense = bias.to(q.dtype)[:, q_modality[rows]][:, :, k_modality[keys]]
            allowed = dense.masked_fill(~allowed, -inf).unsqueeze(0)
        out = F.scaled_dot_product_attention(*heads, attn_mask=allowed, scale=case.softmax_scale)[0].transpose(0, 1)
        outs.append(out.masked_fill(blind[rows, None, None], 0))
        dense = allowed if bias is not None else torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -inf)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _, sample_lse = flash(*(t.detach() for t in heads), attn_mask=dense.detach(), scale=case.softmax_scale)
        lses.append(sample_lse[0].masked_fill(blind[rows], -inf))
    return torch.cat(outs), torch.cat(lses, 1), mass


def _samples(layout):
    return [slice(start, stop) for start, stop in pairwise(layout.cu_seqlens.tolist())]


def _torch_lse_and_mass(case, q, k, v, bias):
    """With scores and softmax in fp32, as every fused kernel has them."""
    _, lse, mass = dense_oracle(case, *(None if t is None else t.float() for t in (q, k, v, bias)))
    return lse, mass


def _torch_rounded(case, q, k, v, bias):
    """Scores and softmax in fp32, probabilities rounded to the dtype: what a fused kernel does, without its tiling."""
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * case.softmax_scale
    scores = _add_bias(case, scores, bias).masked_fill(~case.seen, -inf)
    lse = torch.logsumexp(scores, 2)
    p = torch.where(case.seen, torch.exp(scores - torch.where(lse.isinf(), 0, lse).unsqueeze(2)), 0)
    p = _drop(case, p).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", p.float(), v.float()).to(q.dtype)


def check(layout, mask, *, impl, mass=False, lse_gradient=False, pool=None, **options):
    """Values, lse, modality mass (if `mass`) and gradients of one case under the error rule; options are Case's.

    With a Pool the results are only added to it.
    """
    case = Case(layout, mask, **options)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    torch.manual_seed(case.seed)
    out, lse, *masses = attention(
        q, k, v, layout=layout, k_layout=case.k_layout, mask=mask, scale=case.scale, pair_bias=bias,
        dropout_p=case.dropout_p, return_lse=True, return_modality_mass=mass, impl=impl,
    )  # fmt: skip
    compare(case, leaves, out, lse, masses[0] if mass else None, lse_gradient, pool)


class Pool:
    """Results of many cases, held to the error rule together: a small case may be unlucky where torch is lucky.

    max_ratio  of our largest error to torch's.  More than the rule's 2 where torch has no kernel of its own (dropout):
               the chain in its place rounds otherwise, and the largest of many errors is luck.  A mistake in one case
               is far beyond it
    """

    def __init__(self, max_ratio=2.0):
        self.results, self.max_ratio = {}, max_ratio

    def add(self, name, *parts):
        self.results.setdefault(name, []).append([part.flatten() for part in parts])

    def check(self):
        for name, cases in self.results.items():
            parts = (torch.cat(parts) for parts in zip(*cases, strict=True))
            assert_error_rule(name, *parts, max_ratio=self.max_ratio)


def compare(case, leaves, out, lse, mass, lse_gradient=False, pool=None):
    """Raises AssertionError unless out, lse, mass and the gradients of leaves keep to the error rule."""
    results = {"out": out.detach(), "lse": lse.detach()}
    if mass is not None:
        assert not mass.requires_grad
        results["mass"] = mass
    do, dlse = case.gradients
    loss = (out.double() * do.double()).sum()
    if lse_gradient:
        loss = loss + (torch.where(lse.isinf(), 0, lse).double() * dlse.double()).sum()
    gradients = case.arguments(torch.autograd.grad(loss, leaves))
    results |= {name: g for name, g in zip(GRADIENTS, gradients, strict=True) if g is not None}
    expected = _expected(case, lse_gradient)
    for name, ours in results.items():
        (assert_error_rule if pool is None else pool.add)(name, ours, *expected[name])


GRADIENTS = ("dq", "dk", "dv", "dbias")


@functools.lru_cache(maxsize=256)  # shared by the implementations
def _expected(case, lse_gradient):
    """Per name the exact result and torch's."""
    wide = [leaf.double().requires_grad_() for leaf in case.leaves]
    same = [leaf.clone().requires_grad_() for leaf in case.leaves]
    ref_out, ref_lse, ref_mass = dense_oracle(case, *case.arguments(wide))
    same_out, same_lse, same_mass = torch_best(case, *case.arguments(same))
    do, dlse = case.gradients
    losses = [(ref_out * do.double()).sum(), (same_out.double() * do.double()).sum()]
    if lse_gradient:
        # torch's kernels have no gradient of lse: its own chain in fp32 stands in for them.
        again = [leaf.detach().clone().requires_grad_() for leaf in same]
        upcast = [t if t is None else t.float() for t in case.arguments(again)]
        finite = torch.isfinite(ref_lse)
        for i, value in enumerate((ref_lse, dense_oracle(case, *upcast)[1])):
            losses[i] = losses[i] + (torch.where(finite, value.double(), 0) * dlse.double()).sum()
        same = [*same, *again]
    ref = torch.autograd.grad(losses[0], wide)
    torchs = torch.autograd.grad(losses[1], same, allow_unused=True)
    torchs = [torch.zeros_like(x) if g is None else g for g, x in zip(torchs, same, strict=True)]
    if lse_gradient:
        torchs = [(a.double() + b.double()).to(a.dtype) for a, b in zip(*_halves(torchs), strict=True)]
    gradients = zip(case.arguments(ref), case.arguments(torchs), strict=True)
    return {
        "out": (ref_out.detach(), same_out.detach()),
        "lse": (ref_lse.detach(), same_lse),
        "mass": (ref_mass.detach(), same_mass),
    } | dict(zip(GRADIENTS, gradients, strict=True))


def _halves(values):
    half = len(values) // 2
    return values[:half], values[half:]


def check_plan(plan, layout, mask, *, dtype, scale_factor=1.0, bias_factor=None, heads=4, kv_heads=2, width=32):
    """The reference on `plan` (perhaps spoilt) held to the error rule of what `mask` means on `layout`.

    The reference is used because it is exact: what fails the rule is then the mistake, not the rounding.
    bias_factor: with a pair bias, times this in the call alone.
    """
    from mmkernels.ops.attention import reference

    case = Case(
        layout, mask, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, pair_bias=bias_factor is not None
    )
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    bias = bias if bias is None else bias * bias_factor
    tail = (case.softmax_scale * scale_factor, plan.has_visible, 0.0, 0, "reference")
    tables = (plan.q_table, plan.k_table, *reference.schedule(plan, None))
    out, lse, _ = torch.ops.mm.attention_fwd(q, k, v, bias, None, *tables, *tail)
    compare(case, leaves, out, lse, None)
