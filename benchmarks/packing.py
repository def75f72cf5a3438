"""Packing problems: moving rows between streams, the packed order and padded samples.

T tokens, E width, M modalities, N segments, B samples, L padded length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.harness import Implementation, Missing, Work, close
from benchmarks.limits import DTYPES
from benchmarks.ours import our_rows
from benchmarks.peers import packing_copy, packing_nested, packing_padded, packing_torch
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad

PEERS: tuple[ModuleType, ...] = (packing_torch, packing_nested, packing_padded, packing_copy)
DTYPES_USED: dict[str, list[str]] = {"cpu": [], "cuda": []}  # rows are moved, not multiplied: no GEMM limit

# NAME_out writes into warm memory: the page faults of a fresh output can cost more than the copy.
FUNCTIONS = ("pack_out", "pack", "unpack", "pad", "unpad", "gather_rows", "segment_mean")
FORWARD_ONLY = ("pack_out", "unpack")
LARGEST_FALLBACK = 64 << 20  # bytes: our path without a compiler is measured on small batches only, to keep runs short


@dataclass(frozen=True)
class Batch:
    """Streams of equal width, the same rows packed, other rows padded (for unpad), and the rows to gather."""

    layout: PackedLayout
    streams: list[Tensor]
    packed: Tensor
    padded: Tensor | None
    rows: Tensor
    grad_output: Tensor | None


@dataclass
class PackingProblem:
    """One function on one batch, drawn when it is first asked for: all batches of a run would not fit into memory."""

    case: str
    dtype: str
    function: str
    layout: PackedLayout
    draw: Callable[[], Batch]
    peers: tuple[ModuleType, ...] = PEERS
    op: str = "packing"

    @functools.cached_property
    def batch(self) -> Batch:
        return self.draw()

    @property
    def streams(self) -> list[Tensor]:
        return self.batch.streams

    @property
    def packed(self) -> Tensor:
        return self.batch.packed

    @property
    def padded(self) -> Tensor | None:
        return self.batch.padded

    @property
    def rows(self) -> Tensor:
        return self.batch.rows

    @property
    def grad_output(self) -> Tensor | None:
        return self.batch.grad_output

    @property
    def directions(self) -> tuple[str, ...]:
        return ("fwd",) if self.function in FORWARD_ONLY else ("fwd", "bwd")

    @property
    def leaves(self) -> list[Tensor]:
        return self._leaves(self.batch)

    def _leaves(self, batch: Batch) -> list[Tensor]:
        if self.function in ("pack", "pack_out"):
            return batch.streams
        return [batch.padded if self.function == "unpad" else batch.packed]

    def call(self, impl: str, batch: Batch | None = None) -> Callable[[], Tensor | list[Tensor]]:
        batch = batch or self.batch
        layout, packed = batch.layout, batch.packed
        if self.function == "pack_out":
            out = torch.zeros_like(packed, requires_grad=False)
            return lambda: pack(batch.streams, layout, out=out, impl=impl)
        return {
            "pack": lambda: pack(batch.streams, layout, impl=impl),
            "unpack": lambda: unpack(packed, layout, impl=impl),
            "pad": lambda: pad(packed, layout, impl=impl)[0],
            "unpad": lambda: unpad(batch.padded, layout, impl=impl),
            "gather_rows": lambda: gather_rows(packed, batch.rows, impl=impl),
            "segment_mean": lambda: segment_mean(packed, layout, impl=impl),
        }[self.function]

    def implementations(self) -> Iterator[Implementation | Missing]:
        def build(name: str, impl: str, extra: dict) -> Implementation:
            return Implementation(name, self.call(impl), self.leaves, self.grad_output, extra=extra)

        without = ("torch",) if self.packed.nbytes > LARGEST_FALLBACK else ()
        yield from our_rows("packing", self.packed, build, without=without)
        for peer in self.peers:
            reason = peer.missing(self)
            yield from [Missing(peer.NAME, reason)] if reason else peer.build(self)

    def check(self, direction: str, results: list) -> str | None:
        expected = self._oracle[:1] if direction == "fwd" else self._oracle[1:]
        if self.function == "unpack":
            results, expected = results[0], expected[0]
        # Copies are exact; sums (a mean, the gradient of rows gathered twice) are not.
        if self._moves_only or (self.function, direction) == ("gather_rows", "fwd"):
            same = all(torch.equal(a, b.to(a.dtype)) for a, b in zip(results, expected, strict=True))
            return None if same else "wrong: not the reference's rows"
        return close(results, expected)

    def work(self, direction: str) -> Work:
        """Bytes read once plus bytes written once: rows, and int32 places (int64 row numbers for gather_rows)."""
        row = self.packed[0].nbytes
        total, moved = self.layout.total_tokens, len(self.rows)
        spaces = self.layout.num_samples * self.layout.max_seqlen  # rows of the padded tensor
        places = 4 * 4 * self.layout.num_segments
        amount = {
            "pad": (total + spaces) * row if direction == "fwd" else 2 * total * row,
            "unpad": 2 * total * row if direction == "fwd" else (total + spaces) * row,
            # backward writes the whole gradient, zeros too
            "gather_rows": (2 * moved if direction == "fwd" else moved + total) * row + self.rows.nbytes,
            "segment_mean": (total + self.layout.num_segments) * row + places,
        }.get(self.function, 2 * total * row + places)
        return Work(amount, "GB/s", 9, "copy")

    @property
    def _moves_only(self) -> bool:
        return self.function not in ("gather_rows", "segment_mean")

    @functools.cached_property
    def _oracle(self) -> list:
        """Reference result and gradients; in the problem's dtype where only bits move, else in float64."""

        def change(x):
            return (x.detach() if self._moves_only else x.detach().double()).requires_grad_()

        batch = replace(
            self.batch,
            streams=[change(x) for x in self.streams],
            packed=change(self.packed),
            padded=None if self.padded is None else change(self.padded),
        )
        call = self.call("reference", batch)
        if self.function in FORWARD_ONLY:
            with torch.no_grad():
                return [call()]
        output = call()
        gradients = torch.autograd.grad(output, self._leaves(batch), self.grad_output.to(output.dtype))
        return [output.detach(), *gradients]


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[PackingProblem]:
    for workload, samples, width, functions, dtypes in _cases(shapes, device.type):
        for function in functions:
            for dtype in dtypes:
                yield build(function, workload, samples, width, dtype, device, seed)


