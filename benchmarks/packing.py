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
from benchmarks.harness import Deferred, Implementation, Missing, Work, close
from benchmarks.limits import DTYPES
from benchmarks.ours import our_rows
from benchmarks.peers import packing_copy, packing_nested, packing_padded, packing_torch, peer_rows
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows, pack, pad, segment_mean, unpack, unpad

PEERS: tuple[ModuleType, ...] = (packing_torch, packing_nested, packing_padded, packing_copy)

# NAME_out writes into warm memory: the page faults of a fresh output can cost more than the copy.
FUNCTIONS = ("pack_out", "pack", "unpack", "pad", "unpad", "gather_rows", "segment_mean")
FORWARD_ONLY = ("pack_out", "unpack")
LARGEST_FALLBACK = 64 << 20  # bytes: our path without a compiler is measured on small batches only, to keep runs short


@dataclass
class PackingProblem:
    """One function on a batch: streams of equal width, the same rows packed, other rows padded, and the rows to gather.

    padded and grad_output are None where the function takes no such thing.
    """

    case: str
    dtype: str
    function: str
    layout: PackedLayout
    streams: list[Tensor]
    packed: Tensor
    padded: Tensor | None
    rows: Tensor
    grad_output: Tensor | None
    peers: tuple[ModuleType, ...] = PEERS
    op: str = "packing"

    @property
    def directions(self) -> tuple[str, ...]:
        return directions_of(self.function)

    @property
    def leaves(self) -> list[Tensor]:
        if self.function in ("pack", "pack_out"):
            return self.streams
        return [self.padded if self.function == "unpad" else self.packed]

    def call(self, impl: str) -> Callable[[], Tensor | list[Tensor]]:
        if self.function == "pack_out":
            out = torch.zeros_like(self.packed, requires_grad=False)
            return lambda: pack(self.streams, self.layout, out=out, impl=impl)
        return {
            "pack": lambda: pack(self.streams, self.layout, impl=impl),
            "unpack": lambda: unpack(self.packed, self.layout, impl=impl),
            "pad": lambda: pad(self.packed, self.layout, impl=impl)[0],
            "unpad": lambda: unpad(self.padded, self.layout, impl=impl),
            "gather_rows": lambda: gather_rows(self.packed, self.rows, impl=impl),
            "segment_mean": lambda: segment_mean(self.packed, self.layout, impl=impl),
        }[self.function]

    def implementations(self) -> Iterator[Implementation | Missing]:
        def build(name: str, impl: str, extra: dict) -> Implementation:
            return Implementation(name, self.call(impl), self.leaves, self.grad_output, extra=extra)

        without = ("torch",) if self.packed.nbytes > LARGEST_FALLBACK else ()
        yield from our_rows("packing", self.packed, build, without=without)
        yield from peer_rows(self, self.peers)

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

        exact = replace(
            self,
            streams=[change(x) for x in self.streams],
            packed=change(self.packed),
            padded=None if self.padded is None else change(self.padded),
        )
        call = exact.call("reference")
        if self.function in FORWARD_ONLY:
            with torch.no_grad():
                return [call()]
        output = call()
        gradients = torch.autograd.grad(output, exact.leaves, self.grad_output.to(output.dtype))
        return [output.detach(), *gradients]


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[Deferred]:
    """Drawn when their turn comes: all batches of a run would not fit into memory."""
    for workload, samples, width, functions, dtypes in _cases(shapes, device.type):
        total = WORKLOADS[workload](samples, seed).total_tokens
        for function in functions:
            for dtype in dtypes:
                case = _name(function, workload, samples, total, width)
                make = functools.partial(build, function, workload, samples, width, dtype, device, seed)
                yield Deferred("packing", case, dtype, directions_of(function), make)


def directions_of(function: str) -> tuple[str, ...]:
    return ("fwd",) if function in FORWARD_ONLY else ("fwd", "bwd")


def build(function, workload, samples, width, dtype, device, seed) -> PackingProblem:
    layout = WORKLOADS[workload](samples, seed).to(device)
    generator = torch.Generator(device).manual_seed(seed)  # a host draws the batch of a GPU for seconds

    def draw(*shape: int) -> Tensor:
        values = torch.empty(*shape, width, device=device).uniform_(-1, 1, generator=generator)
        return values.to(DTYPES[dtype])

    total, spaces = layout.total_tokens, (layout.num_samples, layout.max_seqlen)
    streams = [draw(rows).requires_grad_() for rows in layout.stream_lengths]
    packed = pack([x.detach() for x in streams], layout, impl="reference").requires_grad_()
    padded = draw(*spaces).requires_grad_() if function == "unpad" else None
    shuffled = torch.randperm(total, generator=generator, device=device)
    rows = shuffled[: max(total * 15 // 100, 1)].sort().values
    outputs = {
        "pack": (total,),
        "pad": spaces,
        "unpad": (total,),
        "gather_rows": (len(rows),),
        "segment_mean": (layout.num_segments,),
    }
    grad_output = draw(*outputs[function]) if function in outputs else None
    case = _name(function, workload, samples, total, width)
    return PackingProblem(case, dtype, function, layout, streams, packed, padded, rows, grad_output)


def _name(function: str, workload: str, samples: int, total: int, width: int) -> str:
    return f"{function} {workload} {samples} T{total} E{width}"


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
