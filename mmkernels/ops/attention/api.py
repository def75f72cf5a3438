"""attention: softmax attention over packed sequences, with masks that flash kernels do not have."""

from __future__ import annotations

import math
import sys
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from mmkernels import arguments, dispatch, tracing, transforms
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.ops.attention import op as _op
from mmkernels.ops.attention import quick
from mmkernels.ops.attention.inputs import Request

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MAX_SCALE = torch.finfo(torch.float32).max  # in which scores are; beyond it all of them would be infinite
# Defaults of dropout_p are 0, here and in the drop-ins, not 0.0: torch.compile(dynamic=True) makes a symbol of every
# float, and cannot hand one to a second checkpointed region.


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
    dropout_p: float = 0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    return_modality_mass: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """softmax(q k^T scale + pair_bias) v over the keys that `mask` lets each query see, per sample of `layout`.

    q [Tq, H, D], k and v [Tk, G, D], H % G == 0, D in 8..256, of one dtype: fp32, bf16 or fp16 (fp64 by the reference).
    Any strides with the last dimension contiguous: views of one [T, 3, H, D] projection are taken as they are.  (On a
    GPU tokens that lie 2**23 elements apart are brought together first.)
    Under autocast they are brought to its dtype, but for fp64.  scale is a positive number, not learned; None means
    1/sqrt(D).  Sums and softmax are in fp32.

    k_layout     layout of k and v in cross-attention, with as many samples; None: self-attention
    pair_bias    [H, Mq, Mk], added to the scaled score by the modalities of query and key; differentiable.  Finite:
                 what may not be seen is the mask's to say
    dropout_p    fraction of probabilities set to 0, the rest divided by 1 - dropout_p.  By Philox on (seed, offset,
                 head, query, key), seed and offset drawn from torch's generator of the device
    deterministic  True: gradients repeat bit by bit.  None follows torch.are_deterministic_algorithms_enabled(), False
                 allows sums whose order differs between runs, where they are faster
    impl         "auto", "reference", "torch", "cpp" or "triton"; see `mmkernels.explain()`

    Returns out [Tq, H, D] in q's dtype.  With return_lse also the natural logarithm of each softmax denominator, fp32
    [H, Tq], differentiable.  With return_modality_mass also [Tq, H, Mk] fp32: how much of each query's probability went
    to each modality, before dropout, not differentiable.  A query that sees nothing gets 0, lse -inf, mass 0 and
    gradient 0.  Samples never touch one another, also when they hold NaN (except in the dense reference, and under
    token tiles on a GPU, where a non-finite sample may reach the neighbours it shares a tile with).  First-order
    gradients for q, k, v and pair_bias, in reverse mode.

    Raises ValueError for shapes, dtypes, devices or masks that do not fit, NotImplementedError for masks that cannot
    be expressed, UnavailableError (a RuntimeError) when `impl` cannot run here.
    """
    _check_options("attention", deterministic, impl)
    q, k, v = _in_autocasts_dtype(q, k, v)
    plain = k_layout is None and pair_bias is None and dropout_p == 0 and not (return_lse or return_modality_mass)
    if plain and (out := quick.attend(q, k, v, layout, mask, scale, deterministic, impl)) is not None:
        return out
    return _attend_checked(
        "attention", q, k, v,
        layout=layout, k_layout=k_layout, mask=mask, scale=scale, pair_bias=pair_bias, dropout_p=dropout_p,
        deterministic=deterministic, return_lse=return_lse, return_modality_mass=return_modality_mass, impl=impl,
        plain=plain,
    )  # fmt: skip


