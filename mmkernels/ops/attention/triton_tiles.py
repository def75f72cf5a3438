"""What the attention kernels do with one tile: load, store, mask, bias and drop.   D head width, Mk key modalities.

Helpers of the Triton kernels; each is traced into its caller, so that an absent feature leaves no instruction.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


# Always made with keywords: Triton's cache does not see these classes, so that a changed order of positional fields
# would run what was compiled before.
class Source(NamedTuple):
    """One head of a tensor [T, heads, D], from which a loop loads its blocks."""

    ptr: tl.tensor  # of that head
    desc: tl.tensor_descriptor | None  # of all heads
    stride: tl.tensor  # from token to token
    head: tl.tensor


class RowBounds(NamedTuple):
    """Which columns each row of a tile meets: those from lo to before hi that share a bit with it.  int32 [rows]."""

    lo: tl.tensor
    hi: tl.tensor
    bits: tl.tensor  # lo again where no modality is hidden


class Dropout(NamedTuple):
    """What dropout_keep_tile draws from; None in its place where there is no dropout."""

    rng_ptr: tl.tensor  # int64 [2]: seed and offset
    threshold: tl.tensor  # philox.threshold(dropout_p) as int32 of the same bits
    keep_scale: tl.tensor  # 1 / (1 - dropout_p)


@triton.jit
def this_tile(tiles_ptr, heads):
    """tile, head, row_start, row_end, first_span, last_span of this program, of tiles x heads."""
    # Heads vary fastest, so that the heaviest tiles (first in the list) start first on every head.
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row_start = tl.load(tiles_ptr + 4 * tile)
    row_end = tl.load(tiles_ptr + 4 * tile + 1)
    first_span = tl.load(tiles_ptr + 4 * tile + 2)
    last_span = tl.load(tiles_ptr + 4 * tile + 3)
    return tile, head, row_start, row_end, first_span, last_span


@triton.jit
def load_span(spans_ptr, span):
    """col_start, full_end, col_end: whole blocks that every row sees up to full_end, masked ones from there on.

    A span is all full or all partial: one of the two loops over it runs, and neither branches inside.
    """
    col_start = tl.load(spans_ptr + 3 * span)
    col_end = tl.load(spans_ptr + 3 * span + 1)
    masked = tl.load(spans_ptr + 3 * span + 2)
    full_end = tl.where(masked != 0, col_start, col_end)
    return col_start, full_end, col_end


@triton.jit
def load_rows(ptr, stride, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """[BLOCK, BLOCK_D] from ptr on; rows at or past count (if CHECK) and columns past D read 0."""
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + rows * stride + dims
    if CHECK:
        if D == BLOCK_D:
            block = tl.load(ptrs, mask=rows < count, other=0.0)
        else:
            block = tl.load(ptrs, mask=(rows < count) & (dims < D), other=0.0)
    else:
        if D == BLOCK_D:
            block = tl.load(ptrs)
        else:
            block = tl.load(ptrs, mask=dims < D, other=0.0)
    return block


@triton.jit
def load_rows_tma(desc, token, head, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of one head through a [T, heads, D] descriptor, which gives 0 past D: never the next head.

    For whole blocks only: rows of the next sample would be read as they are.
    """
    return desc.load([token, head, 0]).reshape(BLOCK, BLOCK_D)


@triton.jit
def load_block(source, token, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK, BLOCK_D] of a Source from token on: by its descriptor, where there is one.

    MASKED: rows at or past count read 0.  Without it they are whole blocks that every row of the tile sees: nothing of
    another sample, so that a descriptor may load them as they are.
    """
    if source.desc is not None and not MASKED:
        block = load_rows_tma(source.desc, token, source.head, BLOCK, BLOCK_D)
    else:
        base = tl.cast(token, tl.int64)  # in the interpreter token is a Python int
        block = load_rows(source.ptr + base * source.stride, source.stride, count, D, BLOCK, BLOCK_D, MASKED)
    return block


@triton.jit
def as_bits(x):
    """x as integers of its width: how a loop carries the left factor of a product of the next step.

    Triton 3.6 puts a factor that a loop carries as floats in shared memory, and then waits for its product at once; one
    that is cast in the loop stays in registers, and its product may be in flight.
    """
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def zero_bits(ROWS: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr):
    return as_bits(tl.zeros([ROWS, COLS], DTYPE))


@triton.jit
def store_rows(ptr, stride, count, block, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows: rows at or past count and columns past D are not written."""
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + rows * stride + dims, block.to(ptr.dtype.element_ty), mask=(rows < count) & (dims < D))


