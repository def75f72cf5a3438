"""Launch sizes of the Triton modality_embed kernels, per width.

Those of E 768 in bf16 are the fastest of a sweep on an H100 (2026-11-27; docs/modality_embed.md), about 24 for each
kernel; other widths follow by cross-compiling for sm_90: 128-bit accesses, no spill, and registers that leave enough
warps per SM to cover memory latency.
"""

from __future__ import annotations

from dataclasses import dataclass

# Constants, not functions of the GPU's SM count: partial sums must not depend on it.
CHUNK = 32  # sorted tokens per program of the table sums
TABLES = (1, 256, 1)  # of these, whose rows are read at a time; columns of a program, at most; warps
LANES_COLUMNS = 256  # of a warp: eight a lane, 128 bits of a 16-bit type
LEAST_ROWS = 16  # of a walk of the backward
WALK_SUMS = (256, 16, 8)  # partial sums and columns of a tile of their sum, warps


@dataclass(frozen=True)
class Config:
    """Rows of a tile, a power of two; warps that share it; columns; the most walks that the rows are parted into."""

    rows: int
    warps: int
    columns: int
    walks: int

    @property
    def sum_rows(self) -> int:
        """Rows of a tile that lie in different lanes or warps: partial sums are kept as so many."""
        return min(self.rows, max(1, self.warps * LANES_COLUMNS // self.columns))


# Without a norm: rows of a tile of LANES_COLUMNS, warps, walks.  Four rows are four 128-bit loads a lane under
# way.  The forward's walks are short, so that an SM which is done early takes another; each of the backward's leaves M
# partial rows of fp32, and has as many programs as there are column blocks (three for E = 768).
PLAIN_FORWARD = (4, 1, 16384)
PLAIN_BACKWARD = (4, 1, 512)
NORMED_FORWARD_WALKS = 1 << 20
NORMED_BACKWARD_WALKS = 1024

# With a norm: widest row of the table's line -> rows, warps; columns are the width's next power of two.  sm_90, Triton
# 3.6.0, 2026-11: `python -m mmkernels.inspect --arch sm_90 --op modality_embed`.  Forward: at most 32 values a thread.
# Backward: eight, the least that keeps bf16 accesses 128 bits wide, because it holds many such vectors at once.
NORMED_FORWARD = {
    64: (16, 1),
    128: (8, 1),
    256: (4, 1),
    512: (2, 1),
    1024: (1, 1),
    2048: (1, 2),
    4096: (1, 4),
    8192: (1, 8),
}
NORMED_BACKWARD = {
    64: (2, 1),
    128: (2, 1),
    256: (1, 1),
    512: (1, 2),
    1024: (1, 4),
    2048: (1, 8),
    4096: (1, 16),
    8192: (1, 16),
}


def block(width: int) -> int:
    """Columns of a tile: the power of two that holds a row, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def forward(width: int, normed: bool) -> Config:
    if not normed:
        return _plain(width, *PLAIN_FORWARD)
    rows, warps = _of(NORMED_FORWARD, width)
    return Config(rows, warps, block(width), NORMED_FORWARD_WALKS)


def backward(width: int, normed: bool) -> Config:
    if not normed:
        return _plain(width, *PLAIN_BACKWARD)
    rows, warps = _of(NORMED_BACKWARD, width)
    return Config(rows, warps, block(width), NORMED_BACKWARD_WALKS)


def _plain(width: int, rows: int, warps: int, walks: int) -> Config:
    """Narrow rows: as many more of them to a tile."""
    columns = min(LANES_COLUMNS, block(width))
    return Config(rows * LANES_COLUMNS // columns, warps, columns, walks)


def tiles_per_walk(tokens: int, config: Config) -> int:
    """Of the backward: a walk leaves partial sums, so not too few."""
    return max(-(-LEAST_ROWS // config.rows), -(-tokens // (config.walks * config.rows)))


def tables(width: int) -> tuple[int, int, int]:
    """Of the table sums: rows and columns of a tile, and its warps."""
    rows, columns, warps = TABLES
    columns = min(columns, block(width))
    if columns < LANES_COLUMNS // 2:
        rows = max(rows, 2)  # else a lane has less than 128 bits of a row
    return min(rows, CHUNK), columns, warps


def _of(table: dict[int, tuple[int, int]], width: int) -> tuple[int, int]:
    for widest, sizes in table.items():
        if width <= widest:
            return sizes
    raise NotImplementedError(f"modality_embed: the Triton kernels take rows of at most {max(table)}, not {width}")
