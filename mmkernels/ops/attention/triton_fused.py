"""Packed attention backward, Triton, sm_80+: fused, one pass, five products.   Tq, Tk tokens, H heads, D width.

As triton_backward, but one program per key tile also adds its part of dq to an fp32 sum that all tiles share, so that
scores and dp are computed once.  The order of those additions differs between runs, and with it dq's last bits.
"""

import triton
import triton.language as tl

from mmkernels.ops.attention.triton_backward_steps import key_step
from mmkernels.ops.attention.triton_tiles import Source, load_rows, load_span, row_bounds, store_rows, this_tile


@triton.jit(do_not_specialize=["Tq"])
def attention_bwd_delta_kernel(
    out_ptr,
    do_ptr,
    dlse_ptr,
    delta_ptr,
    Tq,
    heads,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """delta [H, Tq] = rowsum(do out) - dlse.   Grid: query blocks x heads."""
    block = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    base = tl.cast(block, tl.int64) * BLOCK_Q
    at_head = tl.cast(head, tl.int64)
    count = Tq - block * BLOCK_Q
    out = load_rows(out_ptr + base * stride_ot + at_head * stride_oh, stride_ot, count, D, BLOCK_Q, BLOCK_D, True)
    do = load_rows(do_ptr + base * stride_dot + at_head * stride_doh, stride_dot, count, D, BLOCK_Q, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    rows = tl.arange(0, BLOCK_Q)
    at = at_head * Tq + base + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < count, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < count)


@triton.jit
def _dq_of(ds, k, PRECISION: tl.constexpr):
    """ds^T k, fp32 [BLOCK_Q, BLOCK_D]."""
    # wgmma wants 64 rows at least: where the queries are fewer and the head is wide enough, as (k^T ds)^T.
    if ds.shape[1] < 64 and k.shape[1] >= 64:
        dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
    else:
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
    return dq


@triton.jit
def _add_to_dq(
    dq_sum,
    dq,
    head,
    col,
    col_end,
    stride_t,
    stride_h,
    D: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq_sum[col : col_end, head] += dq.  dq_sum fp32 [Tq, H, D]: a descriptor (TMA reduce-add), or a pointer."""
    BLOCK_Q: tl.constexpr = dq.shape[0]
    BLOCK_D: tl.constexpr = dq.shape[1]
    rows = tl.arange(0, BLOCK_Q)[:, None]
    if TMA:
        # The descriptor clips at Tq and D, not at the sample's end: rows past it must add 0, and 0 * NaN is none.
        if MASKED:
            dq = tl.where(rows < col_end - col, dq, 0.0)
        dq_sum.atomic_add([col, head, 0], dq.reshape(BLOCK_Q, 1, BLOCK_D))
    else:
        dims = tl.arange(0, BLOCK_D)[None, :]
        inside = dims < D
        if MASKED:
            inside = inside & (rows < col_end - col)
        # Made of col each time: offsets that do not change would sit in registers through the whole loop.
        at = dq_sum + tl.cast(head, tl.int64) * stride_h + (col + rows).to(tl.int64) * stride_t
        tl.atomic_add(at + dims, dq, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_bwd_fused_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    q_desc,
    do_desc,
    lse_ptr,
    delta_ptr,
    q_table_ptr,
    k_table_ptr,
    tiles_ptr,
    spans_ptr,
    dq_sum,
    dk_ptr,
    dv_ptr,
    Tq,
    Tk,
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
    stride_dqt,
    stride_dqh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """dk, dv of one key tile of one key head, and what it adds to dq_sum (before scale).   Grid: tiles x key heads.

    dq_sum fp32 [Tq, H, D], zero at the start: with TMA a descriptor of blocks [BLOCK_Q, 1, BLOCK_D], else a pointer.
    No pair bias, whose gradient wants a more exact delta than this pass has, and no dropout, for lack of registers.
    """
    _tile, kv_head, row_start, row_end, first_span, last_span = this_tile(tiles_ptr, kv_heads)

    base = row_start.to(tl.int64)
    at_head = kv_head.to(tl.int64)
    count = row_end - row_start
    k = load_rows(k_ptr + base * stride_kt + at_head * stride_kh, stride_kt, count, D, BLOCK_K, BLOCK_D, True)
    v = load_rows(v_ptr + base * stride_vt + at_head * stride_vh, stride_vt, count, D, BLOCK_K, BLOCK_D, True)

    rows = row_start + tl.arange(0, BLOCK_K)
    in_tile = rows < row_end
    bounds = row_bounds(k_table_ptr, rows, in_tile, Tk, HAS_VISIBLE)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        q_head = tl.cast(head, tl.int64)
        q_source = Source(ptr=q_ptr + q_head * stride_qh, desc=q_desc, stride=stride_qt, head=head)
        do_source = Source(ptr=do_ptr + q_head * stride_doh, desc=do_desc, stride=stride_dot, head=head)
        lse_at = lse_ptr + q_head * Tq
        delta_at = delta_ptr + q_head * Tq
        for span in range(first_span, last_span):
            col_start, full_end, col_end = load_span(spans_ptr, span)
            for col in range(col_start, full_end, BLOCK_Q):
                dk, dv, _, ds = key_step(
                    dk, dv, (),
                    k=k, v=v, first_key=row_start, bounds=bounds, biases=(), head=head,
                    q_source=q_source, do_source=do_source, lse_ptr=lse_at, delta_ptr=delta_at, q_table_ptr=q_table_ptr,
                    Tq=Tq, dropout=None, scale=scale, col=col, col_end=col_end, D=D, BLOCK_Q=BLOCK_Q,
                    HAS_VISIBLE=HAS_VISIBLE, PRECISION=PRECISION, ALIGNED=False, MASKED=False, LATE=False,
                )  # fmt: skip
                dq = _dq_of(ds, k, PRECISION)
                _add_to_dq(
                    dq_sum, dq, head, col, col_end, stride_t=stride_dqt, stride_h=stride_dqh, D=D, TMA=TMA, MASKED=False
                )
            for col in range(full_end, col_end, BLOCK_Q):
                dk, dv, _, ds = key_step(
                    dk, dv, (),
                    k=k, v=v, first_key=row_start, bounds=bounds, biases=(), head=head,
                    q_source=q_source, do_source=do_source, lse_ptr=lse_at, delta_ptr=delta_at, q_table_ptr=q_table_ptr,
                    Tq=Tq, dropout=None, scale=scale, col=col, col_end=col_end, D=D, BLOCK_Q=BLOCK_Q,
                    HAS_VISIBLE=HAS_VISIBLE, PRECISION=PRECISION, ALIGNED=False, MASKED=True, LATE=False,
                )  # fmt: skip
                dq = _dq_of(ds, k, PRECISION)
                _add_to_dq(
                    dq_sum, dq, head, col, col_end, stride_t=stride_dqt, stride_h=stride_dqh, D=D, TMA=TMA, MASKED=True
                )

    store_rows(dk_ptr + base * stride_dkt + at_head * stride_dkh, stride_dkt, count, dk * scale, D, BLOCK_K, BLOCK_D)
    store_rows(dv_ptr + base * stride_dvt + at_head * stride_dvh, stride_dvt, count, dv, D, BLOCK_K, BLOCK_D)
