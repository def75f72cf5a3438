"""Modality embedding backward, Triton, sm_80+: no atomics, so every run gives the same bits.

T tokens, E width, M modalities, A position axes.
1. Rows: gradient of each row; stream gradients by plain stores; per program partial sums for the norm and the
   modalities; for the tables, the row gradients [T, E] in fp32 and the table row (key) of each token.
2. Tables: tokens sorted by key, in chunks of CHUNK: a key's run inside one chunk is summed into its table row at once;
   a run over several chunks leaves one partial sum per chunk.
3. Spans: those partial sums, added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.modality_embed.triton_forward import locate, position_row, sum_row


@triton.jit
def _flush(partial_ptr, acc, cols, inside):
    """partial += acc.  Only this program touches the row, and always with the same threads per column."""
    tl.debug_barrier()  # the row may have been written by the previous flush
    tl.store(partial_ptr + cols, tl.load(partial_ptr + cols, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit
def modality_embed_bwd_rows_kernel(
    grad_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    s3_ptr,
    s4_ptr,
    s5_ptr,
    s6_ptr,
    s7_ptr,
    modality_weight_ptr,
    token_weight_ptr,
    table_ptr,
    norm_weight_ptr,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    mean_ptr,
    rstd_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    d4_ptr,
    d5_ptr,
    d6_ptr,
    d7_ptr,
    norm_partial_ptr,
    modality_partial_ptr,
    dx_ptr,
    keys_ptr,
    T,
    E,
    M: tl.constexpr,
    A: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """mean_ptr is None: no norm.  d*_ptr, norm_partial_ptr [programs, 2, E], modality_partial_ptr [programs, M, E] (of
    zeros), dx_ptr [T, E] with keys_ptr [Q + 1, T] (position tables, then token table): None where not wanted."""
    streams = (s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr, s6_ptr, s7_ptr)
    grads = (d0_ptr, d1_ptr, d2_ptr, d3_ptr, d4_ptr, d5_ptr, d6_ptr, d7_ptr)
    cols = tl.arange(0, BLOCK_E)
    inside = cols < E
    pid = tl.program_id(0).to(tl.int64)
    start = pid * ROWS
    d_weight = tl.zeros((BLOCK_E,), tl.float32)
    d_bias = tl.zeros((BLOCK_E,), tl.float32)
    d_modality = tl.zeros((BLOCK_E,), tl.float32)
    current = tl.load(modality_ids_ptr + start).to(tl.int32)
    for i in range(0, tl.minimum(ROWS, T - start)):
        t = start + i
        modality, row, token = locate(streams, modality_ids_ptr, source_rows_ptr, t, M, STREAMS)
        dx = tl.load(grad_ptr + t * E + cols, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            x = sum_row(
                streams,
                modality_weight_ptr,
                token_weight_ptr,
                table_ptr,
                positions_ptr,
                t,
                T,
                E,
                modality,
                row,
                token,
                cols,
                M,
                A,
                STREAMS,
                TABLES,
            )
            rstd = tl.load(rstd_ptr + t)
            normed = tl.where(inside, (x - tl.load(mean_ptr + t)) * rstd, 0.0)
            if norm_partial_ptr is not None:
                d_weight += dx * normed
                d_bias += dx
            if norm_weight_ptr is not None:
                dx *= tl.load(norm_weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            dx = (dx - tl.sum(dx, 0) / E - normed * (tl.sum(dx * normed, 0) / E)) * rstd
        for m in tl.static_range(M):
            if grads[m] is not None:
                here = inside & (modality == m) & (token < 0)
                tl.store(grads[m] + row * E + cols, dx.to(grads[m].dtype.element_ty), mask=here)
        if modality_partial_ptr is not None:
            if modality != current:
                _flush(modality_partial_ptr + (pid * M + current) * E, d_modality, cols, inside)
                d_modality = tl.zeros((BLOCK_E,), tl.float32)
                current = modality
            d_modality += dx
        if dx_ptr is not None:
            tl.store(dx_ptr + t * E + cols, dx, mask=inside)
            for q in tl.static_range(len(TABLES) // M):
                position = position_row(positions_ptr, t, T, modality, q, M, A, TABLES)
                tl.store(keys_ptr + q * T + t, position.to(tl.int32))
            tl.store(keys_ptr + (len(TABLES) // M) * T + t, token.to(tl.int32))
    if modality_partial_ptr is not None:
        _flush(modality_partial_ptr + (pid * M + current) * E, d_modality, cols, inside)
    if norm_partial_ptr is not None:
        tl.store(norm_partial_ptr + (2 * pid) * E + cols, d_weight, mask=inside)
        tl.store(norm_partial_ptr + (2 * pid + 1) * E + cols, d_bias, mask=inside)


@triton.jit
def modality_embed_bwd_tables_kernel(
    dx_ptr, order_ptr, keys_ptr, table_ptr, head_ptr, tail_ptr, T, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """table[key] = sum of dx over the tokens of that key.  keys int32 [T] sorted, -1: none; order int64 [T]: tokens.

    head [chunks, E]  the part of a run that began in an earlier chunk;  tail [chunks, E]  of one that goes on later
    """
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = cols < E
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, T)
    current = tl.load(keys_ptr + start)
    is_head = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == current
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for i in range(start, stop):
        key = tl.load(keys_ptr + i)
        if key != current:
            to = tl.where(is_head, head_ptr + chunk * E, table_ptr + current * E)
            tl.store(to + cols, acc, mask=inside & (current >= 0))
            acc = tl.zeros((BLOCK_E,), tl.float32)
            current = key
            is_head = start < 0  # False
        token = tl.load(order_ptr + i)
        acc += tl.load(dx_ptr + token * E + cols, mask=inside & (key >= 0), other=0.0)
    goes_on = tl.load(keys_ptr + stop, mask=stop < T, other=-1) == current
    to = tl.where(goes_on, tail_ptr + chunk * E, table_ptr + current * E)
    to = tl.where(is_head, head_ptr + chunk * E, to)
    tl.store(to + cols, acc, mask=inside & (current >= 0))


@triton.jit
def modality_embed_bwd_spans_kernel(
    keys_ptr, table_ptr, head_ptr, tail_ptr, T, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Finishes the run that begins in this chunk and ends in a later one, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = cols < E
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, T)
    key = tl.load(keys_ptr + stop - 1)
    goes_on = tl.load(keys_ptr + stop, mask=stop < T, other=-1) == key
    began_before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    if goes_on & (began_before == 0) & (key >= 0):
        acc = tl.load(tail_ptr + chunk * E + cols, mask=inside, other=0.0)
        later = chunk + 1
        while tl.load(keys_ptr + later * CHUNK, mask=later * CHUNK < T, other=-1) == key:
            acc += tl.load(head_ptr + later * E + cols, mask=inside, other=0.0)
            later += 1
        tl.store(table_ptr + key.to(tl.int64) * E + cols, acc, mask=inside)
