"""Packed attention forward, Triton, sm_80+: one program per (query tile, head).   T tokens, H heads, D head width."""

import triton
import triton.language as tl

from mmkernels.ops.attention.triton_tiles import LN2, load_rows, seen_pairs, store_rows


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
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
    """One online-softmax step over keys [col, col + BLOCK_K); scores are kept in units of log2."""
    BLOCK_D: tl.constexpr = q.shape[1]
    count = col_end - col
    base = tl.cast(col, tl.int64)  # in the interpreter col is a Python int
    k = load_rows(k_ptr + base * stride_kt, stride_kt, count, D, BLOCK_K, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    if MASKED:
        seen = seen_pairs(col + tl.arange(0, BLOCK_K), col_end, lo, hi, bits, k_bits_ptr, HAS_VISIBLE)
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.math.exp2(scores - shift[:, None])
    else:
        # scale > 0, so the maximum commutes with it, and the product folds into the subtraction's FMA.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        p = tl.math.exp2(scores * scale_log2 - shift[:, None])
    alpha = tl.math.exp2(row_max - shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    v = load_rows(v_ptr + base * stride_vt, stride_vt, count, D, BLOCK_K, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_lo_ptr,
    kv_hi_ptr,
    q_bits_ptr,
    k_bits_ptr,
    tiles_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
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
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[rows] = softmax(q k^T scale) v and lse (natural log) for one tile of one head.   Grid: tiles x heads."""
    # Heads vary fastest, so that the heaviest tiles (first in the list) start first on every head.
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row_start = tl.load(tiles_ptr + 4 * tile)
    row_end = tl.load(tiles_ptr + 4 * tile + 1)
    first_span = tl.load(tiles_ptr + 4 * tile + 2)
    last_span = tl.load(tiles_ptr + 4 * tile + 3)

    # int64 before multiplying: token * stride passes 2**31 at 1M tokens x 3072.
    base = row_start.to(tl.int64)
    q_head = tl.cast(head, tl.int64)
    kv_head = (head // group).to(tl.int64)
    count = row_end - row_start
    q = load_rows(q_ptr + base * stride_qt + q_head * stride_qh, stride_qt, count, D, BLOCK_Q, BLOCK_D, True)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh

    rows = row_start + tl.arange(0, BLOCK_Q)
    in_tile = rows < row_end
    lo = tl.load(kv_lo_ptr + rows, mask=in_tile, other=0)
    hi = tl.load(kv_hi_ptr + rows, mask=in_tile, other=0)
    if HAS_VISIBLE:
        bits = tl.load(q_bits_ptr + rows, mask=in_tile, other=0)
    else:
        bits = lo

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    for span in range(first_span, last_span):
        col_start = tl.load(spans_ptr + 3 * span)
        col_end = tl.load(spans_ptr + 3 * span + 1)
        masked = tl.load(spans_ptr + 3 * span + 2)
        # A span is all full or all partial: one of the two loops runs, and neither branches inside.
        full_end = tl.where(masked != 0, col_start, col_end)
        for col in range(col_start, full_end, BLOCK_K):
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q, k_ptr, v_ptr, k_bits_ptr, stride_kt, stride_vt, scale_log2, lo, hi, bits,
                col, col_end, D, BLOCK_K, HAS_VISIBLE, PRECISION, False,
            )  # fmt: skip
        for col in range(full_end, col_end, BLOCK_K):
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q, k_ptr, v_ptr, k_bits_ptr, stride_kt, stride_vt, scale_log2, lo, hi, bits,
                col, col_end, D, BLOCK_K, HAS_VISIBLE, PRECISION, True,
            )  # fmt: skip

    # A row that saw nothing: out 0, lse -inf.
    blind = row_sum == 0.0
    row_sum = tl.where(blind, 1.0, row_sum)
    out = acc * (1.0 / row_sum)[:, None]
    lse = (row_max + tl.math.log2(row_sum)) * LN2  # row_max of a blind row is still -inf
    store_rows(out_ptr + base * stride_ot + q_head * stride_oh, stride_ot, count, out, D, BLOCK_Q, BLOCK_D)
    tl.store(lse_ptr + q_head * T + rows, lse, mask=in_tile)
