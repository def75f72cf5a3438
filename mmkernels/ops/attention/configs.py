"""Tile sizes of the Triton attention kernels: the built-in table, and above it what a tuner measured.

A kernel has one or more candidates, the default first.  For each batch `triton_kernels.schedule` takes the one whose
tiles compute the fewest pairs, a candidate's pairs counted times its `price`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mmkernels.ops.attention import tuned

KERNELS, BUCKETS = tuned.KERNELS, tuned.BUCKETS
NEVER_LATE = ("dq", "fused")  # kernels without Config.late


@dataclass(frozen=True)
class Config:
    """One kernel's tile: `rows` are what the tile owns (queries; keys for dkdv and fused), `cols` what its loop walks.

    tma    whole blocks of the loop come through tensor descriptors (sm_90 and later), where base and strides allow it
    token  token tiles rather than tiles per sample: `schedule` sets it, the table does not
    late   in the loop over whole blocks, a product that adds to what the kernel returns comes later, to run while the
           softmax is computed: that of the block before behind the scores (fwd), dV behind dP (dkdv).  More registers;
           of use for 16-bit products on sm_90, and right everywhere
    registers  the most that a thread takes, so that more programs share an SM; 0: as many as the compiler wants
    price  what computing one pair costs, relative to the kernel's default
    """

    rows: int
    cols: int
    warps: int
    stages: int
    tma: bool = False
    token: bool = False
    late: bool = False
    registers: int = 0
    price: float = field(default=1.0, compare=False)

    def flat(self) -> list[int]:
        own = (self.rows, self.cols, self.warps, self.stages, self.tma, self.token, self.late, self.registers)
        return [int(number) for number in own]


@dataclass(frozen=True)
class Configs:
    """What one schedule was made for.  fused: `dkdv` is the fused kernel's configuration, and `dq` is not used."""

    fwd: Config
    dkdv: Config
    dq: Config
    fused: bool = False

    def flat(self) -> list[int]:
        """As the operator carries it, so that tiles and the kernels that walk them cannot disagree."""
        return [*self.fwd.flat(), *self.dkdv.flat(), *self.dq.flat(), int(self.fused)]

    @classmethod
    def from_flat(cls, numbers: list[int]) -> Configs:
        return _from_flat(tuple(numbers))


