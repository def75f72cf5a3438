"""Packed attention backward, Triton, sm_80+: deterministic, two kernels.   T tokens, H heads, G key heads, D width.

With p = exp(s scale - lse), dp = do v^T and delta = rowsum(do out) - dlse:
dv = p^T do,  ds = p (dp - delta),  dk = scale ds^T q,  dq = scale ds k.
"""

import triton
import triton.language as tl

from mmkernels.ops.attention.triton_forward import load_rows, seen_pairs, store_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _key_step(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    q_bits_ptr,
    stride_qt,
    stride_dot,
    scale_log2,
    lo,
    hi,
    bits,
    col,
    col_end,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what queries [col, col + BLOCK_Q) of one head give to dk, dv; scores are transposed, [BLOCK_K, BLOCK_Q]."""
    BLOCK_D: tl.constexpr = k.shape[1]
    count = col_end - col
    base = tl.cast(col, tl.int64)  # in the interpreter col is a Python int
    cols = col + tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr + base * stride_qt, stride_qt, count, D, BLOCK_Q, BLOCK_D, MASKED)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if MASKED:
        lse = tl.load(lse_ptr + cols, mask=cols < col_end, other=0.0)
        delta = tl.load(delta_ptr + cols, mask=cols < col_end, other=0.0)
    else:
        lse = tl.load(lse_ptr + cols)
        delta = tl.load(delta_ptr + cols)
    p = tl.math.exp2(scores * scale_log2 - (lse * LOG2E)[None, :])
    if MASKED:
        seen = seen_pairs(cols, col_end, lo, hi, bits, q_bits_ptr, HAS_VISIBLE)
        # After exp2, so that the inf of a row that sees nothing (lse = -inf) goes as well.
        p = tl.where(seen, p, 0.0)
    do = load_rows(do_ptr + base * stride_dot, stride_dot, count, D, BLOCK_Q, BLOCK_D, MASKED)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    q_lo_ptr,
    q_hi_ptr,
    q_bits_ptr,
    k_bits_ptr,
    tiles_ptr,
    spans_ptr,
    dk_ptr,
    dv_ptr,
    T,
    kv_heads,
    group,
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
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv of one key tile of one key head, over all query heads of its group.   Grid: tiles x key heads."""
    tile = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    row_start = tl.load(tiles_ptr + 4 * tile)
    row_end = tl.load(tiles_ptr + 4 * tile + 1)
    first_span = tl.load(tiles_ptr + 4 * tile + 2)
    last_span = tl.load(tiles_ptr + 4 * tile + 3)

    base = row_start.to(tl.int64)
    at_head = kv_head.to(tl.int64)
    count = row_end - row_start
    k = load_rows(k_ptr + base * stride_kt + at_head * stride_kh, stride_kt, count, D, BLOCK_K, BLOCK_D, True)
    v = load_rows(v_ptr + base * stride_vt + at_head * stride_vh, stride_vt, count, D, BLOCK_K, BLOCK_D, True)

    rows = row_start + tl.arange(0, BLOCK_K)
    in_tile = rows < row_end
    lo = tl.load(q_lo_ptr + rows, mask=in_tile, other=0)
    hi = tl.load(q_hi_ptr + rows, mask=in_tile, other=0)
    if HAS_VISIBLE:
        bits = tl.load(k_bits_ptr + rows, mask=in_tile, other=0)
    else:
        bits = lo

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        q_head = tl.cast(head, tl.int64)
        q_at = q_ptr + q_head * stride_qh
        do_at = do_ptr + q_head * stride_doh
        lse_at = lse_ptr + q_head * T
        delta_at = delta_ptr + q_head * T
        for span in range(first_span, last_span):
            col_start = tl.load(spans_ptr + 3 * span)
            col_end = tl.load(spans_ptr + 3 * span + 1)
            masked = tl.load(spans_ptr + 3 * span + 2)
            full_end = tl.where(masked != 0, col_start, col_end)
            for col in range(col_start, full_end, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, q_at, do_at, lse_at, delta_at, q_bits_ptr, stride_qt, stride_dot, scale_log2,
                    lo, hi, bits, col, col_end, D, BLOCK_Q, HAS_VISIBLE, PRECISION, False,
                )  # fmt: skip
            for col in range(full_end, col_end, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, q_at, do_at, lse_at, delta_at, q_bits_ptr, stride_qt, stride_dot, scale_log2,
                    lo, hi, bits, col, col_end, D, BLOCK_Q, HAS_VISIBLE, PRECISION, True,
                )  # fmt: skip

    store_rows(dk_ptr + base * stride_dkt + at_head * stride_dkh, stride_dkt, count, dk * scale, D, BLOCK_K, BLOCK_D)
    store_rows(dv_ptr + base * stride_dvt + at_head * stride_dvh, stride_dvt, count, dv, D, BLOCK_K, BLOCK_D)


@triton.jit
def _query_step(
    dq,
    q,
    do,
    lse_log2,
    delta,
    k_ptr,
    v_ptr,
    k_bits_ptr,
    stride_kt,
    stride_vt,
    scale_log2,
    lo,
    hi,
    bits,
    col,
    col_end,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what keys [col, col + BLOCK_K) give to dq."""
    BLOCK_D: tl.constexpr = q.shape[1]
    count = col_end - col
    base = tl.cast(col, tl.int64)  # in the interpreter col is a Python int
    k = load_rows(k_ptr + base * stride_kt, stride_kt, count, D, BLOCK_K, BLOCK_D, MASKED)
    v = load_rows(v_ptr + base * stride_vt, stride_vt, count, D, BLOCK_K, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = tl.math.exp2(scores * scale_log2 - lse_log2[:, None])
    if MASKED:
        seen = seen_pairs(col + tl.arange(0, BLOCK_K), col_end, lo, hi, bits, k_bits_ptr, HAS_VISIBLE)
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    kv_lo_ptr,
    kv_hi_ptr,
    q_bits_ptr,
    k_bits_ptr,
    tiles_ptr,
    spans_ptr,
    dq_ptr,
    delta_ptr,
    T,
    heads,
    group,
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
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one query tile of one head, and its delta [H, T], which dkdv reads: this kernel runs first.

    Grid: tiles x heads.  dlse_ptr is None where lse has no gradient.
    """
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row_start = tl.load(tiles_ptr + 4 * tile)
    row_end = tl.load(tiles_ptr + 4 * tile + 1)
    first_span = tl.load(tiles_ptr + 4 * tile + 2)
    last_span = tl.load(tiles_ptr + 4 * tile + 3)

    base = row_start.to(tl.int64)
    q_head = tl.cast(head, tl.int64)
    kv_head = (head // group).to(tl.int64)
    count = row_end - row_start
    q = load_rows(q_ptr + base * stride_qt + q_head * stride_qh, stride_qt, count, D, BLOCK_Q, BLOCK_D, True)
    do = load_rows(do_ptr + base * stride_dot + q_head * stride_doh, stride_dot, count, D, BLOCK_Q, BLOCK_D, True)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh

    rows = row_start + tl.arange(0, BLOCK_Q)
    in_tile = rows < row_end
    out = load_rows(out_ptr + base * stride_ot + q_head * stride_oh, stride_ot, count, D, BLOCK_Q, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + q_head * T + rows, mask=in_tile, other=0.0)
    tl.store(delta_ptr + q_head * T + rows, delta, mask=in_tile)
    # +inf past the tile's end: those rows then have p = 0.
    lse_log2 = tl.load(lse_ptr + q_head * T + rows, mask=in_tile, other=float("inf")) * LOG2E
    lo = tl.load(kv_lo_ptr + rows, mask=in_tile, other=0)
    hi = tl.load(kv_hi_ptr + rows, mask=in_tile, other=0)
    if HAS_VISIBLE:
        bits = tl.load(q_bits_ptr + rows, mask=in_tile, other=0)
    else:
        bits = lo

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for span in range(first_span, last_span):
        col_start = tl.load(spans_ptr + 3 * span)
        col_end = tl.load(spans_ptr + 3 * span + 1)
        masked = tl.load(spans_ptr + 3 * span + 2)
        full_end = tl.where(masked != 0, col_start, col_end)
        for col in range(col_start, full_end, BLOCK_K):
            dq = _query_step(
                dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_bits_ptr, stride_kt, stride_vt, scale_log2,
                lo, hi, bits, col, col_end, D, BLOCK_K, HAS_VISIBLE, PRECISION, False,
            )  # fmt: skip
        for col in range(full_end, col_end, BLOCK_K):
            dq = _query_step(
                dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_bits_ptr, stride_kt, stride_vt, scale_log2,
                lo, hi, bits, col, col_end, D, BLOCK_K, HAS_VISIBLE, PRECISION, True,
            )  # fmt: skip

    store_rows(dq_ptr + base * stride_dqt + q_head * stride_dqh, stride_dqt, count, dq * scale, D, BLOCK_Q, BLOCK_D)
