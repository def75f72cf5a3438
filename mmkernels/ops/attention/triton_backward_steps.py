"""What the kernels of attention's backward share: one step over a query tile, and the sums by modality.

Formulas and letters as in triton_backward.
"""

import triton
import triton.language as tl

from mmkernels.ops.attention.triton_tiles import (
    LOG2E,
    bias_of,
    dropout_keep_tile,
    load_block,
    modalities_of,
    seen_pairs,
)


@triton.jit
def key_step(
    dk,
    dv,
    ds_of,
    k,
    v,
    first_key,
    bounds,
    biases,
    head,
    q_source,
    do_source,
    lse_ptr,
    delta_ptr,
    q_table_ptr,
    Tq,
    dropout,
    scale,
    col,
    col_end,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    LATE: tl.constexpr,
):
    """Adds what queries [col, col + BLOCK_Q) of one head give to dk, dv and ds_of; tiles are transposed,
    [BLOCK_K, BLOCK_Q].  Also returns ds, in the dtype of q.  lse_ptr, delta_ptr: the head's.

    LATE, of whole blocks only: the product of dv, which nothing in the step needs, comes behind that of dp, so that on
    sm_90 it runs while ds is computed: Triton 3.6 waits for dp and for all products before it.

    With a pair bias, two tuples have a [BLOCK_K] for each query modality, and else nothing: biases, and ds_of, the
    sums of ds over the queries of that modality.
    """
    BLOCK_K: tl.constexpr = k.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    HAS_BIAS: tl.constexpr = len(biases) > 0
    count = col_end - col
    cols = col + tl.arange(0, BLOCK_Q)
    q = load_block(q_source, col, count, D, BLOCK_Q, BLOCK_D, MASKED)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if MASKED:
        lse = tl.load(lse_ptr + cols, mask=cols < col_end, other=0.0)
    else:
        lse = tl.load(lse_ptr + cols)
    bias = 0.0
    q_modality = cols
    if HAS_BIAS:
        q_modality = modalities_of(q_table_ptr, cols, cols < col_end, Tq)
        bias = bias_of(biases, q_modality)
    p = probabilities(scores, bias, lse[None, :], scale, q.dtype, HAS_BIAS)
    if MASKED:
        q_bits_ptr = q_table_ptr + 2 * tl.cast(Tq, tl.int64)
        seen = seen_pairs(bounds, cols, col_end, q_bits_ptr, HAS_VISIBLE)
        # After exp2, so that the inf of a row that sees nothing (lse = -inf) goes as well.
        p = tl.where(seen, p, 0.0)
    do = load_block(do_source, col, count, D, BLOCK_Q, BLOCK_D, MASKED)
    dropped = p
    if dropout is not None:
        keep = tl.trans(dropout_keep_tile(dropout, head, cols, first_key, BLOCK_K, ALIGNED))
        factor = tl.where(keep, dropout.keep_scale, 0.0)
        dropped = p * factor
    dropped = dropped.to(do.dtype)
    if not LATE:
        dv = tl.dot(dropped, do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    if LATE:
        dv = tl.dot(dropped, do, dv, input_precision=PRECISION)
    if dropout is not None:
        dp *= factor
    if MASKED:
        delta = tl.load(delta_ptr + cols, mask=cols < col_end, other=0.0)
    else:
        delta = tl.load(delta_ptr + cols)
    ds = p * (dp - delta[None, :])
    if MASKED:
        # Again: a neighbour's do may be so large that dp is infinite, and 0 * inf is NaN.
        ds = tl.where(seen, ds, 0.0)
    if HAS_BIAS:
        ds_of = _add_by_modality(ds_of, ds, q_modality)
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv, ds_of, ds


@triton.jit
def _add_by_modality(sums, ds, modality):
    """sums[m] + the row sums of ds over columns of modality m.  In fp32: dbias is, and ds cancels in it."""
    added = ()
    for m in tl.static_range(len(sums)):
        added = added + (sums[m] + tl.sum(tl.where((modality == m)[None, :], ds, 0.0), 1),)  # noqa: RUF005
    return added


@triton.jit
def key_biases(bias_ptr, k_modality, k_modalities, scale, MODALITIES: tl.constexpr):
    """A tuple: per query modality the pair bias of each key times scale, fp32 [rows].  bias_ptr: one head's."""
    biases = ()
    for m in tl.static_range(MODALITIES):
        biases = biases + (tl.load(bias_ptr + m * k_modalities + k_modality) * scale,)  # noqa: RUF005
    return biases


@triton.jit
def bias_unit(DTYPE: tl.constexpr):
    """What probabilities wants a bias multiplied by."""
    return 1.0 if tl.float32 == DTYPE else LOG2E


@triton.jit
def probabilities(scores, bias, lse, scale, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """exp(scores scale + bias - lse), bias in units of bias_unit."""
    if tl.float32 == DTYPE:
        # In natural units the terms cancel before anything rounds by LOG2E: fp32 gradients show the difference.
        scores = scores * scale
        if HAS_BIAS:
            scores += bias
        p = tl.exp(scores - lse)
    else:
        scores = scores * (scale * LOG2E)
        if HAS_BIAS:
            scores += bias
        p = tl.math.exp2(scores - lse * LOG2E)
    return p


@triton.jit
def store_bias_partial(partial_ptr, ds_of, k_modality, in_tile, k_modalities):
    """partial [Mq, Mk] of one tile and head: ds_of summed over the keys of each modality."""
    for n in range(k_modalities):
        of_key = in_tile & (k_modality == n)
        for m in tl.static_range(len(ds_of)):
            tl.store(partial_ptr + m * k_modalities + n, tl.sum(tl.where(of_key, ds_of[m], 0.0), 0))