@functools.lru_cache(maxsize=256)  # every call of every layer asks
def _from_flat(numbers: tuple[int, ...]) -> Configs:
    each = (numbers[i : i + 8] for i in (0, 8, 16))
    configs = (Config(*n[:4], *map(bool, n[4:7]), n[7]) for n in each)
    return Configs(*configs, fused=bool(numbers[24]))


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from, per kernel, the default first.  Backward is `fused`, or the pair dkdv and dq."""

    fwd: tuple[Config, ...]
    dkdv: tuple[Config, ...]
    dq: tuple[Config, ...]
    fused: tuple[Config, ...] = ()

    def __post_init__(self) -> None:
        for kernel in NEVER_LATE:
            if any(config.late for config in getattr(self, kernel)):
                raise ValueError(f"attention: late is True for {kernel}, expected False: only fwd and dkdv have it")


C = Config
# A small tile keeps fewer queries per loaded key: twice the traffic per pair, behind products that take as long.
# Where no other price stands it is a guess by that arithmetic, not a timing.
SMALL = 1.1

# Forward.  Keys: architecture, bytes per element, widest head of the bucket.
# sm_90, D 64 and 128, bf16: the fastest of sweeps on an H100 (2026-11-27, docs/attention.md) that spill nothing.
# D 64: descriptors made the large tile slower and the small one faster. No one price fits what was timed of the two:
# the large one takes 1.10 times as long in native 64, where it computes 1.09 times the pairs, and 1.11 in causal
# longtail 32, for 1.13; at 1.07 both take the small one, and causal samples of 1,024 tokens (1.06) the large one.
# All others are chosen from the inspector's report (Triton 3.6.0, 2026-11) and not timed: the largest tiles that spill
# nothing (on sm_80, D 64: 12 bytes with `visible`, 64 with all extras); on sm_80 also at most 99 KiB of shared memory,
# for sm_86, sm_89 and sm_120.  `python -m benchmarks tune attention` times, and what it writes comes first.
FWD: dict[tuple[str, int, int], tuple[Config, ...]] = {
    ("sm_80", 2, 32): (C(128, 64, 4, 3), C(64, 64, 4, 3, price=SMALL)),
    ("sm_80", 2, 64): (C(128, 64, 8, 3), C(64, 64, 4, 2, price=SMALL)),
    ("sm_80", 2, 128): (C(128, 64, 8, 2), C(64, 32, 4, 2, price=SMALL)),
    ("sm_80", 2, 256): (C(64, 32, 8, 2),),
    ("sm_80", 4, 32): (C(64, 32, 8, 2),),
    ("sm_80", 4, 64): (C(64, 32, 8, 2),),
    ("sm_80", 4, 128): (C(32, 32, 8, 2),),
    ("sm_80", 4, 256): (C(16, 16, 8, 2),),
    ("sm_90", 2, 32): (C(128, 64, 8, 3, tma=True), C(64, 64, 4, 3, tma=True, price=SMALL)),
    ("sm_90", 2, 64): (C(128, 64, 8, 3, late=True, registers=128), C(64, 32, 4, 3, tma=True, price=1.07)),
    ("sm_90", 2, 128): (C(64, 64, 4, 2, tma=True, late=True), C(64, 32, 4, 3, tma=True, price=SMALL)),
    ("sm_90", 2, 256): (C(128, 64, 8, 2), C(64, 32, 8, 2, price=SMALL)),
}

# Where modalities are hidden, late tiles spill (8 and 12 bytes); and on sm_100 nobody looked at them.
FWD_NOT_LATE: dict[tuple[str, int, int], tuple[Config, ...]] = {
    ("sm_90", 2, 64): (C(128, 64, 8, 3), C(64, 32, 4, 3, tma=True, price=1.07)),
    ("sm_90", 2, 128): (C(128, 64, 8, 3), C(64, 32, 4, 3, tma=True, price=SMALL)),
}

# With pair bias, dropout and modality mass at once, by the same report (at D 256, 40 bytes spilled); dropout takes most
# of the registers.
FWD_EXTRAS: dict[tuple[str, int, int], tuple[Config, ...]] = {
    ("sm_80", 2, 32): (C(128, 32, 8, 3), C(64, 32, 4, 3, price=SMALL)),
    ("sm_90", 2, 32): (C(128, 64, 8, 2), C(64, 32, 4, 2, price=SMALL)),
    ("sm_90", 2, 64): (C(128, 64, 8, 2), C(64, 32, 4, 2, price=SMALL)),
    ("sm_90", 2, 128): (C(128, 32, 8, 3),),
    ("sm_90", 2, 256): (C(128, 32, 8, 2),),
}


def _bwd(dkdv: Config | tuple[Config, ...], dq: Config, *fused: Config) -> dict[str, tuple[Config, ...]]:
    return {"dkdv": dkdv if isinstance(dkdv, tuple) else (dkdv,), "dq": (dq,), "fused": fused}


# Backward, chosen alike.  On an H100 the pair was faster than the fused kernel, which computes less but sums dq in
# memory: 1.35 ms against 1.60 at D 64 and 1.27 against 1.39 at D 128, of 4 x 4,096 tokens.  So no entry has one; the
# tuner tries it on each GPU.
BWD: dict[tuple[str, int, int], dict[str, tuple[Config, ...]]] = {
    ("sm_80", 2, 32): _bwd(dkdv=C(64, 64, 4, 2), dq=C(64, 64, 4, 2)),
    ("sm_80", 2, 64): _bwd(dkdv=C(128, 64, 8, 2), dq=C(128, 64, 8, 2)),
    ("sm_80", 2, 128): _bwd(dkdv=C(64, 64, 8, 2), dq=C(64, 64, 8, 2)),
    ("sm_80", 2, 256): _bwd(dkdv=C(32, 16, 8, 2), dq=C(32, 32, 8, 2)),
    ("sm_80", 4, 32): _bwd(dkdv=C(64, 32, 8, 2), dq=C(64, 32, 8, 2)),
    ("sm_80", 4, 64): _bwd(dkdv=C(32, 32, 8, 2), dq=C(64, 32, 8, 2)),
    ("sm_80", 4, 128): _bwd(dkdv=C(32, 16, 8, 2), dq=C(32, 32, 8, 2)),
    ("sm_80", 4, 256): _bwd(dkdv=C(16, 16, 8, 1), dq=C(16, 16, 8, 2)),
    ("sm_90", 2, 32): _bwd((C(64, 64, 4, 3), C(64, 32, 4, 3, price=SMALL)), C(64, 32, 4, 3)),
    ("sm_90", 2, 64): _bwd((C(64, 64, 4, 3), C(64, 32, 4, 3, price=SMALL)), C(64, 32, 4, 3)),
    ("sm_90", 2, 128): _bwd(dkdv=C(128, 32, 8, 3), dq=C(64, 32, 4, 3)),
    ("sm_90", 2, 256): _bwd(dkdv=C(64, 16, 8, 2), dq=C(128, 32, 8, 2)),
    # Fused spills hundreds of bytes there.
    ("sm_100", 2, 32): _bwd(dkdv=C(128, 64, 8, 3), dq=C(128, 64, 8, 3)),
    ("sm_100", 2, 64): _bwd(dkdv=C(128, 32, 8, 2), dq=C(128, 64, 8, 3)),
    ("sm_100", 2, 128): _bwd(dkdv=C(64, 32, 8, 2), dq=C(64, 64, 8, 2)),
    ("sm_100", 2, 256): _bwd(dkdv=C(32, 16, 8, 2), dq=C(32, 32, 8, 2)),
}

# With pair bias and dropout, which leave no room for the fused kernel; the pair's dbias is also the more exact.  On
# sm_80 at D 64 tiles of 128 x 64 spill 13 KB of dkdv, and these 40 bytes (dq 28).
BWD_EXTRAS: dict[tuple[str, int, int], dict[str, tuple[Config, ...]]] = {
    ("sm_80", 2, 32): _bwd(dkdv=C(128, 16, 8, 2), dq=C(128, 32, 8, 2)),
    ("sm_80", 2, 64): _bwd(dkdv=C(128, 16, 8, 2), dq=C(128, 32, 8, 2)),
    ("sm_90", 2, 32): _bwd(dkdv=C(128, 32, 8, 2), dq=C(128, 32, 8, 2)),
    ("sm_90", 2, 64): _bwd(dkdv=C(128, 32, 8, 2), dq=C(128, 32, 8, 2)),
    ("sm_90", 2, 128): _bwd(dkdv=C(128, 16, 8, 2), dq=C(128, 32, 8, 2)),
    ("sm_90", 2, 256): _bwd(dkdv=C(32, 16, 8, 2), dq=C(128, 16, 8, 2)),
}

_override: dict[str, tuple[Config, ...]] = {}
_schedule: list[str] = []


def select(
    arch: str, dtype: str, head_dim: int, *, extras: bool = False, mask: str = "document", lengths: str = "medium"
) -> Candidates:
    """The candidates for `arch` ("sm_90"), `dtype` ("bf16", "fp16", "fp32") and a head width.

    extras: with pair bias, dropout or modality mass.  mask, lengths: classes of the batch, of `tuned.classify`.
    Architectures that the table does not name take the nearest lower one of the same major number, then sm_80.
    """
    width = bucket(head_dim)
    found = built_in(_family(arch), 4 if dtype == "fp32" else 2, width, extras, mask == "visible")
    measured = tuned.lookup(arch, dtype, width, extras, mask, lengths)
    found = replace(found, **{kernel: (Config(**numbers),) for kernel, numbers in measured.items()})
    return replace(found, **_override) if _override else found


def built_in(family: str, itemsize: int, width: int, extras: bool, visible: bool) -> Candidates:
    """The tables' entry.  fp32 products use no tensor cores, so they fare alike on every architecture."""
    key = ("sm_80" if itemsize == 4 else min(family, "sm_90", key=_generation), itemsize, width)
    fwd = FWD_NOT_LATE.get(key, FWD[key]) if visible or family == "sm_100" else FWD[key]
    fwd = FWD_EXTRAS.get(key, fwd) if extras else fwd
    if family == "sm_100":  # descriptors were looked at on sm_90 only
        fwd = tuple(replace(config, tma=False) for config in fwd)
    bwd = BWD.get((family, *key[1:]), BWD[key]) if itemsize == 2 else BWD[key]
    bwd = BWD_EXTRAS.get(key, bwd) if extras else bwd
    return Candidates(fwd, **bwd)


def forced_schedule() -> str | None:
    """The schedule that `override` asks for; None: whichever is cheaper."""
    return _schedule[-1] if _schedule else None


def bucket(head_dim: int) -> int:
    return next(width for width in BUCKETS if head_dim <= width)


def padded(head_dim: int) -> int:
    """Width of a tile: the next power of two, and 16 at least, which is what a tensor-core product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


@contextlib.contextmanager
def override(*, schedule: str | None = None, **kernels: Config) -> Iterator[None]:
    """For tests and the tuner: schedules made inside the block take these configurations, and tiles of `schedule`.

    kernels: fwd=, dkdv=, dq=, fused=, in place of the table's candidates.  A layout keeps the schedules that were made
    for it: use a fresh one.
    """
    before = dict(_override)
    _override.update({kernel: (config,) for kernel, config in kernels.items()})
    if schedule is not None:
        _schedule.append(schedule)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
        if schedule is not None:
            _schedule.pop()


def _generation(family: str) -> int:
    return int(family.removeprefix("sm_"))


def _family(arch: str) -> str:
    return {"9": "sm_90", "10": "sm_100"}.get(arch.removeprefix("sm_")[:-1], "sm_80")