def attention_qkvpacked(
    qkv: Tensor,
    *,
    layout: PackedLayout,
    k_layout: PackedLayout | None = None,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    pair_bias: Tensor | None = None,
    dropout_p: float = 0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    return_modality_mass: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """attention(*qkv.unbind(1), ...) of one projection qkv [T, 3, H, D], contiguous inside a head.

    Backward writes the gradient of qkv as one tensor.  With q, k and v apart autograd joins three by a copy of all of
    them, which is about as much traffic as the gradients themselves.  With k_layout, pair_bias, dropout_p, return_lse
    or return_modality_mass the gradient is joined after all.  Raises what `attention` does.
    """
    name = "attention_qkvpacked"
    try:
        fits = isinstance(qkv, Tensor) and qkv.ndim == 4 and qkv.shape[1] == 3
    except (RuntimeError, TypeError):  # a nested tensor, say
        fits = False
    if not fits:
        _refuse_projection(name, qkv)
    _check_options(name, deterministic, impl)
    (qkv,) = _in_autocasts_dtype(qkv)
    plain = k_layout is None and pair_bias is None and dropout_p == 0 and not (return_lse or return_modality_mass)
    if plain and (out := quick.attend_packed(qkv, layout, mask, scale, deterministic, impl)) is not None:
        return out
    try:
        q, k, v = qkv.unbind(1)
    except RuntimeError:  # of a freed storage, or of numbers that are quantized by token
        _refuse_tensor(name, qkv)
        raise
    if plain and (out := quick.attend(q, k, v, layout, mask, scale, deterministic, impl)) is not None:
        return out
    return _attend_checked(
        name, q, k, v,
        layout=layout, k_layout=k_layout, mask=mask, scale=scale, pair_bias=pair_bias, dropout_p=dropout_p,
        deterministic=deterministic, return_lse=return_lse, return_modality_mass=return_modality_mass, impl=impl,
        plain=plain,
    )  # fmt: skip


def prepare_attention(
    layout: PackedLayout,
    *,
    dtype: torch.dtype,
    head_dim: int,
    k_layout: PackedLayout | None = None,
    mask: AttentionMask | None = None,
    needs_backward: bool = True,
    deterministic: bool | None = None,
    extras: bool = False,
    impl: str = "auto",
) -> None:
    """Lower `mask` on `layout` and plan its tiles ahead, as the first `attention` call would.

    For torch.compile, whose regions cannot hold this host code.  In the process that computes: a layout that comes from
    a data worker has left its plans there.

    needs_backward  the call will be made with gradients on, and one of q, k, v and pair_bias requires one
    extras          the call will have a pair_bias, dropout or return_modality_mass
    the others      as the call will have them; dtype is autocast's where that is on

    A plan of another kind does not serve: a model that trains and evaluates on one layout prepares both.  Raises what
    `attention` would.
    """
    _check_types("prepare_attention", layout, layout if k_layout is None else k_layout, mask)
    _check_options("prepare_attention", deterministic, impl)
    if dtype not in arguments.FLOATS:
        raise ValueError(f"prepare_attention: dtype is {dtype!r}, expected {arguments.FLOAT_NAMES}")
    if not (isinstance(head_dim, int | np.integer) and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM):
        raise ValueError(f"prepare_attention: head_dim is {head_dim!r}, expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    request = Request(dtype, head_dim, bool(needs_backward), deterministic, bool(extras))
    prepared(MaskPlan.lower(layout, mask, k_layout), impl, request)


def _attend_checked(
    who: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: PackedLayout,
    k_layout: PackedLayout | None,
    mask: AttentionMask | None,
    scale: float | None,
    pair_bias: Tensor | None,
    dropout_p: float,
    deterministic: bool | None,
    return_lse: bool,
    return_modality_mass: bool,
    impl: str,
    plain: bool,
) -> Tensor | tuple[Tensor, ...]:
    """attention with all its checks.   who: the function of errors; plain: may `quick` serve the next such call"""
    asked = scale, deterministic, impl
    keys = layout if k_layout is None else k_layout
    _check_tensors(who, q, k, v)
    _check_types(who, layout, keys, mask)
    _check(who, q, k, v, layout, keys)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[2])
    elif isinstance(scale, Tensor):  # taken as a number it would get no gradient
        raise ValueError(f"{who}: scale is a tensor, expected a number; multiply q by it, and give scale=1.0")
    elif not (arguments.is_finite(scale) and 0 < scale <= MAX_SCALE):
        raise ValueError(f"{who}: scale is {scale!r}, expected a positive finite number, as float32 holds it")
    if not arguments.is_dropout(dropout_p):
        raise ValueError(f"{who}: dropout_p is {dropout_p!r}, expected a number, 0 <= dropout_p < 1")
    if pair_bias is not None:
        pair_bias = _checked_bias(who, pair_bias, q, layout, keys)
    plan = MaskPlan.lower(layout, mask, k_layout)
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    learns = (
        q.requires_grad or k.requires_grad or v.requires_grad or (pair_bias is not None and pair_bias.requires_grad)
    )
    # Under torch.func.vmap a tensor does not say that what is behind it requires a gradient.
    learns = (learns or transforms.active()) and torch.is_grad_enabled()
    impl, schedule = prepared(
        plan,
        impl,
        Request(
            dtype=q.dtype,
            head_dim=q.shape[2],
            needs_backward=learns,
            deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
            extras=pair_bias is not None or dropout_p > 0.0 or bool(return_modality_mass),
        ),
    )
    rest = (
        plan.q_table, plan.k_table, *schedule, float(scale), plan.has_visible, float(dropout_p),
        keys.num_modalities if return_modality_mass else 0, impl,
    )  # fmt: skip
    if plain and not torch.compiler.is_compiling():
        quick.remember(q, k, v, layout, mask, *asked, learns, rest)
    rng = torch.randint(2**63 - 1, (2,), device=q.device) if dropout_p > 0.0 else None
    run = torch.ops.mm.attention_fwd if torch.compiler.is_compiling() else _op.attention_fwd
    out, lse, mass = run(q, k, v, pair_bias, rng, *rest)
    if not (return_lse or return_modality_mass):
        return out
    return out, *((lse,) if return_lse else ()), *((mass,) if return_modality_mass else ())


def prepared(plan: MaskPlan, impl: str, request: Request) -> tuple[str, tuple]:
    """The implementation that runs, and what it makes of the plan: once, then shared by all layers."""
    found = plan.cache.get((impl, request))
    return _prepared_anew(plan, impl, request) if found is None else found


@tracing.host_code(
    "attention: in one graph the layout must have met a call of this kind before (mask, dtype, head width, impl, "
    "deterministic; needs_backward: does one of the inputs require a gradient; extras: pair_bias, dropout or modality "
    "mass); call mmkernels.prepare_attention with these, or attention itself, on it once outside"
)
def _prepared_anew(plan: MaskPlan, impl: str, request: Request) -> tuple[str, tuple]:
    chosen = dispatch.resolve("attention", impl, device=plan.layout.device, dtype=request.dtype)
    with torch._C._DisableFuncTorch():  # as in MaskPlan.lower
        schedule = dispatch.load("attention", chosen).schedule(plan, request)
    _leave_lengths_open(schedule)
    plan.cache[impl, request] = chosen, schedule
    return chosen, schedule


def _in_autocasts_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own attention does: all but fp64 to the dtype of autocast, where it is on."""
    if not torch._C._is_any_autocast_enabled():  # asked first: what follows takes longer than a short call should
        return tensors
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else None
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    taken = arguments.KERNEL_FLOATS
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in taken else t for t in tensors)


def _leave_lengths_open(schedule: tuple) -> None:
    """Tell Dynamo, where it is loaded, that the lengths of a schedule mean nothing to the graph.

    Else it compiles again for a batch whose tiles are 0 or 1, or no longer as many as its spans or samples by chance.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        for t in schedule:
            if isinstance(t, Tensor):
                dynamo.decorators.mark_unbacked(t, 0)


def _checked_bias(who: str, pair_bias: Tensor, q: Tensor, layout: PackedLayout, keys: PackedLayout) -> Tensor:
    """pair_bias as the kernels read it: contiguous, in the dtype of the softmax."""
    expected = (q.shape[1], layout.num_modalities, keys.num_modalities)
    is_tensor = isinstance(pair_bias, Tensor)
    if is_tensor:
        tracing.refuse_unstrided(who, "pair_bias", pair_bias)
        tracing.refuse_numberless(who, "pair_bias", pair_bias)
    if not is_tensor or tuple(pair_bias.shape) != expected or pair_bias.dtype not in arguments.FLOATS:
        found = f"{pair_bias.dtype} {tuple(pair_bias.shape)}" if is_tensor else type(pair_bias).__name__
        raise ValueError(f"{who}: pair_bias is {found}, expected floating point {expected}, [H, Mq, Mk]")
    if pair_bias.device != q.device:
        raise ValueError(f"{who}: pair_bias is on {pair_bias.device}, expected q's {q.device}")
    return pair_bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()


def _refuse_projection(who: str, qkv) -> NoReturn:
    if isinstance(qkv, Tensor):
        _refuse_tensor(who, qkv)
    came = tuple(qkv.shape) if isinstance(qkv, Tensor) else type(qkv).__name__
    raise ValueError(f"{who}: qkv is {came}, expected a tensor [T, 3, heads, head width]")


def _refuse_tensor(who: str, qkv: Tensor) -> None:
    """ValueError for what is no plain tensor of floats, whatever its shape."""
    tracing.refuse_unstrided(who, "qkv", qkv)
    tracing.refuse_numberless(who, "qkv", qkv)
    if qkv.dtype not in arguments.FLOATS:
        raise ValueError(f"{who}: qkv is {qkv.dtype}, expected {arguments.FLOAT_NAMES}")
    tracing.refuse_freed(who, "qkv", qkv)


def _check_options(who: str, deterministic, impl) -> None:
    """Before anything looks for what was kept: there these are keys."""
    if deterministic is not None and type(deterministic) is not bool:
        raise ValueError(f"{who}: deterministic is {deterministic!r}, expected True, False or None")
    arguments.one_of(who, "impl", impl, dispatch.IMPLS)


def _check_tensors(who: str, q, k, v) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise ValueError(f"{who}: {name} is {type(t).__name__}, expected a tensor [T, heads, D]")
        tracing.refuse_unstrided(who, name, t)
        tracing.refuse_numberless(who, name, t)


def _check_types(who: str, layout, keys, mask) -> None:
    """What users of other attention functions pass by habit: bounds for the layout, a dense mask."""
    for name, value in (("layout", layout), ("k_layout", keys)):
        if not isinstance(value, PackedLayout):
            raise ValueError(
                f"{who}: {name} is {type(value).__name__}, expected PackedLayout; PackedLayout.from_cu_seqlens takes "
                "bounds"
            )
    if mask is not None and not isinstance(mask, AttentionMask):
        raise ValueError(
            f"{who}: mask is {type(mask).__name__}, expected AttentionMask or None; dense masks are not taken"
        )


def _check(who: str, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, keys: PackedLayout) -> None:
    # Runs on every call of every layer: each attribute of a tensor costs 0.1 to 0.3 us, so none is asked for twice.
    dtype = q.dtype
    if dtype not in arguments.FLOATS:
        raise ValueError(f"{who}: q is {dtype}, expected {arguments.FLOAT_NAMES}")
    for name, t, side in (("q", q, layout), ("k", k, keys), ("v", v, keys)):
        if t.ndim != 3:
            raise ValueError(f"{who}: {name} has shape {tuple(t.shape)}, expected [T, heads, D]")
        if t.size(0) != side.total_tokens:
            raise ValueError(
                # format: Dynamo puts no symbol into an f-string
                "{}: {} has {} tokens, expected the layout's {}".format(  # noqa: UP032
                    who, name, t.size(0), side.total_tokens
                )
            )
        if t.dtype is not dtype:
            raise ValueError(f"{who}: {name} is {t.dtype}, expected q's {dtype}")
        if t.device != side.device:
            raise ValueError(f"{who}: {name} is on {t.device}, expected the layout's {side.device}")
    _, heads, width = q.shape
    _, kv_heads, k_width = k.shape
    if k_width != width or k.shape != v.shape:
        raise ValueError(
            f"{who}: k is {tuple(k.shape)} and v {tuple(v.shape)}, expected both [T, G, {width}] as q has D {width}"
        )
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"{who}: k has {kv_heads} heads, expected a divisor of q's {heads}")
    if not MIN_HEAD_DIM <= width <= MAX_HEAD_DIM:
        raise ValueError(f"{who}: head width is {width}, expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
