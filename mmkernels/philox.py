"""Philox 4x32-10, the counter-based random generator of dropout, in integer tensor arithmetic.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).  The kernels and the C++ code compute
the same words, so that a mask depends on what is dropped and not on who computes it.
"""

from __future__ import annotations

from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2**32) as int64 for each counter (c0, c1, c2, c3), which broadcast; their low 32 bits count.

    seed int64 []: its low 32 bits are the first word of the key, its high 32 bits the second.
    """
    c0, c1, c2, c3 = (c.long() & MASK for c in (c0, c1, c2, c3))
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # int64 holds the product modulo 2**64: both halves survive the sign once they are masked.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & MASK) ^ c1 ^ k0,
            second & MASK,
            ((first >> 32) & MASK) ^ c3 ^ k1,
            first & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """A word keeps its element iff it is at least this: all but a fraction dropout_p of the 2**32 words do."""
    return min(round(float(dropout_p) * 2**32), MASK)  # a numpy.float16 does not hold 2**32
