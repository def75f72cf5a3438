"""Which training steps are measured: preset, samples, batch size, and who is left out.   B samples in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PADDED = ("vilt_padded", "bucketed_8", "bucketed_50")


@dataclass(frozen=True)
class Case:
    preset: str
    workload: str
    batch_size: int
    batches: int = 2  # timed per call, of those in the order in which they come
    buckets: tuple[int, int] = (8, 4)  # timed per call of each of POOLS, evenly from its shortest to its longest
    every_peer: bool = True  # also those that share our front ends, SDPA in a loop, and Flex, compiled for minutes
    left_out: Mapping[str, str] = field(default_factory=dict)  # peers that are not tried, and why
    # That a padded layout takes on a GPU per token slot: what cannot fit is not tried; 0: not known.
    slot_mb: float = 0.0
    compiled: bool = False  # against ours with compiled blocks, and nobody else

    @property
    def name(self) -> str:
        return f"{self.preset} {self.workload} B{self.batch_size}{', compiled' * self.compiled}"


# B64 leaves an H100 waiting for the host; B256, the preset's own, keeps it busy.  A padded layout took 0.87 MB per slot
# there: of B64 80 GB hold all but the ViLT layout, 141 GB that too; of B256 (162,000 to 342,000 slots) neither any.
SLOT_MB = 0.87
B64 = Case("base", "stamps", 64, buckets=(4, 2), every_peer=False, slot_mb=SLOT_MB)
B256 = Case("base", "stamps", 256, batches=1, every_peer=False, slot_mb=SLOT_MB)
B48 = Case(
    "base",
    "stamps",
    48,
    every_peer=False,
    left_out=dict.fromkeys(("packed_varlen_attn", *PADDED[1:]), "this case is for the ViLT layout"),
)
GPU_STAGE = (B64, B256, B48)
GPU_COMPILED = (
    Case("base", "stamps", 256, batches=1, compiled=True),
    Case("base", "stamps", 64, compiled=True),
)


def cases(shapes: str, device: str) -> list[Case]:
    if device == "cpu":
        # Small batches favour padding: the ViLT layout of `native` wastes less at 16 samples than at the preset's 64.
        if shapes == "quick":
            return [
                Case("demo", "stamps", 64, buckets=(2, 2), every_peer=False),
                Case("native", "stamps", 16, buckets=(4, 2), every_peer=False),
                Case("native", "longtail", 8, buckets=(4, 2), every_peer=False),
                Case("demo", "longtail", 64, buckets=(4, 2), every_peer=False),
                Case("base", "stamps", 2, batches=1, buckets=(1, 1), every_peer=False),
            ]
        return [
            Case("demo", "stamps", 64, batches=8, buckets=(8, 8)),
            Case("native", "stamps", 64),
            Case("demo", "longtail", 64, buckets=(8, 8)),
            Case("native", "longtail", 64),
            Case("base", "stamps", 4, batches=1, buckets=(2, 2), every_peer=False),
        ]
    # base first: it is the preset that is meant for a GPU
    if shapes == "quick":
        options = {"buckets": (4, 2), "every_peer": False}
        others = [Case(preset, "stamps", size, **options) for preset, size in (("native", 64), ("demo", 256))]
        longtail = [
            Case(preset, "longtail", size, **options) for preset, size in (("base", 64), ("native", 64), ("demo", 256))
        ]
        return [*GPU_STAGE, *others, *longtail]
    sizes = {"base": 256, "native": 256, "demo": 1024}
    return [Case(preset, workload, size) for workload in ("stamps", "longtail") for preset, size in sizes.items()]
