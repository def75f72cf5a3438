"""Launch sizes of the Triton modality_embed kernels, per element size and width.

Chosen by cross-compiling for sm_90 (128-bit accesses, no spill, registers that leave enough warps per SM to cover
memory latency), not by timing: no GPU has run them yet (see docs/evidence.md).
"""

from __future__ import annotations

from dataclasses import dataclass

# Partial sums must not depend on the GPU, so these are constants, not functions of its SM count.
BACKWARD_PROGRAMS = 1024  # enough for every GPU to have several per SM
CHUNK = 32  # sorted tokens per program of the table sums
TABLE_BLOCK_E = 512  # columns per program there: four warps of 128-bit fp32 accesses


@dataclass(frozen=True)
class Config:
    """rows per program, and warps that share a row."""

    rows: int
    warps: int


def forward(width: int) -> Config:
    """Up to 32 values per thread."""
    return Config(rows=4, warps=_warps(width, 1024))


def backward(width: int, tokens: int) -> Config:
    """Eight values per thread, the least that keeps bf16 accesses 128 bits wide: it holds six such vectors at once."""
    return Config(rows=min(128, max(8, -(-tokens // BACKWARD_PROGRAMS))), warps=_warps(width, 256))


def _warps(width: int, lanes: int) -> int:
    """The power of two of warps that gives each at most `lanes` columns, 16 at most."""
    return min(16, max(1, 1 << (-(-width // lanes) - 1).bit_length()))