@triton.jit
def row_bounds(table_ptr, rows, in_tile, T, HAS_VISIBLE: tl.constexpr):
    """Bounds from a table int32 [4, T] of the plan; a row past the tile sees nothing."""
    lo = tl.load(table_ptr + rows, mask=in_tile, other=0)
    hi = tl.load(table_ptr + T + rows, mask=in_tile, other=0)
    bits = lo
    if HAS_VISIBLE:
        bits = tl.load(table_ptr + 2 * tl.cast(T, tl.int64) + rows, mask=in_tile, other=0)
    return RowBounds(lo=lo, hi=hi, bits=bits)


@triton.jit
def modalities_of(table_ptr, tokens, inside, T):
    """int32 [tokens] from a table int32 [4, T] of the plan; 0 outside."""
    return tl.load(table_ptr + 3 * tl.cast(T, tl.int64) + tokens, mask=inside, other=0)


@triton.jit
def seen_pairs(bounds, cols, col_end, col_bits_ptr, HAS_VISIBLE: tl.constexpr):
    """bool [rows, cols]: which row of the tile meets which column."""
    seen = (cols[None, :] >= bounds.lo[:, None]) & (cols[None, :] < bounds.hi[:, None])
    if HAS_VISIBLE:
        col_bits = tl.load(col_bits_ptr + cols, mask=cols < col_end, other=0)
        seen = seen & ((bounds.bits[:, None] & col_bits[None, :]) != 0)
    return seen


@triton.jit
def no_sums(MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """A tuple: fp32 zeros [BLOCK] per modality."""
    sums = ()
    for _ in tl.static_range(MODALITIES):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005  Triton compiles no (*sums, ...)
    return sums


@triton.jit
def row_biases(bias_ptr, q_modality, scale, MODALITIES: tl.constexpr):
    """A tuple: per key modality the pair bias of each query times scale, fp32 [rows].  bias_ptr: one head's."""
    biases = ()
    for m in tl.static_range(MODALITIES):
        bias = tl.load(bias_ptr + q_modality * MODALITIES + m) * scale
        biases = biases + (bias,)  # noqa: RUF005  Triton compiles no (*biases, bias)
    return biases


@triton.jit
def bias_of(biases, k_modality):
    """fp32 [rows, cols] from row_biases: a select per modality, which is cheaper than a gather per pair."""
    bias = biases[0][:, None]
    for m in tl.static_range(1, len(biases)):
        bias = tl.where((k_modality == m)[None, :], biases[m][:, None], bias)
    return bias


@triton.jit
def dropout_keep_tile(dropout, head, queries, first_key, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr):
    """bool [queries, BLOCK_K]: which probabilities of keys first_key, first_key + 1, ... survive dropout.

    ALIGNED: first_key is a multiple of 4: token tiles.  Half the work: four neighbouring keys share one Philox call.
    """
    seed = tl.load(dropout.rng_ptr)
    offset = tl.load(dropout.rng_ptr + 1).to(tl.uint32)
    least = tl.cast(dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    group = (tl.cast(first_key, tl.int32) // 4 + tl.arange(0, BLOCK_K // 4))[None, :].to(tl.uint32)
    query = queries[:, None].to(tl.uint32)
    at_head = tl.cast(head, tl.int32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, query, at_head, offset)
    k0, k1, k2, k3 = w0 >= least, w1 >= least, w2 >= least, w3 >= least
    if not ALIGNED:
        # Column j is key 4 group + shift + j: its word is one of eight, of this group and the next.
        shift = tl.cast(first_key, tl.int32) % 4
        w0, w1, w2, w3 = tl.philox(seed, group + 1, query, at_head, offset)
        k4, k5, k6 = w0 >= least, w1 >= least, w2 >= least
        k0, k1, k2, k3 = (
            _one_of_four(shift, k0, k1, k2, k3),
            _one_of_four(shift, k1, k2, k3, k4),
            _one_of_four(shift, k2, k3, k4, k5),
            _one_of_four(shift, k3, k4, k5, k6),
        )
    # join makes the last axis: [..., 0] of the outer join is (k0, k2), so the words come out in the order of the keys.
    pairs = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    return pairs.reshape(queries.shape[0], BLOCK_K)


@triton.jit
def _one_of_four(index, a, b, c, d):
    return tl.where(index < 2, tl.where(index == 0, a, b), tl.where(index == 2, c, d))
