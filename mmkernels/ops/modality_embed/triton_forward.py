"""Modality embedding forward, Triton, sm_80+.   T tokens, E width, M modalities, A position axes.

A program walks ROWS consecutive packed rows; a row is one vector of BLOCK_E lanes held in registers, so that it is read
once and written once.  Streams are up to eight pointers, chosen per row by scalar selects: a select keeps the pointers'
known alignment (so loads stay 128 bits wide), which a table of addresses in memory would lose.

STREAMS  per modality: 0 no rows, 1 floats [N_m, E], 2 token ids [N_m]
TABLES   first row of each position table in the joint table, [q * M + m] for the q-th last axis; -1: no such table
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_MODALITIES = 8  # one pointer argument each


@triton.jit
def locate(streams, modality_ids_ptr, source_rows_ptr, t, M: tl.constexpr, STREAMS: tl.constexpr):
    """-> modality, stream row, token-table row or -1, of packed row t."""
    modality = tl.load(modality_ids_ptr + t).to(tl.int32)
    row = tl.load(source_rows_ptr + t).to(tl.int64)  # int64: row * E passes 2**31 at 1M rows x 3072
    token = tl.where(row < 0, -(row + 1), -1)
    for m in tl.static_range(M):
        if STREAMS[m] == 2:
            here = (modality == m) & (row >= 0)
            token = tl.where(here, tl.load(streams[m] + row, mask=here, other=0).to(tl.int64), token)
    return modality, row, token


@triton.jit
def position_row(
    positions_ptr, t, T, modality, Q: tl.constexpr, M: tl.constexpr, A: tl.constexpr, TABLES: tl.constexpr
):
    """Row of the joint position table that token t reads for its Q-th last axis, or -1."""
    first = tl.full((), -1, tl.int64)
    for m in tl.static_range(M):
        first = tl.where(modality == m, TABLES[Q * M + m], first)
    position = tl.full((), 0, tl.int64)
    if A > Q:  # an axis that the layout does not have counts as 0
        position += tl.load(positions_ptr + (A - 1 - Q) * T + t)
    return tl.where(first >= 0, first + position, -1)


@triton.jit
def sum_row(
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
    M: tl.constexpr,
    A: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
):
    """source row + modality row + position rows, fp32 [BLOCK_E], 0 beyond E."""
    inside = cols < E
    x = tl.load(modality_weight_ptr + modality.to(tl.int64) * E + cols, mask=inside, other=0.0).to(tl.float32)
    source = None
    for m in tl.static_range(M):
        if STREAMS[m] == 1:
            if source is None:
                source = streams[m]
            else:
                source = tl.where(modality == m, streams[m], source)
    if source is not None:
        x += tl.load(source + row * E + cols, mask=inside & (token < 0), other=0.0).to(tl.float32)
    if token_weight_ptr is not None:
        x += tl.load(token_weight_ptr + token * E + cols, mask=inside & (token >= 0), other=0.0).to(tl.float32)
    for q in tl.static_range(len(TABLES) // M):
        position = position_row(positions_ptr, t, T, modality, q, M, A, TABLES)
        x += tl.load(table_ptr + position * E + cols, mask=inside & (position >= 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def modality_embed_fwd_kernel(
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
    norm_bias_ptr,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    E,
    eps,
    M: tl.constexpr,
    A: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """mean_ptr is None: no norm."""
    streams = (s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr, s6_ptr, s7_ptr)
    cols = tl.arange(0, BLOCK_E)
    inside = cols < E
    start = tl.program_id(0).to(tl.int64) * ROWS  # int64: t * E passes 2**31
    for i in range(0, tl.minimum(ROWS, T - start)):
        t = start + i
        modality, row, token = locate(streams, modality_ids_ptr, source_rows_ptr, t, M, STREAMS)
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
        if mean_ptr is not None:
            mean = tl.sum(x, 0) / E
            centered = tl.where(inside, x - mean, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / E + eps)
            tl.store(mean_ptr + t, mean)
            tl.store(rstd_ptr + t, rstd)
            x = centered * rstd
            # Read again for every row: they stay in the first-level cache, and registers are scarcer.
            if norm_weight_ptr is not None:
                x *= tl.load(norm_weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            if norm_bias_ptr is not None:
                x += tl.load(norm_bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * E + cols, x.to(out_ptr.dtype.element_ty), mask=inside)
