"""Modality embedding forward, Triton, sm_80+.   T tokens, E width, M modalities, A position axes, R rows of a tile.

A program walks over tiles of R packed rows.  A row is a vector over the lanes, and where it comes from is scalars.
What R rows need is asked for before any of it is used, so that as many loads are under way.  With a norm a program has
whole rows; without one it has COLUMNS of them, and neighbouring programs the others.  E is a constant of the compiled
kernel: where it is no power of two, the compiler drops the registers beyond it.  Streams and position tables are tuples
of pointers (one that is absent repeats another), chosen by selects: a select keeps the pointers' known alignment, so
that loads stay 128 bits wide; a table of addresses in memory would lose it.

STREAMS  per modality: -1 no rows; -2 token ids [N_m]; else floats [N_m, E], and the first modality of the same dtype
TOKENS   the stream whose loads serve the token table too, as both have one dtype; -1 none
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
    streams,
    sizes,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    t,
    T,
    M: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr,
):
    """-> modality, stream row, token-table row, position-table rows (a tuple) of packed row t; -1 where it has none.

    A row beyond T has none.
    """
    valid = t < T
    modality = tl.load(modality_ids_ptr + t, mask=valid, other=0).to(tl.int32)
    source = tl.load(source_rows_ptr + t, mask=valid, other=0).to(tl.int64)  # int64: row * E passes 2**31
    tl.device_assert(modality < M, "modality_embed: a modality has no row in modality_weight")
    modality = tl.where(valid & (modality < M), modality, -1)
    named = source < 0  # whether the row is one of the token table's
    token = tl.where(named, -(source + 1), -1)
    row = tl.cast(-1, tl.int64)
    for m in tl.static_range(M):
        here = (modality == m) & (source >= 0)
        if STREAMS[m] != -1:
            inside = source < (sizes[m] - 3) // 2
            tl.device_assert(inside | (here == 0), "modality_embed: a source row is outside its stream")
            here = here & inside
        if STREAMS[m] == -2:
            token = tl.where(here, tl.load(streams[m] + source, mask=here, other=0).to(tl.int64), token)
            named = named | here
        elif STREAMS[m] >= 0:
            row = tl.where(here, source, row)
    inside = (token >= 0) & (token < V)
    tl.device_assert(inside | (named == 0), "modality_embed: a token id is outside the token table")
    token = tl.where(inside, token, -1)
    positions = ()
    for q in tl.static_range(len(TABLES) // M):
        limit = tl.cast(0, tl.int64)
        for m in tl.static_range(M):
            if TABLES[q * M + m] >= 0:
                limit = tl.where(modality == m, ROWS_OF[TABLES[q * M + m]], limit)
        position = tl.cast(0, tl.int64)
        if q < A:  # an axis that the layout does not have counts as 0
            position += tl.load(positions_ptr + tl.cast(A - 1 - q, tl.int64) * T + t, mask=valid, other=0)
        inside = (position >= 0) & (position < limit)
        tl.device_assert(inside | (limit == 0), "modality_embed: a position is outside its table")
        positions = positions + (tl.where(inside, position, -1),)  # noqa: RUF005  Triton compiles no (*positions, ...)
    return modality, row, token, positions


@triton.jit
def locate_tile(
    streams, sizes, modality_ids_ptr, source_rows_ptr, positions_ptr, start, T,
    M: tl.constexpr, A: tl.constexpr, V: tl.constexpr, STREAMS: tl.constexpr, TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A tuple of what locate says of each of rows [start, start + R)."""
    places = ()
    for r in tl.static_range(R):
        place = locate(
            streams, sizes, modality_ids_ptr, source_rows_ptr, positions_ptr, start + r, T,
            M, A, V, STREAMS, TABLES, ROWS_OF,
        )  # fmt: skip
        places = places + (place,)  # noqa: RUF005
    return places


@triton.jit
def load_row(table_ptr, row, cols, E: tl.constexpr):
    """Columns cols of a row of table [rows, E]; zeros if row is -1, and beyond E."""
    return tl.load(table_ptr + row * E + cols, mask=(cols < E) & (row >= 0), other=0.0)


