"""flash_attn's functions, also on the CPU: change the import and keep the program.   B samples, S tokens, H, G heads.

From flash-attn 2: q [B, S, H, D] (varlen: packed [T, H, D] with cu_seqlens int32 [B + 1]).  causal and window_size put
the last query at the last key.  Arguments that are not taken raise NotImplementedError unless they are neutral.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.compat import plans
from mmkernels.compat.arguments import check_numbers, flag, window
from mmkernels.compat.packed import attend_packed, layouts
from mmkernels.compat.padded import PaddedPlan, attend, goes_by_head
from mmkernels.compat.plans import Refused, Seen, Shape
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.ops.attention.api import attention_qkvpacked

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]
WHOLE = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """softmax(q k^T scale) v.  q [B, Sq, H, D], k and v [B, Sk, G, D], H % G == 0.  Returns [B, Sq, H, D].

    A query that sees nothing gives 0.  With return_attn_probs: (out, lse, None), lse the natural logarithm of the
    softmax denominators, fp32 [B, H, Sq], -inf where a query sees nothing (flash_attn says +inf).
    """
    name = "flash_attn_func"
    options = _options(name, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs)
    seen = Seen(flag(name, "causal", causal), window(name, "window_size", window_size), True, None, None, None)
    for argument, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name}: {argument} has shape {tuple(t.shape)}, expected [B, S, heads, D]")
    if k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{name}: q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}, expected k and v "
            "alike, of q's batch size"
        )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    if torch.compiler.is_compiling():
        from mmkernels.compat import padded_op

        result = padded_op.attend(q, k, v, seen, impl="auto", who=name, **options)
    else:
        plan = _plan(name, seen, shape, q.device, goes_by_head(q, k, v))
        result = attend(q, k, v, plan, **options)
    if return_attn_probs:
        return result[0].transpose(1, 2), result[1], None
    return result.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_func of the three views of qkv [B, S, 3, H, D], which are not copied."""
    q, k, v = _unpacked("qkv", qkv, 5, 2, 3)
    if qkv.is_contiguous() and not (dropout_p or return_attn_probs or torch.compiler.is_compiling()):
        name, (batch, length, _, heads, _) = "flash_attn_qkvpacked_func", qkv.shape
        options = _options(name, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs)
        seen = Seen(flag(name, "causal", causal), window(name, "window_size", window_size), True, None, None, None)
        plan = _plan(name, seen, Shape(batch, heads, heads, length, length), qkv.device, False)
        return _one_gradient(qkv.flatten(0, 1), plan.layout, plan.mask, options).unflatten(0, (batch, length))
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_func of q [B, Sq, H, D] and the two views of kv [B, Sk, 2, G, D]."""
    return flash_attn_func(
        q, *_unpacked("kv", kv, 5, 2, 2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """softmax(q k^T scale) v per sample.  q [Tq, H, D], k and v [Tk, G, D]; cu_seqlens int32 [B + 1] or a PackedLayout.

    Returns [Tq, H, D]; with return_attn_probs (out, lse [H, Tq], None).
    """
    name = "flash_attn_varlen_func"
    options = _options(name, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs)
    if block_table is not None:
        raise NotImplementedError(f"{name}: block_table, paged keys are not taken")
    result = attend_packed(
        name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        mask=AttentionMask(causal=causal, window=window(name, "window_size", window_size)), **options,
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_varlen_func of the three views of qkv [T, 3, H, D]."""
    q, k, v = _unpacked("qkv", qkv, 4, 1, 3)
    if not (dropout_p or return_attn_probs):
        name = "flash_attn_varlen_qkvpacked_func"
        options = _options(name, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs)
        mask = AttentionMask(causal=causal, window=window(name, "window_size", window_size))
        layout, _ = layouts(name, q, k, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return _one_gradient(qkv, layout, mask, options)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """flash_attn_varlen_func of q [Tq, H, D] and the two views of kv [Tk, 2, G, D]."""
    return flash_attn_varlen_func(
        q, *_unpacked("kv", kv, 4, 1, 2), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of hidden_states [B, S, ...] that a mask [B, S] (1: real) keeps, as flash_attn.bert_padding does.

    Returns rows [T, ...], their indices int64 [T] in [B S], cu_seqlens int32 [B + 1], the longest sample, and how many
    rows of each sample attention_mask marks, int32 [B]; rows that unused_mask marks are kept besides.  Reads the mask.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    used = attention_mask.sum(-1, dtype=torch.int32)
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Rows [T, ...] back at their indices of a zero [B, S, ...]."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def index_first_axis(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices]"""
    return rows.index_select(0, indices)


def _options(name: str, dropout_p, softmax_scale, softcap, alibi_slopes, deterministic, return_attn_probs) -> dict:
    """The options of mmkernels.attention, where there are such."""
    check_numbers(name, ("softmax_scale", softmax_scale), ("dropout_p", dropout_p))
    if softcap:
        raise NotImplementedError(f"{name}: softcap is {softcap}, taken is 0.0 alone")
    if alibi_slopes is not None:
        raise NotImplementedError(f"{name}: alibi_slopes are not taken")
    if return_attn_probs and dropout_p > 0.0:
        raise NotImplementedError(f"{name}: return_attn_probs with dropout_p, dropped probabilities are not kept")
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "deterministic": True if flag(name, "deterministic", deterministic) else None,  # None follows torch's switch
        "return_lse": return_attn_probs,
    }


def _plan(name: str, seen: Seen, shape: Shape, device: torch.device, by_head: bool) -> PaddedPlan:
    plan = plans.plan(seen, shape, device, by_head=by_head)
    if isinstance(plan, Refused):
        raise NotImplementedError(f"{name}: {plan.reason}")
    return plan


def _one_gradient(qkv: Tensor, layout: PackedLayout, mask: AttentionMask, options: dict) -> Tensor:
    """Plain self-attention of qkv [T, 3, H, D], for which autograd need not join three gradients."""
    return attention_qkvpacked(
        qkv, layout=layout, mask=mask, scale=options["scale"], deterministic=options["deterministic"]
    )


def _unpacked(name: str, packed: Tensor, ndim: int, dim: int, count: int) -> tuple[Tensor, ...]:
    if packed.ndim != ndim or packed.shape[dim] != count:
        raise ValueError(f"flash_attn: {name} is {tuple(packed.shape)}, expected {count} at dimension {dim} of {ndim}")
    return packed.unbind(dim)