def build(function, workload, samples, width, dtype, device, seed) -> PackingProblem:
    layout = WORKLOADS[workload](samples, seed).to(device)
    case = f"{function} {workload} {samples} T{layout.total_tokens} E{width}"
    draw = functools.partial(_draw, function, layout, width, DTYPES[dtype], seed)
    return PackingProblem(case, dtype, function, layout, draw)


def _draw(function: str, layout: PackedLayout, width: int, dtype: torch.dtype, seed: int) -> Batch:
    generator = torch.Generator(layout.device).manual_seed(seed)  # a host draws the batch of a GPU for seconds

    def draw(*shape: int) -> Tensor:
        values = torch.empty(*shape, width, device=layout.device).uniform_(-1, 1, generator=generator)
        return values.to(dtype)

    total, spaces = layout.total_tokens, (layout.num_samples, layout.max_seqlen)
    streams = [draw(rows).requires_grad_() for rows in layout.stream_lengths]
    packed = pack([x.detach() for x in streams], layout, impl="reference").requires_grad_()
    padded = draw(*spaces).requires_grad_() if function == "unpad" else None
    shuffled = torch.randperm(total, generator=generator, device=layout.device)
    rows = shuffled[: max(total * 15 // 100, 1)].sort().values
    outputs = {
        "pack": (total,),
        "pad": spaces,
        "unpad": (total,),
        "gather_rows": (len(rows),),
        "segment_mean": (layout.num_segments,),
    }
    grad_output = draw(*outputs[function]) if function in outputs else None
    return Batch(layout, streams, packed, padded, rows, grad_output)


def mixed(samples: int, seed: int) -> PackedLayout:
    """Text, image and audio in every sample, about 132,000 tokens in 256 samples, like the batch of the first study."""
    rng = np.random.default_rng(seed)
    ranges = ((8, 64), (16, 408), (25, 513))
    return PackedLayout.from_counts(np.stack([rng.integers(*span, samples) for span in ranges], axis=1))


WORKLOADS = workloads.BY_NAME | {"mixed": mixed}


def _cases(shapes: str, device: str) -> list[tuple]:
    """(workload, samples, width, functions, dtypes); quick is a part of full."""
    both = ["bf16", "fp32"]
    if device == "cpu":
        cases = [
            ("stamps", 4, 256, ["pack_out", "unpack", "gather_rows"], ["fp32"]),  # tiny: what a call costs
            ("stamps", 32, 256, FUNCTIONS, ["fp32"]),
            ("mixed", 256, 768, ["pack_out", "pack"], ["bf16"]),
            ("mixed", 32, 768, ["pad", "unpad", "gather_rows", "segment_mean"], ["bf16"]),
        ]
        if shapes == "quick":
            return cases
        return [
            *cases,
            ("mixed", 256, 768, ["pack_out", "pack"], ["fp32"]),
            ("mixed", 256, 768, ["unpack", "pad", "unpad", "gather_rows", "segment_mean"], both),
        ]
    cases = [("mixed", 256, 768, FUNCTIONS, ["bf16"])]
    if shapes == "quick":
        return cases
    return [*cases, ("stamps", 512, 768, FUNCTIONS, ["bf16"]), ("native", 256, 768, FUNCTIONS, ["fp32"])]