@triton.jit
def load_parts(
    streams,
    modality_weight_ptr,
    token_weight_ptr,
    tables,
    place,
    cols,
    E: tl.constexpr,
    M: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    TABLES: tl.constexpr,
):
    """What is summed for the row at `place`, a result of locate: a tuple of [columns], each in its own dtype."""
    modality, row, token, positions = place
    parts = (load_row(modality_weight_ptr, modality.to(tl.int64), cols, E),)
    for first in tl.static_range(M):
        if STREAMS[first] == first:  # one load for all streams of this dtype
            source = tl.where(modality == first, streams[first], streams[first])
            at = tl.where(modality == first, row, -1)
            for m in tl.static_range(M):
                if m > first and STREAMS[m] == first:
                    source = tl.where(modality == m, streams[m], source)
                    at = tl.where(modality == m, row, at)
            if first == TOKENS:
                source = tl.where(token >= 0, token_weight_ptr, source)
                at = tl.where(token >= 0, token, at)
            parts = parts + (load_row(source, at, cols, E),)  # noqa: RUF005
    if token_weight_ptr is not None and TOKENS < 0:
        parts = parts + (load_row(token_weight_ptr, token, cols, E),)  # noqa: RUF005
    for q in tl.static_range(len(TABLES) // M):
        table = tl.where(modality < 0, tables[0], tables[0])
        for m in tl.static_range(M):
            if TABLES[q * M + m] >= 0:
                table = tl.where(modality == m, tables[TABLES[q * M + m]], table)
        parts = parts + (load_row(table, positions[q], cols, E),)  # noqa: RUF005
    return parts


@triton.jit
def add_parts(parts):
    """Their sum in fp32."""
    x = parts[0].to(tl.float32)
    for i in tl.static_range(1, len(parts)):
        x += parts[i].to(tl.float32)
    return x


@triton.jit
def dropped(x, rng_ptr, t, first_col, threshold, keep_scale, COLUMNS: tl.constexpr):
    """x [COLUMNS] of row t from column first_col on, with what dropout does not keep set to 0 and the rest scaled."""
    column = (first_col // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    token = tl.zeros_like(column) + t.to(tl.uint32)
    offset = tl.zeros_like(column) + tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(rng_ptr), column, token, tl.zeros_like(column), offset)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COLUMNS,))  # w0 w1 w2 w3 of each quad in turn
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
    eps,
    threshold,
    keep_scale,
    E: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rng_ptr is None: no dropout."""
    column_blocks = tl.cdiv(E, COLUMNS)  # 1 with a norm
    first_col = tl.program_id(0) % column_blocks * COLUMNS
    cols = first_col + tl.arange(0, COLUMNS)
    inside = cols < E
    walkers = tl.num_programs(0) // column_blocks
    for tile in tl.range(tl.program_id(0) // column_blocks, tl.cdiv(T, R), walkers, num_stages=1):
        start = tl.cast(tile, tl.int64) * R  # int64: t * E passes 2**31
        places = locate_tile(
            streams, sizes, modality_ids_ptr, source_rows_ptr, positions_ptr, start, T,
            M, A, V, STREAMS, TABLES, ROWS_OF, R,
        )  # fmt: skip
        rows = ()
        for r in tl.static_range(R):
            parts = load_parts(
                streams, modality_weight_ptr, token_weight_ptr, tables, places[r], cols, E, M, STREAMS, TOKENS, TABLES
            )
            rows = rows + (parts,)  # noqa: RUF005
        for r in tl.static_range(R):
            t = start + r
            valid = t < T
            x = add_parts(rows[r])
            if NORM > 0:
                if NORM == 1:
                    mean = tl.sum(x, 0) / E
                    tl.store(mean_ptr + t, mean, mask=valid)
                    x = tl.where(inside, x - mean, 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / E + eps)
                tl.store(rstd_ptr + t, rstd, mask=valid)
                x *= rstd
                # Read again for every row: they stay in the first-level cache, and registers are scarcer.
                if norm_weight_ptr is not None:
                    x *= tl.load(norm_weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
                if norm_bias_ptr is not None:
                    x += tl.load(norm_bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            if rng_ptr is not None:
                x = dropped(x, rng_ptr, t, first_col, threshold, keep_scale, COLUMNS)
            tl.store(out_ptr + t * E + cols, x.to(out_ptr.dtype.element_ty), mask=inside & valid)
