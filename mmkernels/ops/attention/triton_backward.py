"""Packed attention backward, Triton, sm_80+: deterministic, two kernels.   Tq, Tk tokens, H heads, D width.

With p = exp(s - lse), z the dropout factor (0 or 1 / (1 - dropout_p)), dp = z (do v^T), delta = rowsum(do out) - dlse:
dv = (p z)^T do,  ds = p (dp - delta),  dk = scale ds^T q,  dq = scale ds k,  dbias = ds summed by modality pair.

q_table int32 [4, Tq] and k_table int32 [4, Tk] are those of MaskPlan.  bias_ptr, rng_ptr and dlse_ptr are None
where there is no bias, no dropout, no gradient of lse: the code for them is then not there at all.
"""

import triton
import triton.language as tl

from mmkernels.ops.attention.triton_backward_steps import (
    bias_unit,
    key_biases,
    key_step,
    probabilities,
    store_bias_partial,
)
from mmkernels.ops.attention.triton_tiles import (
    Dropout,
    Source,
    bias_of,
    dropout_keep_tile,
    load_block,
    load_rows,
    load_span,
    modalities_of,
    no_sums,
    row_biases,
    row_bounds,
    seen_pairs,
    store_rows,
    this_tile,
)


@triton.jit(do_not_specialize=["Tq", "Tk", "drop_threshold"])
def attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    rng_ptr,
    do_ptr,
    q_desc,
    do_desc,
    lse_ptr,
    delta_ptr,
    q_table_ptr,
    k_table_ptr,
    tiles_ptr,
    spans_ptr,
    dk_ptr,
    dv_ptr,
    partials_ptr,
    Tq,
    Tk,
    kv_heads,
    group,
    k_modalities,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    scale,
    drop_threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MODALITIES: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    LATE: tl.constexpr,
):
    """dk, dv of one key tile of one key head, over all query heads of its group.   Grid: tiles x key heads.

    partials [tiles, H, Mq, Mk] fp32 (None without pair bias): each tile's part of dbias.  MODALITIES: Mq, or 0.
    LATE: of a span of whole blocks, as key_step has it.
    """
    tile, kv_head, row_start, row_end, first_span, last_span = this_tile(tiles_ptr, kv_heads)

    base = row_start.to(tl.int64)
    at_head = kv_head.to(tl.int64)
    count = row_end - row_start
    k = load_rows(k_ptr + base * stride_kt + at_head * stride_kh, stride_kt, count, D, BLOCK_K, BLOCK_D, True)
    v = load_rows(v_ptr + base * stride_vt + at_head * stride_vh, stride_vt, count, D, BLOCK_K, BLOCK_D, True)

    rows = row_start + tl.arange(0, BLOCK_K)
    in_tile = rows < row_end
    bounds = row_bounds(k_table_ptr, rows, in_tile, Tk, HAS_VISIBLE)
    k_modality = rows
    if bias_ptr is not None:
        k_modality = modalities_of(k_table_ptr, rows, in_tile, Tk)
    dropout = None
    if rng_ptr is not None:
        dropout = Dropout(rng_ptr=rng_ptr, threshold=drop_threshold, keep_scale=keep_scale)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        q_head = tl.cast(head, tl.int64)
        q_source = Source(ptr=q_ptr + q_head * stride_qh, desc=q_desc, stride=stride_qt, head=head)
        do_source = Source(ptr=do_ptr + q_head * stride_doh, desc=do_desc, stride=stride_dot, head=head)
        lse_at = lse_ptr + q_head * Tq
        delta_at = delta_ptr + q_head * Tq
        biases = ()
        if bias_ptr is not None:
            bias_at = bias_ptr + q_head * MODALITIES * k_modalities
            biases = key_biases(bias_at, k_modality, k_modalities, bias_unit(k.dtype), MODALITIES)
        ds_of = no_sums(MODALITIES, BLOCK_K)
        for span in range(first_span, last_span):
            col_start, full_end, col_end = load_span(spans_ptr, span)
            for col in range(col_start, full_end, BLOCK_Q):
                dk, dv, ds_of, _ = key_step(
                    dk, dv, ds_of,
                    k=k, v=v, first_key=row_start, bounds=bounds, biases=biases, head=head,
                    q_source=q_source, do_source=do_source, lse_ptr=lse_at, delta_ptr=delta_at, q_table_ptr=q_table_ptr,
                    Tq=Tq, dropout=dropout, scale=scale, col=col, col_end=col_end, D=D, BLOCK_Q=BLOCK_Q,
                    HAS_VISIBLE=HAS_VISIBLE, PRECISION=PRECISION, ALIGNED=ALIGNED, MASKED=False, LATE=LATE,
                )  # fmt: skip
            for col in range(full_end, col_end, BLOCK_Q):
                dk, dv, ds_of, _ = key_step(
                    dk, dv, ds_of,
                    k=k, v=v, first_key=row_start, bounds=bounds, biases=biases, head=head,
                    q_source=q_source, do_source=do_source, lse_ptr=lse_at, delta_ptr=delta_at, q_table_ptr=q_table_ptr,
                    Tq=Tq, dropout=dropout, scale=scale, col=col, col_end=col_end, D=D, BLOCK_Q=BLOCK_Q,
                    HAS_VISIBLE=HAS_VISIBLE, PRECISION=PRECISION, ALIGNED=ALIGNED, MASKED=True, LATE=False,
                )  # fmt: skip
        if bias_ptr is not None:
            tile_head = tl.cast(tile, tl.int64) * kv_heads * group + head
            partial_at = partials_ptr + tile_head * MODALITIES * k_modalities
            store_bias_partial(partial_at, ds_of, k_modality, in_tile, k_modalities)

    store_rows(dk_ptr + base * stride_dkt + at_head * stride_dkh, stride_dkt, count, dk * scale, D, BLOCK_K, BLOCK_D)
    store_rows(dv_ptr + base * stride_dvt + at_head * stride_dvh, stride_dvt, count, dv, D, BLOCK_K, BLOCK_D)


