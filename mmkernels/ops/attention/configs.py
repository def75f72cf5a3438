"""Tile sizes of the Triton attention kernels, per architecture, operand size and head width."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Config:
    """One kernel's tile: `rows` are what the tile owns (queries, or keys for dkdv), `cols` what its loop walks over."""

    rows: int
    cols: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configs:
    """The three tiled kernels of one (architecture, operand size, head width)."""

    fwd: Config
    dkdv: Config
    dq: Config

    def flat(self) -> list[int]:
        """As the operator carries it, so that tiles and the kernels that walk them cannot disagree."""
        return [n for config in (self.fwd, self.dkdv, self.dq) for n in astuple(config)]

    @classmethod
    def from_flat(cls, numbers: list[int]) -> Configs:
        return cls(*(Config(*numbers[i : i + 4]) for i in (0, 4, 8)))


# Chosen from the inspector's report (Triton 3.6.0, 2026-11): the largest tiles that spill nothing; on sm_80 also at
# most 99 KiB of shared memory, for sm_86, sm_89 and sm_120.  Not timed on a GPU yet: issue 3 sweeps and replaces this.
# Keys: architecture, bytes per element, widest head of the bucket.
TABLE: dict[tuple[str, int, int], Configs] = {
    ("sm_80", 2, 32): Configs(fwd=Config(128, 64, 4, 3), dkdv=Config(64, 64, 4, 2), dq=Config(64, 64, 4, 2)),
    ("sm_80", 2, 64): Configs(fwd=Config(128, 64, 8, 3), dkdv=Config(128, 64, 8, 2), dq=Config(128, 64, 8, 2)),
    ("sm_80", 2, 128): Configs(fwd=Config(128, 64, 8, 2), dkdv=Config(64, 64, 8, 2), dq=Config(64, 64, 8, 2)),
    ("sm_80", 2, 256): Configs(fwd=Config(64, 32, 8, 2), dkdv=Config(32, 16, 8, 2), dq=Config(32, 32, 8, 2)),
    ("sm_80", 4, 32): Configs(fwd=Config(64, 32, 8, 2), dkdv=Config(64, 32, 8, 2), dq=Config(64, 32, 8, 2)),
    ("sm_80", 4, 64): Configs(fwd=Config(64, 32, 8, 2), dkdv=Config(32, 32, 8, 2), dq=Config(64, 32, 8, 2)),
    ("sm_80", 4, 128): Configs(fwd=Config(32, 32, 8, 2), dkdv=Config(32, 16, 8, 2), dq=Config(32, 32, 8, 2)),
    ("sm_80", 4, 256): Configs(fwd=Config(16, 16, 8, 2), dkdv=Config(16, 16, 8, 1), dq=Config(16, 16, 8, 2)),
    ("sm_90", 2, 32): Configs(fwd=Config(128, 64, 8, 3), dkdv=Config(128, 64, 8, 3), dq=Config(128, 64, 8, 3)),
    ("sm_90", 2, 64): Configs(fwd=Config(128, 64, 8, 3), dkdv=Config(128, 64, 8, 3), dq=Config(128, 64, 8, 3)),
    ("sm_90", 2, 128): Configs(fwd=Config(128, 64, 8, 3), dkdv=Config(128, 32, 8, 3), dq=Config(128, 64, 8, 2)),
    ("sm_90", 2, 256): Configs(fwd=Config(128, 64, 8, 2), dkdv=Config(64, 16, 8, 2), dq=Config(128, 32, 8, 2)),
}
# fp32 products do not use tensor cores, so they fare alike on every architecture.
for _bucket in (32, 64, 128, 256):
    TABLE["sm_90", 4, _bucket] = TABLE["sm_100", 4, _bucket] = TABLE["sm_80", 4, _bucket]
    TABLE["sm_100", 2, _bucket] = TABLE["sm_90", 2, _bucket]

_override: dict[str, Config] = {}


def select(arch: str, itemsize: int, head_dim: int) -> Configs:
    """The configurations for `arch` ("sm_90"), operands of `itemsize` bytes and head width `head_dim`.

    Architectures that the table does not name take the nearest lower one of the same major number, then sm_80.
    """
    bucket = next(width for width in (32, 64, 128, 256) if head_dim <= width)
    configs = TABLE[(_family(arch), 2 if itemsize == 2 else 4, bucket)]
    return replace(configs, **_override) if _override else configs


def padded(head_dim: int) -> int:
    """Width of a tile: the next power of two, and 16 at least, which is what a tensor-core product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


@contextlib.contextmanager
def override(**kernels: Config) -> Iterator[None]:
    """For tests and the tuner: schedules made inside the block take fwd=, dkdv= and dq= in place of the table's."""
    before = dict(_override)
    _override.update(kernels)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


def _family(arch: str) -> str:
    return {"9": "sm_90", "10": "sm_100"}.get(arch.removeprefix("sm_")[:-1], "sm_80")
