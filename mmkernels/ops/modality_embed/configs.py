"""Launch sizes of the Triton modality_embed kernels, per width.

Chosen by cross-compiling for sm_90 (128-bit accesses, no spill, registers that leave enough warps per SM to cover
memory latency), not by timing: no GPU has run them yet (see docs/evidence.md).
"""

from __future__ import annotations

from dataclasses import dataclass

# Constants, not functions of the GPU's SM count: partial sums must not depend on it.
FORWARD_PROGRAMS = 2048
BACKWARD_PROGRAMS = 1024  # enough for every GPU to have several per SM
CHUNK = 32  # sorted tokens per program of the table sums
TABLE_COLUMNS = 512  # columns per program there, at most
WARP_COLUMNS = 128  # of a warp there: four a lane, for 128-bit accesses to fp32; of a narrower row some lanes idle


@dataclass(frozen=True)
class Config:
    """Rows of a tile, a power of two, and warps that share it."""

    rows: int
    warps: int


# Widest row of the table's line -> Config; the block is the width's next power of two.  sm_90, Triton 3.6.0, 2026-11:
# `python -m mmkernels.inspect --arch sm_90 --op modality_embed`.  Forward: at most 32 values per thread.  Backward:
# eight, the least that keeps bf16 accesses 128 bits wide, because it holds six such vectors at once.
FORWARD = {
    64: Config(rows=16, warps=1),
    128: Config(rows=8, warps=1),
    256: Config(rows=4, warps=1),
    512: Config(rows=2, warps=1),
    1024: Config(rows=1, warps=1),
    2048: Config(rows=1, warps=2),
    4096: Config(rows=1, warps=4),
    8192: Config(rows=1, warps=8),
}
BACKWARD = {
    64: Config(rows=2, warps=1),
    128: Config(rows=2, warps=1),
    256: Config(rows=1, warps=1),
    512: Config(rows=1, warps=2),
    1024: Config(rows=1, warps=4),
    2048: Config(rows=1, warps=8),
    4096: Config(rows=1, warps=16),
    8192: Config(rows=1, warps=16),
}


def block(width: int) -> int:
    """Columns of a tile: the power of two that holds a row, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def forward(width: int) -> Config:
    return _of(FORWARD, width)


def backward(width: int) -> Config:
    return _of(BACKWARD, width)


def tiles_per_program(tokens: int, rows: int) -> int:
    """Of the backward: a partial sum each, so not too few."""
    return min(128, max(8, -(-tokens // (BACKWARD_PROGRAMS * rows))))


def table_columns(width: int) -> tuple[int, int]:
    """Columns of a program of the table sums, and its warps."""
    columns = max(WARP_COLUMNS, min(TABLE_COLUMNS, block(width)))
    return columns, columns // WARP_COLUMNS


def _of(table: dict[int, Config], width: int) -> Config:
    for widest, config in table.items():
        if width <= widest:
            return config
    raise NotImplementedError(f"modality_embed: the Triton kernels take rows of at most {max(table)}, not {width}")