@triton.jit
def _query_step(
    dq,
    ds_sum,
    q,
    do,
    lse,
    delta,
    head,
    rows,
    bounds,
    biases,
    k_source,
    v_source,
    k_table_ptr,
    Tk,
    dropout,
    scale,
    col,
    col_end,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what keys [col, col + BLOCK_K) give to dq and, with a pair bias, to the rows' sums of ds.

    biases: a tuple, per key modality the bias of each query; empty without.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    HAS_BIAS: tl.constexpr = len(biases) > 0
    count = col_end - col
    cols = col + tl.arange(0, BLOCK_K)
    k = load_block(k_source, col, count, D, BLOCK_K, BLOCK_D, MASKED)
    v = load_block(v_source, col, count, D, BLOCK_K, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    bias = 0.0
    if HAS_BIAS:
        bias = bias_of(biases, modalities_of(k_table_ptr, cols, cols < col_end, Tk))
    p = probabilities(scores, bias, lse[:, None], scale, q.dtype, HAS_BIAS)
    if dropout is not None:
        keep = dropout_keep_tile(dropout, head, rows, col, BLOCK_K, ALIGNED)
        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED:
        k_bits_ptr = k_table_ptr + 2 * tl.cast(Tk, tl.int64)
        # p and dp of what is not seen may be infinite (a blind row, a neighbour's large values): selected away.
        ds = tl.where(seen_pairs(bounds, cols, col_end, k_bits_ptr, HAS_VISIBLE), ds, 0.0)
    if HAS_BIAS:
        ds_sum += tl.sum(ds, 1)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), ds_sum


@triton.jit(do_not_specialize=["Tq", "Tk", "drop_threshold"])
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    bias_ptr,
    rng_ptr,
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    q_table_ptr,
    k_table_ptr,
    tiles_ptr,
    spans_ptr,
    dq_ptr,
    delta_ptr,
    Tq,
    Tk,
    heads,
    group,
    q_modalities,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
    scale,
    drop_threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODALITIES: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """dq of one query tile of one head, and its delta [H, Tq], which dkdv reads: this kernel runs first.

    Grid: tiles x heads.  MODALITIES: Mk with a pair bias, else 0.
    """
    _tile, head, row_start, row_end, first_span, last_span = this_tile(tiles_ptr, heads)

    base = row_start.to(tl.int64)
    q_head = tl.cast(head, tl.int64)
    kv_head = head // group
    count = row_end - row_start
    q = load_rows(q_ptr + base * stride_qt + q_head * stride_qh, stride_qt, count, D, BLOCK_Q, BLOCK_D, True)
    do = load_rows(do_ptr + base * stride_dot + q_head * stride_doh, stride_dot, count, D, BLOCK_Q, BLOCK_D, True)
    k_source = Source(ptr=k_ptr + kv_head.to(tl.int64) * stride_kh, desc=k_desc, stride=stride_kt, head=kv_head)
    v_source = Source(ptr=v_ptr + kv_head.to(tl.int64) * stride_vh, desc=v_desc, stride=stride_vt, head=kv_head)

    rows = row_start + tl.arange(0, BLOCK_Q)
    in_tile = rows < row_end
    out = load_rows(out_ptr + base * stride_ot + q_head * stride_oh, stride_ot, count, D, BLOCK_Q, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    dlse = tl.zeros([BLOCK_Q], tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + q_head * Tq + rows, mask=in_tile, other=0.0)
        delta -= dlse
    if bias_ptr is None:
        tl.store(delta_ptr + q_head * Tq + rows, delta, mask=in_tile)
    # +inf past the tile's end: those rows then have p = 0.
    lse = tl.load(lse_ptr + q_head * Tq + rows, mask=in_tile, other=float("inf"))
    bounds = row_bounds(q_table_ptr, rows, in_tile, Tq, HAS_VISIBLE)
    biases = ()
    if bias_ptr is not None:
        bias_at = bias_ptr + q_head * q_modalities * MODALITIES
        biases = row_biases(bias_at, modalities_of(q_table_ptr, rows, in_tile, Tq), bias_unit(q.dtype), MODALITIES)
    dropout = None
    if rng_ptr is not None:
        dropout = Dropout(rng_ptr=rng_ptr, threshold=drop_threshold, keep_scale=keep_scale)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    ds_sum = tl.zeros([BLOCK_Q], tl.float32)
    for span in range(first_span, last_span):
        col_start, full_end, col_end = load_span(spans_ptr, span)
        for col in range(col_start, full_end, BLOCK_K):
            dq, ds_sum = _query_step(
                dq, ds_sum,
                q=q, do=do, lse=lse, delta=delta, head=head, rows=rows, bounds=bounds, biases=biases,
                k_source=k_source, v_source=v_source, k_table_ptr=k_table_ptr, Tk=Tk, dropout=dropout, scale=scale,
                col=col, col_end=col_end, D=D, BLOCK_K=BLOCK_K,
                HAS_VISIBLE=HAS_VISIBLE, PRECISION=PRECISION, ALIGNED=ALIGNED, MASKED=False,
            )  # fmt: skip
        for col in range(full_end, col_end, BLOCK_K):
            dq, ds_sum = _query_step(
                dq, ds_sum,
                q=q, do=do, lse=lse, delta=delta, head=head, rows=rows, bounds=bounds, biases=biases,
                k_source=k_source, v_source=v_source, k_table_ptr=k_table_ptr, Tk=Tk, dropout=dropout, scale=scale,
                col=col, col_end=col_end, D=D, BLOCK_K=BLOCK_K,
                HAS_VISIBLE=HAS_VISIBLE, PRECISION=PRECISION, ALIGNED=ALIGNED, MASKED=True,
            )  # fmt: skip

    if bias_ptr is not None:
        # A row of ds sums to its dlse.  What it misses is the rounding of out in delta, the one error of dbias that
        # many keys do not average away: dkdv gets a delta without it.
        tl.store(delta_ptr + q_head * Tq + rows, delta + (ds_sum - dlse), mask=in_tile)
    store_rows(dq_ptr + base * stride_dqt + q_head * stride_dqh, stride_dqt, count, dq * scale, D, BLOCK_Q, BLOCK_D)
