"""attention: softmax attention over packed sequences, with masks that flash kernels do not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.ops.attention import op as _op  # noqa: F401  registers torch.ops.mm.attention_*

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: PackedLayout,
    k_layout: PackedLayout | None = None,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    pair_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    return_modality_mass: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over the keys that `mask` lets each query see, per sample of `layout`.

    q [T, H, D], k and v [T, G, D], H % G == 0, D in 8..256, of one dtype: fp32, bf16 or fp16 (fp64 by the reference).
    Any strides with the last dimension contiguous: views of one [T, 3, H, D] projection are taken as they are.
    scale is positive; None means 1/sqrt(D).  Sums and softmax are in fp32.

    Returns out [T, H, D] in q's dtype; with return_lse also the natural logarithm of each softmax denominator, fp32
    [H, T], differentiable.  A query that sees nothing gets 0, lse -inf and gradient 0.  Samples never touch one
    another, also when they hold NaN (but in the dense reference NaN spreads).  First-order gradients for q, k, v, in
    reverse mode; they are deterministic.

    k_layout, pair_bias, dropout_p and return_modality_mass come with issue 3.  impl is "auto", "reference", "torch" or
    "triton"; see `mmkernels.explain()`.

    Raises ValueError for shapes, dtypes, devices or masks that do not fit, NotImplementedError for what is not there
    yet, RuntimeError when `impl` cannot run here.
    """
    _refuse_what_issue_3_brings(k_layout, pair_bias, dropout_p, return_modality_mass)
    _check_types(q, k, v, layout, mask)
    _check(q, k, v, layout)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[2])
    elif not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"attention: scale is {scale}, expected a positive finite number")
    plan = MaskPlan.lower(layout, mask)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    needs_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    impl, schedule = _prepare(plan, q, impl, needs_backward)
    out, lse = torch.ops.mm.attention_fwd(q, k, v, plan.table, *schedule, float(scale), plan.has_visible, impl)
    return (out, lse) if return_lse else out


def _prepare(plan: MaskPlan, q: Tensor, impl: str, needs_backward: bool) -> tuple[str, tuple]:
    """The implementation that runs, and what it makes of the plan: once, then shared by all layers."""
    key = (impl, q.dtype, q.shape[2], needs_backward)
    prepared = plan.cache.get(key)
    if prepared is None:
        if torch.compiler.is_compiling():
            # Host code that Dynamo cannot trace.  Lowering as an op of its own comes with issue 3.
            raise RuntimeError(
                "attention: inside torch.compile the layout must have met this mask, dtype, head width and "
                "requires_grad before; call attention on it once outside"
            )
        impl = dispatch.resolve("attention", impl, device=q.device, dtype=q.dtype)
        schedule = dispatch.load("attention", impl).schedule(plan, q, needs_backward)
        prepared = plan.cache[key] = (impl, schedule)
    return prepared


def _refuse_what_issue_3_brings(k_layout, pair_bias, dropout_p: float, return_modality_mass: bool) -> None:
    if k_layout is not None:
        raise NotImplementedError("attention: k_layout (cross-attention) comes with issue 3")
    if pair_bias is not None:
        raise NotImplementedError("attention: pair_bias comes with issue 3")
    if dropout_p != 0.0:
        raise NotImplementedError(f"attention: dropout_p is {dropout_p}; dropout comes with issue 3")
    if return_modality_mass:
        raise NotImplementedError("attention: return_modality_mass comes with issue 3")


def _check_types(q, k, v, layout, mask) -> None:
    """What users of other attention functions pass by habit: bounds for the layout, a dense mask."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise ValueError(f"attention: {name} is {type(t).__name__}, expected a tensor [T, heads, D]")
    if not isinstance(layout, PackedLayout):
        raise ValueError(
            f"attention: layout is {type(layout).__name__}, expected PackedLayout; PackedLayout.from_cu_seqlens takes "
            "bounds"
        )
    if mask is not None and not isinstance(mask, AttentionMask):
        raise ValueError(
            f"attention: mask is {type(mask).__name__}, expected AttentionMask or None; dense masks are not taken"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 3:
            raise ValueError(f"attention: {name} has shape {tuple(t.shape)}, expected [T, heads, D]")
        if t.shape[0] != layout.total_tokens:
            raise ValueError(f"attention: {name} has {t.shape[0]} tokens, expected the layout's {layout.total_tokens}")
        if t.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {t.dtype}, expected q's {q.dtype}")
        if t.device != layout.device:
            raise ValueError(f"attention: {name} is on {t.device}, expected the layout's {layout.device}")
    if q.dtype not in DTYPES:
        raise ValueError(f"attention: q is {q.dtype}, expected float32, bfloat16, float16 or float64")
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[2]
    if k.shape != v.shape or k.shape[2] != width:
        raise ValueError(
            f"attention: k is {tuple(k.shape)} and v {tuple(v.shape)}, expected both [T, G, {width}] as q has D {width}"
        )
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: k has {kv_heads} heads, expected a divisor of q's {heads}")
    if not MIN_HEAD_DIM <= width <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head width is {width}, expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
