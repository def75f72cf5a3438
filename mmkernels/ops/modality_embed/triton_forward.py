"""Modality embedding forward, Triton, sm_80+.   T tokens, E width, M modalities, A position axes, R rows of a tile.

A program walks over tiles of R packed rows; a tile is held in registers, so that it is read once and written once.
With a norm a tile has whole rows.  Without one it has COLUMNS of them, and neighbouring programs the others: no lane
idles where E is no power of two, and each lane asks for several rows at once.  Streams and position tables are tuples
of pointers (one that is absent repeats another), chosen per row by selects: a select keeps the pointers' known
alignment, so that loads stay 128 bits wide; a table of addresses in memory would lose it.

STREAMS  per modality: -1 no rows; -2 token ids [N_m]; else floats [N_m, E], and the first modality of the same dtype
TABLES   [q * M + m]: which table modality m reads on the q-th last axis, or -1;  ROWS_OF  rows of each table
NORM     0 none, 1 layernorm, 2 rmsnorm
sizes    2 N_m + 3 of each stream: odd and above 1, so that another batch is not another specialisation (Triton 3.6
         heeds do_not_specialize in plain arguments, not in tuples)

An index outside its table reads as zero, and stops the program where Triton's debug mode is on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(
    streams, sizes, modality_ids_ptr, source_rows_ptr, t, T, M: tl.constexpr, V: tl.constexpr, STREAMS: tl.constexpr
):
    """-> modality, stream row or -1, token-table row or -1, of packed rows t [R]."""
    valid = t < T
    modality = tl.load(modality_ids_ptr + t, mask=valid, other=0).to(tl.int32)
    source = tl.load(source_rows_ptr + t, mask=valid, other=0).to(tl.int64)  # int64: row * E passes 2**31
    token = tl.where(source < 0, -(source + 1), -1)
    row = tl.full(t.shape, -1, tl.int64)
    for m in tl.static_range(M):
        here = valid & (modality == m) & (source >= 0)
        if STREAMS[m] != -1:
            inside = source < (sizes[m] - 3) // 2
            tl.device_assert(inside | (here == 0), "modality_embed: a source row is outside its stream")
            here = here & inside
        if STREAMS[m] == -2:
            token = tl.where(here, tl.load(streams[m] + source, mask=here, other=0).to(tl.int64), token)
        elif STREAMS[m] >= 0:
            row = tl.where(here, source, row)
    named = valid & (token != -1)
    tl.device_assert(
        ((token >= 0) & (token < V)) | (named == 0), "modality_embed: a token id is outside the token table"
    )
    token = tl.where(named & (token >= 0) & (token < V), token, -1)
    return modality, row, token


@triton.jit
def position_of(
    positions_ptr,
    t,
    T,
    modality,
    Q: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr,
):
    """Row that each token reads in the table of its Q-th last axis, or -1."""
    limit = tl.zeros(t.shape, tl.int64)
    for m in tl.static_range(M):
        if TABLES[Q * M + m] >= 0:
            limit = tl.where(modality == m, ROWS_OF[TABLES[Q * M + m]], limit)
    position = tl.zeros(t.shape, tl.int64)
    if A > Q:  # an axis that the layout does not have counts as 0
        position += tl.load(positions_ptr + (A - 1 - Q) * T + t, mask=t < T, other=0)
    position = tl.where(t < T, position, 0)
    inside = (position >= 0) & (position < limit)
    tl.device_assert(inside | (limit == 0), "modality_embed: a position is outside its table")
    return tl.where(inside & (t < T), position, -1)


@triton.jit
def sum_tile(
    streams,
    modality_weight_ptr,
    token_weight_ptr,
    tables,
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
    ROWS_OF: tl.constexpr,
):
    """source row + modality row + position rows, fp32 [R, columns], 0 beyond E.  cols [1, columns]."""
    inside = (cols < E) & (t < T)[:, None]
    x = tl.load(modality_weight_ptr + modality.to(tl.int64)[:, None] * E + cols, mask=inside, other=0.0).to(tl.float32)
    for first in tl.static_range(M):
        if STREAMS[first] == first:  # one load for all streams of this dtype
            source = tl.where(modality == first, streams[first], streams[first])
            here = modality == first
            for m in tl.static_range(M):
                if m > first and STREAMS[m] == first:
                    source = tl.where(modality == m, streams[m], source)
                    here = here | (modality == m)
            mask = inside & (here & (row >= 0))[:, None]
            x += tl.load(source[:, None] + row[:, None] * E + cols, mask=mask, other=0.0).to(tl.float32)
    if token_weight_ptr is not None:
        mask = inside & (token >= 0)[:, None]
        x += tl.load(token_weight_ptr + token[:, None] * E + cols, mask=mask, other=0.0).to(tl.float32)
    for q in tl.static_range(len(TABLES) // M):
        position = position_of(positions_ptr, t, T, modality, q, M, A, TABLES, ROWS_OF)
        table = tl.where(position < 0, tables[0], tables[0])
        for m in tl.static_range(M):
            if TABLES[q * M + m] >= 0:
                table = tl.where(modality == m, tables[TABLES[q * M + m]], table)
        mask = inside & (position >= 0)[:, None]
        x += tl.load(table[:, None] + position[:, None] * E + cols, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def dropped(x, rng_ptr, t, first_col, threshold, keep_scale, R: tl.constexpr, COLUMNS: tl.constexpr):
    """x [R, COLUMNS] from column first_col on, with what dropout does not keep set to 0 and the rest scaled."""
    quad = first_col // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    column = (quad + tl.zeros((R, COLUMNS // 4), tl.int32)).to(tl.uint32)
    token = (t[:, None] + tl.zeros((R, COLUMNS // 4), tl.int64)).to(tl.uint32)
    offset = tl.zeros((R, COLUMNS // 4), tl.uint32) + tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(rng_ptr), column, token, tl.zeros_like(column), offset)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, COLUMNS))  # w0 w1 w2 w3 of each quad in turn
    keep = words.to(tl.uint32, bitcast=True) >= tl.cast(threshold, tl.uint32)
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit(do_not_specialize=["T", "sizes"])
def modality_embed_fwd_kernel(
    streams,
    sizes,
    modality_weight_ptr,
    token_weight_ptr,
    tables,
    norm_weight_ptr,
    norm_bias_ptr,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    rng_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    E,
    eps,
    threshold,
    keep_scale,
    M: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rng_ptr is None: no dropout."""
    column_blocks = tl.cdiv(E, COLUMNS)  # 1 with a norm
    first_col = tl.program_id(0) % column_blocks * COLUMNS
    cols = first_col + tl.arange(0, COLUMNS)[None, :]
    inside = cols < E
    walkers = tl.num_programs(0) // column_blocks
    for tile in tl.range(tl.program_id(0) // column_blocks, tl.cdiv(T, R), walkers, num_stages=1):
        t = tile * R + tl.arange(0, R).to(tl.int64)  # int64: t * E passes 2**31
        modality, row, token = locate(streams, sizes, modality_ids_ptr, source_rows_ptr, t, T, M, V, STREAMS)
        x = sum_tile(
            streams,
            modality_weight_ptr,
            token_weight_ptr,
            tables,
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
            ROWS_OF,
        )
        if NORM > 0:
            if NORM == 1:
                mean = tl.sum(x, 1) / E
                tl.store(mean_ptr + t, mean, mask=t < T)
                x = tl.where(inside, x - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / E + eps)
            tl.store(rstd_ptr + t, rstd, mask=t < T)
            x *= rstd[:, None]
            # Read again for every tile: they stay in the first-level cache, and registers are scarcer.
            if norm_weight_ptr is not None:
                x *= tl.load(norm_weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            if norm_bias_ptr is not None:
                x += tl.load(norm_bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            x = dropped(x, rng_ptr, t, first_col, threshold, keep_scale, R, COLUMNS)
        tl.store(out_ptr + t[:, None] * E + cols, x.to(out_ptr.dtype.element_ty), mask=inside & (t < T)[:, None])
