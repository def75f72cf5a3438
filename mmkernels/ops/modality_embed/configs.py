"""Launch sizes of the Triton modality_embed kernels, per width.

Those of E 768 in bf16 are the fastest of a sweep on an H100 (2026-11-27; docs/modality_embed.md), about 24 for each
kernel; other widths follow by cross-compiling for sm_90: 128-bit accesses, no spill, and registers that leave enough
warps per SM to cover memory latency.
"""

from __future__ import annotations

from dataclasses import dataclass

# Constants, not functions of the GPU's SM count: partial sums must not depend on it.
CHUNK = 32  # sorted tokens per program of the table sums
TABLES = (4, 1)  # of these, whose rows are asked for at a time; warps
WALK_SUMS = (256, 16, 8)  # partial sums and columns of a tile of their sum, warps
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


# Without a norm: rows at a time, warps, walks.  Four rows are four 128-bit loads a lane under way.  The forward's walks
# are short, so that an SM which is done early takes another; each of the backward's leaves M partial rows of fp32, and
# has as many programs as there are column blocks (three for E = 768).
PLAIN_FORWARD = (4, 1, 16384)
PLAIN_BACKWARD = (4, 1, 512)
NORMED_FORWARD_WALKS = 1 << 20
NORMED_BACKWARD_WALKS = 1536
NORMED_BACKWARD_REGISTERS = None

# With a norm: widest row of the table's line -> rows at a time, warps.  sm_90, Triton 3.6.0, 2026-11: `python -m
# mmkernels.inspect --arch sm_90 --op modality_embed`.  At most 32 values a thread: a row in one warp needs no barriers.
NORMED_FORWARD = {256: (4, 1), 512: (2, 1), 1024: (1, 1), 2048: (1, 2), 4096: (1, 4), 8192: (1, 8)}
NORMED_BACKWARD = {256: (4, 1), 512: (2, 1), 1024: (1, 1), 2048: (1, 2), 4096: (1, 4), 8192: (1, 8)}


def block(width: int) -> int:
    """Columns of whole rows: the power of two that holds one, and what makes a lane's access 128 bits wide."""
    return max(LANES_COLUMNS, 1 << (width - 1).bit_length())


def forward(width: int, normed: bool) -> Config:
    if not normed:
        return _plain(*PLAIN_FORWARD)
    rows, warps = _of(NORMED_FORWARD, width)
    return Config(rows, warps, block(width), NORMED_FORWARD_WALKS)


def backward(width: int, normed: bool) -> Config:
    if not normed:
        return _plain(*PLAIN_BACKWARD)
    rows, warps = _of(NORMED_BACKWARD, width)
    return Config(rows, warps, block(width), NORMED_BACKWARD_WALKS, NORMED_BACKWARD_REGISTERS)


def _plain(rows: int, warps: int, walks: int = 0) -> Config:
    return Config(rows, warps, warps * LANES_COLUMNS, walks)


def tiles_per_walk(tokens: int, config: Config) -> int:
    """Of the backward: a walk leaves partial sums, so not too few."""
    return max(-(-LEAST_ROWS // config.rows), -(-tokens // (config.walks * config.rows)))


def tables() -> Config:
    """Of the table sums, which have no walks."""
    return _plain(*TABLES)


def _of(table: dict[int, tuple[int, int]], width: int) -> tuple[int, int]:
    for widest, sizes in table.items():
        if width <= widest:
            return sizes
    raise NotImplementedError(f"modality_embed: the Triton kernels take rows of at most {max(table)}, not {width}")
