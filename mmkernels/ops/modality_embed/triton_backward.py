"""Modality embedding backward, Triton, sm_80+: no atomics, so every run gives the same bits.

T tokens, E width, M modalities, A position axes, R rows that are asked for at a time.
1. Rows: dx, the gradient of each row before the norm.  From it, by plain stores, stream gradients and, for the tables,
   dx itself and the key (table row, all tables numbered through) of each token and slot; partial sums for the norm and
   the modalities per walk, the consecutive rows of one program.
2. Tables: (key, token) sorted by key, in chunks of CHUNK: a key's run inside one chunk is summed into its table row at
   once; a run over several chunks leaves one partial sum per chunk.
3. Spans: those partial sums, added in order.
4. Walks: the partial sums of 1, added in an order that T and E alone decide, and rounded to the parameters' type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.modality_embed.triton_forward import add_parts, dropped, load_parts, load_row, locate_tile


@triton.jit
def _store_to_stream(
    d_streams, place, dx, cols, E: tl.constexpr, M: tl.constexpr, STREAMS: tl.constexpr, WANTED: tl.constexpr
):
    """The row's gradient to its stream, if it has one and its gradient is wanted."""
    modality, row, _, _ = place
    for first in tl.static_range(M):
        if STREAMS[first] == first:  # one store for all streams of this dtype
            to = tl.where(modality == first, d_streams[first], d_streams[first])
            here = (modality == first) & (WANTED[first] == 1)
            for m in tl.static_range(M):
                if m > first and STREAMS[m] == first:
                    to = tl.where(modality == m, d_streams[m], to)
                    here = here | ((modality == m) & (WANTED[m] == 1))
            value = dx.to(d_streams[first].dtype.element_ty)
            tl.store(to + row * E + cols, value, mask=(cols < E) & here & (row >= 0))


