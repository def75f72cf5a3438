"""Launch sizes of the Triton modality_embed kernels, per width.

Those of E 768 in bf16 are among the fastest of three sweeps on an H100 (2026-11-27; docs/modality_embed.md), and the
fastest that spill nothing; other widths follow by cross-compiling for sm_90: 128-bit accesses and no spill.
"""

from __future__ import annotations

from dataclasses import dataclass

# Constants, not functions of the GPU's SM count: partial sums must not depend on it.
CHUNK = 128  # sorted tokens per program of the table sums
TABLES = (8, 1)  # of these, whose rows are asked for at a time; warps
SPANS = 8  # chunks of a run whose sums are asked for at a time
WALK_SUMS = (512, 16, 8)  # partial sums and columns of a tile of their sum, warps
LANES_COLUMNS = 256  # of a warp: eight a lane, 128 bits of a 16-bit type
LEAST_ROWS = 16  # of a walk of the backward


@dataclass(frozen=True)
class Config:
    """Rows asked for at a time, warps that share each, columns, the most walks that the rows are parted into, and the
    most registers of a thread (None: as the compiler likes)."""

    rows: int
    warps: int
    columns: int
    walks: int
    registers: int | None = None


EVERY = 1 << 30  # walks: each program has one tile
# Without a norm: rows at a time, warps, walks.  Several rows are as many 128-bit loads a lane under way.  Each walk of
# the backward leaves M partial rows of fp32, and is as many programs as there are column blocks (three for E = 768).
PLAIN_FORWARD = (4, 1, EVERY)
PLAIN_BACKWARD = (6, 1, 512)
NORMED_FORWARD_WALKS = EVERY
NORMED_BACKWARD_WALKS = 1024  # eight of 211 registers fit an SM of an H100: what is past 1,056 waits for a second turn

# With a norm: bytes of the widest row of the table's line -> rows at a time, warps.  sm_90, Triton 3.6.0, 2026-11:
# `python -m mmkernels.inspect --arch sm_90 --op modality_embed`.  A row in one warp needs no barriers; the backward
# keeps three sums and as many rows of it in registers.
NORMED_FORWARD = {512: (4, 1), 1024: (2, 1), 2048: (1, 1), 4096: (1, 2), 8192: (1, 4), 32768: (1, 8)}
NORMED_BACKWARD = {512: (4, 1), 1024: (2, 1), 1536: (1, 1), 2048: (1, 2), 4096: (1, 4), 8192: (1, 8), 32768: (1, 16)}
MAX_WIDTH = 8192


def block(width: int) -> int:
    """Columns of whole rows: the power of two that holds one, and what makes a lane's access 128 bits wide."""
    return max(LANES_COLUMNS, 1 << (width - 1).bit_length())


def forward(width: int, itemsize: int, normed: bool) -> Config:
    """itemsize: bytes of an element of the result."""
    if not normed:
        return _plain(*PLAIN_FORWARD)
    return Config(*_of(NORMED_FORWARD, width, itemsize), block(width), NORMED_FORWARD_WALKS)


def backward(width: int, itemsize: int, normed: bool) -> Config:
    if not normed:
        return _plain(*PLAIN_BACKWARD)
    rows, warps = _of(NORMED_BACKWARD, width, itemsize)
    # Left alone, ptxas spills where several warps share a row, for more programs on an SM.
    registers = min(255, 65536 // (32 * warps)) if warps > 1 else None
    return Config(rows, warps, block(width), NORMED_BACKWARD_WALKS, registers)


def _plain(rows: int, warps: int, walks: int = 0) -> Config:
    return Config(rows, warps, warps * LANES_COLUMNS, walks)


def tiles_per_walk(tokens: int, config: Config) -> int:
    """Of the backward: not too few, since each walk leaves partial sums."""
    return max(-(-LEAST_ROWS // config.rows), -(-tokens // (config.walks * config.rows)))


def tables() -> Config:
    """Of the table sums, which have no walks."""
    return _plain(*TABLES)


def _of(table: dict[int, tuple[int, int]], width: int, itemsize: int) -> tuple[int, int]:
    if width > MAX_WIDTH:
        raise NotImplementedError(f"modality_embed: the Triton kernels take rows of at most {MAX_WIDTH}, not {width}")
    return next(sizes for widest, sizes in table.items() if width * itemsize <= widest)
