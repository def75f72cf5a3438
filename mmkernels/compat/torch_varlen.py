"""Drop-in for torch.nn.attention.varlen.varlen_attn, also on the CPU and with masks.   N samples, Tq, Tk tokens."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mmkernels.compat.arguments import check_numbers
from mmkernels.compat.arguments import window as checked_window
from mmkernels.compat.packed import attend_packed, layouts, seqused_mask
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask

NAME = "varlen_attn"


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor | PackedLayout,
    cu_seq_k: Tensor | PackedLayout | None,
    max_q: int,
    max_k: int,
    *,
    return_aux=None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    mask: AttentionMask | None = None,
    dropout_p: float = 0,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over each sample's keys, as torch's varlen_attn; query [Tq, H, D], key, value [Tk, G, D].

    The arguments up to num_splits are those of torch 2.11 to 2.13.  window_size (left, right) has the last query at the
    last key: (-1, 0) is causal.  seqused_k int32 [N]: keys of each sample that count, from its first.  return_aux with
    lse=True: also the natural logarithm of the softmax denominators, fp32 [H, Tq], -inf where a query sees nothing.

    cu_seq_q, cu_seq_k  int32 [N + 1], or a PackedLayout, which may have modalities; the same object is self-attention
    mask, dropout_p, deterministic, impl   of mmkernels.attention; the window is the mask's where that has one

    Raises NotImplementedError naming block_table (paged keys), num_splits other than 1, and cu_seq_k=None; ValueError
    for what does not fit; the values of bounds and seqused_k are read, and so checked, only where they are on a CPU.
    """
    if block_table is not None:
        raise NotImplementedError(f"{NAME}: block_table, paged keys are not taken")
    if cu_seq_k is None:
        raise NotImplementedError(f"{NAME}: cu_seq_k is None, which only paged keys allow")
    if num_splits not in (None, 1):
        raise NotImplementedError(f"{NAME}: num_splits is {num_splits}, taken are None and 1: keys are never split")
    check_numbers(NAME, ("scale", scale), ("dropout_p", dropout_p))
    if not (return_aux is None or hasattr(return_aux, "lse")):
        raise ValueError(f"{NAME}: return_aux is {type(return_aux).__name__}, expected torch's AuxRequest or None")
    heads, kv_heads = query.shape[1], key.shape[1]
    if not enable_gqa and heads != kv_heads:
        raise ValueError(f"{NAME}: key has {kv_heads} heads, expected query's {heads}, or enable_gqa=True")
    window = checked_window(NAME, "window_size", window_size)
    if mask is None:
        mask = AttentionMask(window=window)
    elif window != (-1, -1):
        if mask.window != (-1, -1):
            raise ValueError(f"{NAME}: window_size is {window} and mask has {mask.window}, expected one of them")
        mask = replace(mask, window=window)
    if seqused_k is not None:
        cu_seq_q, k_layout = layouts(NAME, query, key, cu_seq_q, cu_seq_k, max_q, max_k)
        cu_seq_k = cu_seq_q if k_layout is None else k_layout
        mask = seqused_mask(NAME, mask, cu_seq_q, cu_seq_k, seqused_k)
    return attend_packed(
        NAME, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, mask=mask, scale=scale, dropout_p=dropout_p,
        deterministic=deterministic, return_lse=return_aux is not None and return_aux.lse, impl=impl,
    )  # fmt: skip
