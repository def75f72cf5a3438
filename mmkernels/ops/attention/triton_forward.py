"""Packed attention forward, Triton, sm_80+: one program per (query tile, head).   Tq, Tk tokens, H heads, D head width.

q_table int32 [4, Tq] and k_table int32 [4, Tk] are those of MaskPlan.  Optional arguments are None where their feature
is absent; the code for it is then not there at all.
"""

import triton
import triton.language as tl

from mmkernels.ops.attention.triton_tiles import (
    LN2,
    Dropout,
    Source,
    as_bits,
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
    zero_bits,
)


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    mass,
    pending,
    q,
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
    col_start,
    col,
    col_end,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    LATE: tl.constexpr,
):
    """One online-softmax step over keys [col, col + BLOCK_K).  scale and biases are in the units of _exp.

    biases and mass are empty where there is none.

    LATE, of whole blocks only: acc takes the values of the block before, whose p and alpha are `pending`, and this
    block's are returned for the next step.  On sm_90 that product then runs on the tensor cores while the softmax is
    computed: Triton 3.6 waits for all products behind the first of a step, and for none after it.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    NATURAL: tl.constexpr = q.dtype == tl.float32
    HAS_BIAS: tl.constexpr = len(biases) > 0
    HAS_MASS: tl.constexpr = len(mass) > 0
    cols = col + tl.arange(0, BLOCK_K)
    k = load_block(k_source, col, col_end - col, D, BLOCK_K, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    if LATE:
        # The first step has no block before it: zeros, times its own values.
        before = tl.maximum(col - BLOCK_K, col_start)
        acc = _add_values(acc, pending, v_source, before, BLOCK_K, D, BLOCK_K, BLOCK_D, PRECISION, MASKED)
    if HAS_BIAS or HAS_MASS:
        k_modality = modalities_of(k_table_ptr, cols, cols < col_end, Tk)
    if HAS_BIAS:
        scores = scores * scale + bias_of(biases, k_modality)
    if MASKED:
        if not HAS_BIAS:
            scores = scores * scale
        seen = seen_pairs(bounds, cols, col_end, k_table_ptr + 2 * tl.cast(Tk, tl.int64), HAS_VISIBLE)
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = _exp(scores - shift[:, None], NATURAL)
    elif HAS_BIAS:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = new_max
        p = _exp(scores - shift[:, None], NATURAL)
    else:
        # scale > 0, so the maximum commutes with it, and the product folds into the subtraction's FMA.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        shift = new_max
        p = _exp(scores * scale - shift[:, None], NATURAL)
    alpha = _exp(row_max - shift, NATURAL)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    if HAS_MASS:
        mass = _add_mass(mass, alpha, p, k_modality)
    if dropout is not None:  # after the sums: the denominator and the mass are those before dropout
        p = tl.where(dropout_keep_tile(dropout, head, rows, col, BLOCK_K, ALIGNED), p, 0.0)
    step = (as_bits(p.to(v_source.ptr.dtype.element_ty)), alpha)
    if LATE:
        pending = step
    else:
        acc = _add_values(acc, step, v_source, col, col_end - col, D, BLOCK_K, BLOCK_D, PRECISION, MASKED)
    return acc, new_max, row_sum, mass, pending


@triton.jit
def _add_values(
    acc,
    step,
    v_source,
    col,
    count,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc alpha + p v over keys [col, col + BLOCK_K), count of them there.  step: p, as bits, and alpha."""
    p, alpha = step
    v = load_block(v_source, col, count, D, BLOCK_K, BLOCK_D, MASKED)
    return tl.dot(p.to(v.dtype, bitcast=True), v, acc * alpha[:, None], input_precision=PRECISION)


@triton.jit
def _exp(x, NATURAL: tl.constexpr):
    """2 to the x, which is one instruction; e to the x for fp32, whose lse would show that its terms were rescaled."""
    if NATURAL:
        y = tl.exp(x)
    else:
        y = tl.math.exp2(x)
    return y


@triton.jit
def _add_mass(mass, alpha, p, k_modality):
    """The tuple of each modality's sums [rows], rescaled, and what p [rows, cols] adds to them."""
    total = ()
    for m in tl.static_range(len(mass)):
        added = tl.sum(tl.where((k_modality == m)[None, :], p, 0.0), 1)
        total = total + (mass[m] * alpha + added,)  # noqa: RUF005  Triton compiles no (*total, ...)
    return total


