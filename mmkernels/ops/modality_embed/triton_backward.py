"""Modality embedding backward, Triton, sm_80+: no atomics, so every run gives the same bits.

T tokens, E width, M modalities, A position axes, R rows of a tile.
1. Rows: dx, the gradient of each row before the norm; stream gradients by plain stores; partial sums for the norm and
   the modalities, per walk (the consecutive rows of one program), kept in registers for all of them; for the tables,
   the key (table row, all tables numbered through) of each token and slot, and the two means of each row, from which dx
   can be had again column by column.
2. Tables: (key, token) sorted by key, in chunks of CHUNK: a key's run inside one chunk is summed into its table row at
   once; a run over several chunks leaves one partial sum per chunk.  dx is computed again: that reads two 16-bit rows,
   where a stored fp32 dx would be written once and read for each table.
3. Spans: those partial sums, added in order.
4. Walks: the partial sums of 1, added in an order that T and E alone decide, and rounded to the parameters' type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.modality_embed.triton_forward import dropped, locate, position_of, sum_tile


@triton.jit
def _graded(
    grad_ptr,
    streams,
    sizes,
    modality_weight_ptr,
    token_weight_ptr,
    tables,
    norm_weight_ptr,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    rng_ptr,
    mean_ptr,
    rstd_ptr,
    t,
    first_col,
    T,
    E,
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
    """-> modality, row, token as `locate`; gradient after dropout, normed values (of NORM > 0), rstd of rows t."""
    cols = first_col + tl.arange(0, COLUMNS)[None, :]
    inside = (cols < E) & (t < T)[:, None]
    modality, row, token = locate(streams, sizes, modality_ids_ptr, source_rows_ptr, t, T, M, V, STREAMS)
    normed = tl.zeros((R, COLUMNS), tl.float32)
    rstd = tl.full((R,), 1.0, tl.float32)
    if NORM > 0:
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
        rstd = tl.load(rstd_ptr + t, mask=t < T, other=0.0)
        if NORM == 1:
            x -= tl.load(mean_ptr + t, mask=t < T, other=0.0)[:, None]
        normed = tl.where(inside, x * rstd[:, None], 0.0)
    grad = tl.load(grad_ptr + t[:, None] * E + cols, mask=inside, other=0.0).to(tl.float32)
    if rng_ptr is not None:
        grad = dropped(grad, rng_ptr, t, first_col, threshold, keep_scale, R, COLUMNS)
    return modality, row, token, grad, normed, rstd


@triton.jit
def _added(sums, x, modality, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[m] [S, COLUMNS] + the rows of x [R, COLUMNS] that are of modality m, every S-th of them into one."""
    found = ()
    for m in tl.static_range(M):
        # A select, not a product: what is not finite in one modality's row is no other's business.
        part = tl.where((modality == m)[:, None], x, 0.0)
        found += (sums[m] + tl.sum(tl.reshape(part, (R // S, S, COLUMNS)), 0),)
    return found


@triton.jit(do_not_specialize=["T", "TILES", "sizes"])
def modality_embed_bwd_rows_kernel(
    grad_ptr,
    streams,
    sizes,
    modality_weight_ptr,
    token_weight_ptr,
    tables,
    norm_weight_ptr,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    rng_ptr,
    mean_ptr,
    rstd_ptr,
    d_streams,
    partial_ptr,
    means_ptr,
    keys_ptr,
    T,
    TILES,
    E,
    threshold,
    keep_scale,
    M: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr,
    NORM: tl.constexpr,
    WANTED: tl.constexpr,
    NORM_SUMS: tl.constexpr,
    MODALITY_SUMS: tl.constexpr,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program takes COLUMNS, all with a norm, of TILES tiles of R rows.  WANTED: which stream gradients to write.

    partial_ptr  [walks, N, E], None where N is 0: sums over a walk's rows, of the norm's weight and bias if NORM_SUMS,
                 then of each modality if MODALITY_SUMS;  S: how many rows they are kept as, those that one lane has not
    means_ptr [2, T], keys_ptr [slots + 1, T]: None where not wanted
    FIRST        the first key of each position table, then of the token table
    """
    column_blocks = tl.cdiv(E, COLUMNS)
    first_col = tl.program_id(0) % column_blocks * COLUMNS
    cols = first_col + tl.arange(0, COLUMNS)
    within = cols < E
    walk = (tl.program_id(0) // column_blocks).to(tl.int64)
    d_weight = tl.zeros((R, COLUMNS), tl.float32)
    d_bias = tl.zeros((R, COLUMNS), tl.float32)
    d_modality = ()
    if MODALITY_SUMS:
        for _ in tl.static_range(M):
            d_modality += (tl.zeros((S, COLUMNS), tl.float32),)
    for i in tl.range(0, tl.minimum(TILES, tl.cdiv(T - walk * TILES * R, R)), num_stages=1):
        t = (walk * TILES + i) * R + tl.arange(0, R)
        modality, row, token, grad, normed, rstd = _graded(
            grad_ptr,
            streams,
            sizes,
            modality_weight_ptr,
            token_weight_ptr,
            tables,
            norm_weight_ptr,
            modality_ids_ptr,
            source_rows_ptr,
            positions_ptr,
            rng_ptr,
            mean_ptr,
            rstd_ptr,
            t,
            first_col,
            T,
            E,
            threshold,
            keep_scale,
            M,
            A,
            V,
            STREAMS,
            TABLES,
            ROWS_OF,
            NORM,
            R,
            COLUMNS,
        )
        dx = grad
        if NORM > 0:
            if NORM_SUMS:
                d_weight += grad * normed
                d_bias += grad
            if norm_weight_ptr is not None:
                dx *= tl.load(norm_weight_ptr + cols, mask=within, other=0.0).to(tl.float32)[None, :]
            mean_gx = tl.sum(dx * normed, 1) / E
            mean_g = tl.zeros((R,), tl.float32)
            if NORM == 1:
                mean_g = tl.sum(dx, 1) / E
            if means_ptr is not None:
                tl.store(means_ptr + t, mean_g, mask=t < T)
                tl.store(means_ptr + T + t, mean_gx, mask=t < T)
            dx = (dx - mean_g[:, None] - normed * mean_gx[:, None]) * rstd[:, None]
        for first in tl.static_range(M):
            if STREAMS[first] == first:  # one store for all streams of this dtype
                to = tl.where(modality == first, d_streams[first], d_streams[first])
                here = (modality == first) & (WANTED[first] == 1)
                for m in tl.static_range(M):
                    if m > first and STREAMS[m] == first:
                        to = tl.where(modality == m, d_streams[m], to)
                        here = here | ((modality == m) & (WANTED[m] == 1))
                mask = within[None, :] & (here & (row >= 0))[:, None]
                value = dx.to(d_streams[first].dtype.element_ty)
                tl.store(to[:, None] + row[:, None] * E + cols[None, :], value, mask=mask)
        if MODALITY_SUMS:
            d_modality = _added(d_modality, dx, tl.where(t < T, modality, -1), M, R, S, COLUMNS)
        if keys_ptr is not None:
            SLOTS: tl.constexpr = len(TABLES) // M
            mine = (t < T) & (first_col == 0)
            for q in tl.static_range(SLOTS):
                position = position_of(positions_ptr, t, T, modality, q, M, A, TABLES, ROWS_OF)
                key = tl.full((R,), -1, tl.int64)
                for m in tl.static_range(M):
                    if TABLES[q * M + m] >= 0:
                        here = (modality == m) & (position >= 0)
                        key = tl.where(here, FIRST[TABLES[q * M + m]] + position, key)
                tl.store(keys_ptr + q * T + t, key.to(keys_ptr.dtype.element_ty), mask=mine)
            key = tl.where(token >= 0, FIRST[len(FIRST) - 1] + token, -1)
            tl.store(keys_ptr + SLOTS * T + t, key.to(keys_ptr.dtype.element_ty), mask=mine)
    N: tl.constexpr = 2 * NORM_SUMS + M * MODALITY_SUMS
    if NORM_SUMS:
        tl.store(partial_ptr + walk * N * E + cols, tl.sum(d_weight, 0), mask=within)
        tl.store(partial_ptr + (walk * N + 1) * E + cols, tl.sum(d_bias, 0), mask=within)
    if MODALITY_SUMS:
        for m in tl.static_range(M):
            to = partial_ptr + (walk * N + 2 * NORM_SUMS + m) * E + cols
            tl.store(to, tl.sum(d_modality[m], 0), mask=within)


@triton.jit(do_not_specialize=["W"])
def modality_embed_bwd_walks_kernel(
    partial_ptr, d_weight_ptr, d_bias_ptr, d_modality_ptr, W, E, N: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr
):
    """partial [W, N, E] summed over W: to the norm's weight and bias, unless None, and to rows of the modalities."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    acc = tl.zeros((R, COLUMNS), tl.float32)
    for first in range(0, W, R):
        walk = first + tl.arange(0, R).to(tl.int64)[:, None]
        mask = (walk < W) & (cols < E)[None, :]
        acc += tl.load(partial_ptr + (walk * N + row) * E + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + cols, total.to(d_weight_ptr.dtype.element_ty), mask=(cols < E) & (row == 0))
        tl.store(d_bias_ptr + cols, total.to(d_bias_ptr.dtype.element_ty), mask=(cols < E) & (row == 1))
        row -= 2
    if d_modality_ptr is not None:
        to = d_modality_ptr + row * E + cols
        tl.store(to, total.to(d_modality_ptr.dtype.element_ty), mask=(cols < E) & (row >= 0))


@triton.jit
def _is_wanted(key, FIRST: tl.constexpr, SUMMED: tl.constexpr):
    """Whether the gradient of the table that holds row `key` is wanted."""
    wanted = key < 0  # False, or replaced below
    for i in tl.static_range(len(FIRST)):
        wanted = tl.where(key >= FIRST[i], SUMMED[i] == 1, wanted)
    return wanted & (key >= 0)


@triton.jit
def _store_row(outs, acc, key, E, cols, mask, FIRST: tl.constexpr, SUMMED: tl.constexpr):
    """Row `key` of the tables numbered through."""
    to = outs[0]
    row = key.to(tl.int64)
    for i in tl.static_range(1, len(FIRST)):
        to = tl.where(key >= FIRST[i], outs[i], to)
        row = tl.where(key >= FIRST[i], key.to(tl.int64) - FIRST[i], row)
    tl.store(to + row * E + cols, acc.to(outs[0].dtype.element_ty), mask=mask & _is_wanted(key, FIRST, SUMMED))


@triton.jit(do_not_specialize=["T", "N", "sizes"])
def modality_embed_bwd_tables_kernel(
    grad_ptr,
    streams,
    sizes,
    modality_weight_ptr,
    token_weight_ptr,
    tables,
    norm_weight_ptr,
    modality_ids_ptr,
    source_rows_ptr,
    positions_ptr,
    rng_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    keys_ptr,
    order_ptr,
    outs,
    head_ptr,
    tail_ptr,
    T,
    N,
    E,
    threshold,
    keep_scale,
    M: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    STREAMS: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS_OF: tl.constexpr,
    NORM: tl.constexpr,
    FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Row k of outs = the sum of dx over the tokens of key k, R of them read at a time.  keys [N] sorted, -1: none;
    order int64 [N]: where each key was before the sort, a token modulo T.  SUMMED: which tables' gradients are wanted;
    the others' keys are there all the same, so that sums do not depend on what else is wanted.

    head [chunks, E]  the part of a run that began in an earlier chunk;  tail [chunks, E]  of one that goes on later
    """
    chunk = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * COLUMNS
    cols = first_col + tl.arange(0, COLUMNS)
    inside = cols < E
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, N)
    current = tl.load(keys_ptr + start).to(tl.int32)
    is_head = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == current
    acc = tl.zeros((COLUMNS,), tl.float32)
    weight = acc + 1.0
    if norm_weight_ptr is not None:
        weight = tl.load(norm_weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    for i in range(start, stop, R):
        entries = i + tl.arange(0, R)
        keys = tl.load(keys_ptr + entries, mask=entries < stop, other=-1).to(tl.int32)
        wanted = _is_wanted(keys, FIRST, SUMMED)
        last = tl.max(keys, 0)
        if (tl.min(keys, 0) != current) | (last != current) | _is_wanted(current, FIRST, SUMMED):
            t = tl.load(order_ptr + entries, mask=wanted, other=0).to(tl.int32) % T
            t = tl.where(wanted, t, T).to(tl.int64)  # T: reads as zeros.  int64: t * E passes 2**31
            _, _, _, grad, normed, rstd = _graded(
                grad_ptr,
                streams,
                sizes,
                modality_weight_ptr,
                token_weight_ptr,
                tables,
                norm_weight_ptr,
                modality_ids_ptr,
                source_rows_ptr,
                positions_ptr,
                rng_ptr,
                mean_ptr,
                rstd_ptr,
                t,
                first_col,
                T,
                E,
                threshold,
                keep_scale,
                M,
                A,
                V,
                STREAMS,
                TABLES,
                ROWS_OF,
                NORM,
                R,
                COLUMNS,
            )
            dx = grad
            if NORM > 0:
                mean_g = tl.load(means_ptr + t, mask=wanted, other=0.0)[:, None]
                mean_gx = tl.load(means_ptr + T + t, mask=wanted, other=0.0)[:, None]
                dx = (grad * weight[None, :] - mean_g - normed * mean_gx) * rstd[:, None]
            if (tl.min(keys, 0) == current) & (last == current):
                acc += tl.sum(dx, 0)
            else:
                for r in range(0, tl.minimum(R, stop - i)):
                    here = tl.arange(0, R) == r
                    key = tl.max(tl.where(here, keys, -1), 0)
                    if key != current:
                        if is_head:
                            tl.store(head_ptr + chunk * E + cols, acc, mask=inside)
                        else:
                            _store_row(outs, acc, current, E, cols, inside, FIRST, SUMMED)
                        acc = tl.zeros((COLUMNS,), tl.float32)
                        current = key
                        is_head = start < 0  # False
                    acc += tl.sum(tl.where(here[:, None], dx, 0.0), 0)
    goes_on = tl.load(keys_ptr + stop, mask=stop < N, other=-1) == current
    if current >= 0:
        if is_head:
            tl.store(head_ptr + chunk * E + cols, acc, mask=inside)
        elif goes_on:
            tl.store(tail_ptr + chunk * E + cols, acc, mask=inside)
        else:
            _store_row(outs, acc, current, E, cols, inside, FIRST, SUMMED)


@triton.jit(do_not_specialize=["N"])
def modality_embed_bwd_spans_kernel(
    keys_ptr,
    outs,
    head_ptr,
    tail_ptr,
    N,
    E,
    FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Finishes the run that begins in this chunk and ends in a later one, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < E
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, N)
    key = tl.load(keys_ptr + stop - 1)
    goes_on = tl.load(keys_ptr + stop, mask=stop < N, other=-1) == key
    began_before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    if goes_on & (began_before == 0) & (key >= 0):
        acc = tl.load(tail_ptr + chunk * E + cols, mask=inside, other=0.0)
        later = chunk + 1
        while tl.load(keys_ptr + later * CHUNK, mask=later * CHUNK < N, other=-1) == key:
            acc += tl.load(head_ptr + later * E + cols, mask=inside, other=0.0)
            later += 1
        _store_row(outs, acc, key, E, cols, inside, FIRST, SUMMED)