@triton.jit
def _store_keys(keys_ptr, place, t, T, M: tl.constexpr, TABLES: tl.constexpr, FIRST: tl.constexpr, here):
    """The keys of row t, [slots + 1, T]: of the table row that it reads in each slot, and in the token table."""
    modality, _, token, positions = place
    SLOTS: tl.constexpr = len(TABLES) // M
    for q in tl.static_range(SLOTS):
        key = tl.cast(-1, tl.int64)
        for m in tl.static_range(M):
            if TABLES[q * M + m] >= 0:
                key = tl.where((modality == m) & (positions[q] >= 0), FIRST[TABLES[q * M + m]] + positions[q], key)
        tl.store(keys_ptr + tl.cast(q, tl.int64) * T + t, key.to(keys_ptr.dtype.element_ty), mask=here & (t < T))
    key = tl.where(token >= 0, FIRST[len(FIRST) - 1] + token, -1)
    tl.store(keys_ptr + tl.cast(SLOTS, tl.int64) * T + t, key.to(keys_ptr.dtype.element_ty), mask=here & (t < T))


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
    dx_ptr,
    partial_ptr,
    keys_ptr,
    T,
    TILES,
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
    WANTED: tl.constexpr,
    NORM_SUMS: tl.constexpr,
    MODALITY_SUMS: tl.constexpr,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program takes COLUMNS, all with a norm, of TILES tiles of R rows.  WANTED: which stream gradients to write.

    partial_ptr  [walks, N, E], None where N is 0: sums over a walk's rows, of the norm's weight and bias if NORM_SUMS,
                 then of each modality if MODALITY_SUMS
    dx_ptr [T, E], keys_ptr [slots + 1, T]: None where not wanted
    FIRST        the first key of each position table, then of the token table
    """
    column_blocks = tl.cdiv(E, COLUMNS)
    first_col = tl.program_id(0) % column_blocks * COLUMNS
    cols = first_col + tl.arange(0, COLUMNS)
    inside = cols < E
    walk = (tl.program_id(0) // column_blocks).to(tl.int64)
    N: tl.constexpr = 2 * NORM_SUMS + M * MODALITY_SUMS
    begin = walk * TILES * R
    d_weight = tl.zeros((COLUMNS,), tl.float32)
    d_bias = tl.zeros((COLUMNS,), tl.float32)
    # Of one modality at a time, since they come in runs: the sum goes to memory where the next one is another's.
    d_modality = tl.zeros((COLUMNS,), tl.float32)
    modality_sums_ptr = partial_ptr
    current = tl.cast(-1, tl.int32)
    if MODALITY_SUMS:
        modality_sums_ptr += (walk * N + 2 * NORM_SUMS) * E + cols
        for m in range(M):
            tl.store(modality_sums_ptr + m * E, d_modality, mask=inside)
    for i in tl.range(0, tl.minimum(TILES, tl.cdiv(T - begin, R)), num_stages=1):
        start = begin + i * R
        places = locate_tile(
            streams, sizes, modality_ids_ptr, source_rows_ptr, positions_ptr, start, T,
            M, A, V, STREAMS, TABLES, ROWS_OF, R,
        )  # fmt: skip
        rows = ()
        grads = ()
        for r in tl.static_range(R):
            grads = grads + (load_row(grad_ptr, tl.where(start + r < T, start + r, -1), cols, E),)  # noqa: RUF005
            if NORM > 0:
                parts = load_parts(
                    streams, modality_weight_ptr, token_weight_ptr, tables, places[r], cols,
                    E, M, STREAMS, TOKENS, TABLES,
                )  # fmt: skip
                rows = rows + (parts,)  # noqa: RUF005
        for r in tl.static_range(R):
            t = start + r
            valid = t < T
            dx = grads[r].to(tl.float32)
            if rng_ptr is not None:
                dx = dropped(dx, rng_ptr, t, first_col, threshold, keep_scale, COLUMNS)
            if NORM > 0:
                normed = add_parts(rows[r])
                rstd = tl.load(rstd_ptr + t, mask=valid, other=0.0)
                if NORM == 1:
                    normed -= tl.load(mean_ptr + t, mask=valid, other=0.0)
                normed = tl.where(inside, normed * rstd, 0.0)
                if NORM_SUMS:
                    d_weight += dx * normed
                    d_bias += dx
                if norm_weight_ptr is not None:
                    dx *= tl.load(norm_weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
                mean_gx = tl.sum(dx * normed, 0) / E
                if NORM == 1:
                    dx -= tl.sum(dx, 0) / E
                dx = (dx - normed * mean_gx) * rstd
            _store_to_stream(d_streams, places[r], dx, cols, E, M, STREAMS, WANTED)
            if dx_ptr is not None:
                tl.store(dx_ptr + t * E + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside & valid)
            if keys_ptr is not None:
                _store_keys(keys_ptr, places[r], t, T, M, TABLES, FIRST, first_col == 0)
            if MODALITY_SUMS:
                modality = places[r][0]
                if (modality != current) & valid:
                    if current >= 0:
                        _add_to(modality_sums_ptr + current * E, d_modality, inside)
                    d_modality = tl.zeros((COLUMNS,), tl.float32)
                    current = modality
                d_modality += dx
    if NORM_SUMS:
        tl.store(partial_ptr + walk * N * E + cols, d_weight, mask=inside)
        tl.store(partial_ptr + (walk * N + 1) * E + cols, d_bias, mask=inside)
    if MODALITY_SUMS:  # noqa: SIM102  known to the compiler, and there may be no place for the sums
        if current >= 0:
            _add_to(modality_sums_ptr + current * E, d_modality, inside)


@triton.jit
def _add_to(to, value, mask):
    tl.debug_barrier()  # what another lane stored there, since loads and stores part the columns differently
    tl.store(to, tl.load(to, mask=mask, other=0.0) + value, mask=mask)


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


@triton.jit(do_not_specialize=["T", "N"])
def modality_embed_bwd_tables_kernel(
    dx_ptr,
    keys_ptr,
    order_ptr,
    outs,
    head_ptr,
    tail_ptr,
    T,
    N,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Row k of outs = the sum of dx over the tokens of key k, R of them asked for at a time.  keys [N] sorted, -1:
    none; order int64 [N]: where each key was before the sort, in [SLOTS, T].  SUMMED: which tables' gradients are
    wanted; the others' keys are there all the same, so that sums do not depend on what else is wanted.

    head [chunks, E]  the part of a run that began in an earlier chunk;  tail [chunks, E]  of one that goes on later
    """
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < E
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, N)
    current = tl.load(keys_ptr + start).to(tl.int32)
    is_head = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == current
    acc = tl.zeros((COLUMNS,), tl.float32)
    if tl.load(keys_ptr + stop - 1) < 0:
        stop = start  # all are -1
    for i in range(start, stop, R):
        keys = ()
        rows = ()
        for r in tl.static_range(R):
            key = tl.load(keys_ptr + i + r, mask=i + r < stop, other=-1).to(tl.int32)
            wanted = _is_wanted(key, FIRST, SUMMED)
            t = tl.load(order_ptr + i + r, mask=wanted, other=0)
            for _ in tl.static_range(1, SLOTS):  # modulo T
                t = tl.where(t >= T, t - T, t)
            keys = keys + (key,)  # noqa: RUF005  Triton compiles no (*keys, ...)
            rows = rows + (load_row(dx_ptr, tl.where(wanted, t, -1), cols, E),)  # noqa: RUF005
        for r in tl.static_range(R):
            if (keys[r] != current) & (i + r < stop):
                if is_head:
                    tl.store(head_ptr + chunk * E + cols, acc, mask=inside)
                else:
                    _store_row(outs, acc, current, E, cols, inside, FIRST, SUMMED)
                acc = tl.zeros((COLUMNS,), tl.float32)
                current = keys[r]
                is_head = start < 0  # False
            acc += rows[r].to(tl.float32)
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
    E: tl.constexpr,
    FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Finishes the run that begins in this chunk and ends in a later one, if there is one: R chunks at a time."""
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < E
    start = tl.program_id(0) * CHUNK
    stop = tl.minimum(start + CHUNK, N)
    key = tl.load(keys_ptr + stop - 1)
    goes_on = (tl.load(keys_ptr + stop, mask=stop < N, other=-1) == key) & (key >= 0)
    began_before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key
    if goes_on & (began_before == 0):
        acc = tl.load(tail_ptr + chunk * E + cols, mask=inside, other=0.0)
        later = chunk + 1
        while goes_on:
            rows = ()
            for r in tl.static_range(R):
                first = (later + r) * CHUNK
                goes_on = goes_on & (tl.load(keys_ptr + first, mask=first < N, other=-1) == key)
                rows = rows + (load_row(head_ptr, tl.where(goes_on, later + r, -1), cols, E),)  # noqa: RUF005
            for r in tl.static_range(R):
                acc += rows[r]
            later += R
        _store_row(outs, acc, key, E, cols, inside, FIRST, SUMMED)