@triton.jit(do_not_specialize=["Tq", "Tk", "drop_threshold"])
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    bias_ptr,
    rng_ptr,
    q_table_ptr,
    k_table_ptr,
    tiles_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
    mass_ptr,
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
    scale,
    bias_scale,
    drop_threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODALITIES: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    LATE: tl.constexpr,
):
    """out[rows] = softmax(q k^T scale + bias) v, lse (natural log) and modality mass of one tile of one head.

    Grid: tiles x heads.  k_desc, v_desc: descriptors of blocks [BLOCK_K, 1, BLOCK_D] for whole unmasked blocks.
    scale, bias_scale: the softmax scale and 1, times log2(e) but for fp32, as _exp wants them.
    keep_scale: 1 / (1 - dropout_p).  MODALITIES: Mk where there is a bias or a mass, else 0.  ALIGNED: see
    dropout_keep_tile.  LATE: of a span of whole blocks, as _attend has it.
    """
    _tile, head, row_start, row_end, first_span, last_span = this_tile(tiles_ptr, heads)

    # int64 before multiplying: token * stride passes 2**31 at 1M tokens x 3072.
    base = row_start.to(tl.int64)
    q_head = tl.cast(head, tl.int64)
    kv_head = head // group
    count = row_end - row_start
    q = load_rows(q_ptr + base * stride_qt + q_head * stride_qh, stride_qt, count, D, BLOCK_Q, BLOCK_D, True)
    k_source = Source(ptr=k_ptr + kv_head.to(tl.int64) * stride_kh, desc=k_desc, stride=stride_kt, head=kv_head)
    v_source = Source(ptr=v_ptr + kv_head.to(tl.int64) * stride_vh, desc=v_desc, stride=stride_vt, head=kv_head)

    rows = row_start + tl.arange(0, BLOCK_Q)
    in_tile = rows < row_end
    bounds = row_bounds(q_table_ptr, rows, in_tile, Tq, HAS_VISIBLE)
    biases = ()
    if bias_ptr is not None:
        q_modality = modalities_of(q_table_ptr, rows, in_tile, Tq)
        biases = row_biases(bias_ptr + q_head * q_modalities * MODALITIES, q_modality, bias_scale, MODALITIES)
    dropout = None
    if rng_ptr is not None:
        dropout = Dropout(rng_ptr=rng_ptr, threshold=drop_threshold, keep_scale=keep_scale)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    mass = ()
    if mass_ptr is not None:
        mass = no_sums(MODALITIES, BLOCK_Q)
    for span in range(first_span, last_span):
        col_start, full_end, col_end = load_span(spans_ptr, span)
        pending = ()
        if LATE:
            pending = (zero_bits(BLOCK_Q, BLOCK_K, v_ptr.dtype.element_ty), tl.full([BLOCK_Q], 1.0, tl.float32))
        for col in range(col_start, full_end, BLOCK_K):
            acc, row_max, row_sum, mass, pending = _attend(
                acc, row_max, row_sum, mass, pending,
                q=q, head=head, rows=rows, bounds=bounds, biases=biases,
                k_source=k_source, v_source=v_source, k_table_ptr=k_table_ptr, Tk=Tk, dropout=dropout, scale=scale,
                col_start=col_start, col=col, col_end=col_end, D=D, BLOCK_K=BLOCK_K,
                HAS_VISIBLE=HAS_VISIBLE, ALIGNED=ALIGNED, PRECISION=PRECISION, MASKED=False, LATE=LATE,
            )  # fmt: skip
        if LATE and full_end > col_start:
            before = full_end - BLOCK_K
            acc = _add_values(acc, pending, v_source, before, BLOCK_K, D, BLOCK_K, BLOCK_D, PRECISION, MASKED=False)
        for col in range(full_end, col_end, BLOCK_K):
            acc, row_max, row_sum, mass, _ = _attend(
                acc, row_max, row_sum, mass, (),
                q=q, head=head, rows=rows, bounds=bounds, biases=biases,
                k_source=k_source, v_source=v_source, k_table_ptr=k_table_ptr, Tk=Tk, dropout=dropout, scale=scale,
                col_start=col_start, col=col, col_end=col_end, D=D, BLOCK_K=BLOCK_K,
                HAS_VISIBLE=HAS_VISIBLE, ALIGNED=ALIGNED, PRECISION=PRECISION, MASKED=True, LATE=False,
            )  # fmt: skip

    # A row that saw nothing: out 0, lse -inf, mass 0.
    blind = row_sum == 0.0
    row_sum = tl.where(blind, 1.0, row_sum)
    factor = 1.0 / row_sum
    if q.dtype == tl.float32:
        lse = row_max + tl.log(row_sum)  # row_max of a blind row is still -inf
    else:
        lse = row_max * LN2 + tl.math.log2(row_sum) * LN2  # a fused add: one rounding less than LN2 times the sum
    tl.store(lse_ptr + q_head * Tq + rows, lse, mask=in_tile)
    if mass_ptr is not None:
        for m in tl.static_range(MODALITIES):
            tl.store(mass_ptr + (rows.to(tl.int64) * heads + head) * MODALITIES + m, mass[m] * factor, mask=in_tile)
    if rng_ptr is not None:
        factor *= keep_scale
    out = acc * factor[:, None]
    store_rows(out_ptr + base * stride_ot + q_head * stride_oh, stride_ot, count, out, D, BLOCK_Q, BLOCK_D)
