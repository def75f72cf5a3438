"""Forward of short samples in several tiles, side by side: what an entry of the table for them should be.   D width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import attention
from benchmarks.attention_cases import Case
from benchmarks.harness import PREFIX, Deferred, Implementation, Missing
from benchmarks.tune import shown
from mmkernels.ops.attention import configs
from mmkernels.ops.attention.api import attention as call
from mmkernels.ops.attention.configs import Config

# 128 tokens are two blocks of 64 keys: there a late product is hidden by nothing.  Samples that are shorter still are
# of the same class of lengths, so what an entry would take from one it must not lose of the other.
CASES = (
    Case("uniform", 128, "full", 32, 32, 64, "bf16", 128),
    Case("uniform", 128, "full", 16, 16, 128, "bf16", 128),
    Case("stamps", 256, "full", 12, 12, 64, "bf16"),
)
C = Config
# By width, beside the default, which is late for both.  128 columns: a sample's keys in one block.
TILES: dict[int, tuple[Config, ...]] = {
    64: (
        C(128, 64, 8, 3),
        C(128, 64, 8, 3, registers=128),
        C(128, 64, 8, 2),
        C(128, 64, 4, 3),
        C(128, 128, 8, 2),
        C(64, 64, 4, 3),
        C(64, 64, 4, 3, tma=True),
        C(64, 128, 4, 2),
        C(64, 32, 4, 3, tma=True),
    ),
    128: (
        C(64, 64, 4, 2, tma=True),
        C(64, 64, 4, 3),
        C(128, 64, 8, 2),
        C(128, 64, 8, 3),
        C(128, 128, 8, 2),
        C(64, 128, 4, 2),
        C(64, 32, 4, 3, tma=True),
    ),
}


@dataclass
class TilesProblem(attention.AttentionProblem):
    op: str = "attention_tiles"  # in tables and comparisons these rows are not attention's

    def implementations(self) -> Iterator[Implementation | Missing]:
        yield from super().implementations()
        impl = "triton" if self.q.device.type == "cuda" else "auto"  # on a CPU a stand-in, whatever the tile
        for tile in TILES[self.q.shape[2]]:
            yield Implementation(f"{PREFIX}{impl} {shown(tile)}", forward(self, tile, impl), directions=("fwd",))


def forward(problem: attention.AttentionProblem, tile: Config, impl: str) -> Callable[[], Tensor]:
    """The call with this tile, on a layout of its own: a layout keeps what was chosen for it."""
    fresh = problem.with_new_layout()

    def timed() -> Tensor:
        with configs.override(fwd=tile):
            return call(fresh.q, fresh.k, fresh.v, layout=fresh.layout, mask=fresh.mask, impl=impl)

    return timed


def problems(device: torch.device, seed: int, cases: Iterable[Case] = CASES) -> list[Deferred]:
    return [attention.deferred(case, device, seed, ("fwd",), TilesProblem) for case in cases]
