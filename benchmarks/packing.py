"""Packing problems: moving rows between streams and the packed order.   T tokens, E width, M modalities, N segments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.harness import Implementation, Missing, Work, close
from benchmarks.limits import DTYPES
from benchmarks.ours import our_impls
from benchmarks.peers import packing_copy, packing_torch
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows, pack, segment_mean, unpack

PEERS: tuple[ModuleType, ...] = (packing_torch, packing_copy)
DTYPES_USED: dict[str, list[str]] = {"cpu": [], "cuda": []}  # rows are moved, not multiplied: no GEMM limit

FUNCTIONS = ("pack", "unpack", "gather_rows", "segment_mean")


@dataclass
class PackingProblem:
    """One function on one batch: streams of equal width, the same rows packed, and rows to gather."""

    case: str
    dtype: str
    function: str
    layout: PackedLayout
    streams: list[Tensor]
    packed: Tensor
    rows: Tensor
    grad_output: Tensor
    peers: tuple[ModuleType, ...] = PEERS
    op: str = "packing"

    @property
    def directions(self) -> tuple[str, ...]:
        return ("fwd",) if self.function == "unpack" else ("fwd", "bwd")

    @property
    def leaves(self) -> list[Tensor]:
        return self.streams if self.function == "pack" else [self.packed]

    def call(self, impl: str) -> Callable[[], Tensor | list[Tensor]]:
        if self.function == "pack":
            return lambda: pack(self.streams, self.layout, impl=impl)
        if self.function == "unpack":
            return lambda: unpack(self.packed, self.layout, impl=impl)
        if self.function == "gather_rows":
            return lambda: gather_rows(self.packed, self.rows, impl=impl)
        return lambda: segment_mean(self.packed, self.layout, impl=impl)

    def implementations(self) -> Iterator[Implementation | Missing]:
        for name, impl in our_impls("packing", self.packed.device, self.packed.dtype):
            if isinstance(impl, Missing):
                yield impl
                continue
            yield Implementation(name, self.call(impl), self.leaves, self.grad_output)
            if self.function == "pack":  # into warm memory: page faults of a fresh output can cost more than the copy
                out = torch.empty_like(self.packed)
                warm = functools.partial(pack, self.streams, self.layout, out=out, impl=impl)
                yield Implementation(f"{name} out=", warm, directions=("fwd",))
        for peer in self.peers:
            reason = peer.missing(self)
            yield from [Missing(peer.NAME, reason)] if reason else peer.build(self)

    def check(self, direction: str, results: list) -> str | None:
        expected = self._oracle[:1] if direction == "fwd" else self._oracle[1:]
        if self.function == "unpack":
            results, expected = results[0], expected[0]
        # Copies are exact; sums (a mean, the gradient of rows gathered twice) are not.
        exact = self.function in ("pack", "unpack") or (self.function, direction) == ("gather_rows", "fwd")
        return close(results, expected, 0.0 if exact else None)

    def work(self, direction: str) -> Work:
        """Bytes read once plus bytes written once: rows, and int32 places (int64 row numbers for gather_rows)."""
        row = self.packed[0].nbytes
        total, moved = self.layout.total_tokens, len(self.rows)
        places = 4 * 4 * self.layout.num_segments
        amount = {
            "pack": 2 * total * row + places,
            "unpack": 2 * total * row + places,
            # backward writes the whole gradient, zeros too
            "gather_rows": (2 * moved if direction == "fwd" else moved + total) * row + self.rows.nbytes,
            "segment_mean": (total + self.layout.num_segments) * row + places,
        }[self.function]
        return Work(amount, "GB/s", 9, "copy")

    @functools.cached_property
    def _oracle(self) -> list:
        """Reference result and gradients; in the problem's dtype where only bits move, else in float64."""
        exact = self.function in ("pack", "unpack")
        change = (lambda x: x.detach().requires_grad_()) if exact else lambda x: x.detach().double().requires_grad_()
        twin = PackingProblem(
            self.case,
            self.dtype,
            self.function,
            self.layout,
            [change(x) for x in self.streams],
            change(self.packed),
            self.rows,
            self.grad_output,
        )
        output = twin.call("reference")()
        if self.function == "unpack":
            return [[x.detach() for x in output]]
        gradients = torch.autograd.grad(output, twin.leaves, self.grad_output.to(output.dtype))
        return [output.detach(), *gradients]


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[PackingProblem]:
    for workload, samples, width, dtypes in _cases(shapes, device.type):
        for function in FUNCTIONS:
            for dtype in dtypes:
                yield build(function, workload, samples, width, dtype, device, seed)


def build(function, workload, samples, width, dtype, device, seed) -> PackingProblem:
    layout = workloads.BY_NAME[workload](samples, seed).to(device)
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(device, DTYPES[dtype])

    streams = [draw(rows).requires_grad_() for rows in layout.stream_lengths]
    packed = pack([x.detach() for x in streams], layout, impl="reference").requires_grad_()
    total = layout.total_tokens
    rows = torch.randperm(total, generator=generator)[: max(total * 15 // 100, 1)].sort().values.to(device)
    outputs = {"pack": total, "unpack": total, "gather_rows": len(rows), "segment_mean": layout.num_segments}
    case = f"{function} {workload} {samples} T{total} E{width}"
    return PackingProblem(case, dtype, function, layout, streams, packed, rows, draw(outputs[function]))


def _cases(shapes: str, device: str) -> list[tuple]:
    """(workload, samples, width, dtypes); quick is a part of full."""
    if device == "cpu":
        cases = [("stamps", 32, 256, ["fp32"]), ("native", 64, 768, ["fp32"])]
        return cases if shapes == "quick" else [*cases, ("native", 256, 768, ["bf16", "fp32"])]
    cases = [("native", 256, 768, ["bf16"])]
    return cases if shapes == "quick" else [*cases, ("stamps", 512, 768, ["bf16"]), ("native", 256, 768, ["fp32"])]
