"""Attention problems: packed ragged batches, several masks.   T tokens, H heads, G key/value heads, D head width."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import attention_pairs, workloads
from benchmarks.attention_cases import CUDA_MORE, MASKS, MODALITY_MASKS, Case, cases
from benchmarks.harness import LEFT_OUT, MAKES_MASK, PREFIX, Deferred, Implementation, Missing, Work, close
from benchmarks.limits import DTYPES
from benchmarks.ours import our_rows
from benchmarks.peers import (
    attention_fa2,
    attention_fa3,
    attention_fa4,
    attention_flex,
    attention_sdpa_backends,
    attention_sdpa_dense,
    attention_sdpa_loop,
    attention_sdpa_padded,
    attention_varlen,
    attention_xformers,
    peer_rows,
)
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.ops.attention.api import attention

SECONDS = {"quick": 120, "full": 600}  # of its 42 directions each has a second, for 20 samples


class Peer(Protocol):
    NAME: str

    def missing(self, problem: AttentionProblem) -> str | None: ...
    def build(self, problem: AttentionProblem) -> Implementation: ...


PEERS: tuple[Peer, ...] = (
    attention_sdpa_padded,
    attention_sdpa_dense,
    attention_sdpa_loop,
    attention_sdpa_backends.FLASH,
    attention_sdpa_backends.CUDNN,
    attention_sdpa_backends.EFFICIENT,
    attention_varlen,
    attention_flex.FLEX,
    attention_flex.FLEX_WITH_MASK,
    attention_fa2,
    attention_fa3,
    attention_fa4,
    attention_xformers,
)
DTYPES_USED = {"cpu": ["fp32", "bf16"], "cuda": ["bf16", "fp16"]}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
FLOPS = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}  # two products forward, five backward
ORACLE_TOKENS = 1024  # of the samples that the oracle takes at once, where they are short
ORACLE_BYTES = 2 << 30  # float64 scores of one sample; beyond it one head is checked for all


@dataclass
class AttentionProblem:
    """q [T, H, D], k and v [T, G, D] on one device, and their gradient of the output."""

    case: str
    dtype: str
    layout: PackedLayout
    mask: AttentionMask | None
    q: Tensor
    k: Tensor
    v: Tensor
    grad_output: Tensor
    peers: tuple[Peer, ...] = PEERS
    directions: tuple[str, ...] = DIRECTIONS
    op: str = "attention"

    @functools.cached_property
    def plan(self) -> MaskPlan:
        return MaskPlan.lower(self.layout, self.mask)

    def implementations(self) -> Iterator[Implementation | Missing]:
        leaves = (self.q, self.k, self.v)

        def build(name: str, impl: str, extra: dict) -> Implementation:
            forward = functools.partial(attention, *leaves, layout=self.layout, mask=self.mask, impl=impl)
            return Implementation(name, forward, leaves, self.grad_output, extra=extra | self._pairs(impl))

        ours = list(our_rows("attention", self.q, build))
        yield from ours
        if attention_flex.FLEX_WITH_MASK in self.peers:
            yield from (self._with_mask(row) for row in ours if isinstance(row, Implementation) and "auto" in row.extra)
        yield from peer_rows(self, self.peers)
        yield from (Missing(peer.NAME, LEFT_OUT) for peer in PEERS if peer not in self.peers)

    def check(self, direction: str, results: list[Tensor]) -> str | None:
        expected, heads = self._expected
        if direction == "fwd":
            return close([results[0][:, heads]], expected[:1])
        return close([gradient[:, heads] for gradient in results], expected[1:])

    def work(self, direction: str) -> Work:
        """4 D FLOPs per visible pair and head, exactly the pairs the mask lets through."""
        flops = 4 * self.q.shape[1] * self.q.shape[2] * self.plan.visible_pairs
        return Work(flops * FLOPS[direction], "TFLOP/s", 12, f"gemm_{self.dtype}")

    def oracle(self, heads: slice = slice(None)) -> list[Tensor]:
        """Output and gradients of q, k and v by the float64 reference, of some heads (where H = G) or of all.

        A few samples at a time: the reference is dense in the tokens it is given.
        """
        results = []
        for first, last in self._groups():
            start, stop = (int(self.layout.host.cu_seqlens[i]) for i in (first, last))
            layout, mask = self._some(first, last)
            leaves = [x.detach()[start:stop, heads].double().requires_grad_() for x in (self.q, self.k, self.v)]
            output = attention(*leaves, layout=layout, mask=mask, impl="reference")
            gradients = torch.autograd.grad(output, leaves, self.grad_output[start:stop, heads].double())
            results.append((output.detach(), *gradients))
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    def with_new_layout(self) -> AttentionProblem:
        """The same problem on a layout that nothing has been lowered on yet."""
        return replace(self, layout=copy.copy(self.layout.host).to(self.q.device))

    def _with_mask(self, kept: Implementation) -> Implementation:
        """The row whose plan is kept, with all of it in the time: layout, mask plan and tiles, from host lengths."""
        samples, device = self._segments(0, self.layout.num_samples), self.q.device
        impl = kept.name.removeprefix(PREFIX)

        def forward() -> Tensor:
            layout = PackedLayout.from_segments(samples, num_modalities=self.layout.num_modalities)
            layout = layout.to(device, non_blocking=True)
            return attention(*kept.leaves, layout=layout, mask=self.mask, impl=impl)

        extra = {name: fact for name, fact in kept.extra.items() if name != "auto"} | MAKES_MASK
        directions = attention_flex.with_mask_directions(device)
        return replace(kept, name=f"{kept.name}_with_mask", forward=forward, extra=extra, directions=directions)

    @functools.cached_property
    def _expected(self) -> tuple[list[Tensor], slice]:
        scores = 8 * self.layout.max_seqlen**2 * self.q.shape[1]
        heads = slice(0, 1) if self.q.shape[1] == self.k.shape[1] and scores > ORACLE_BYTES else slice(None)
        return self.oracle(heads), heads

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Samples [first, last) that follow one another: one, or as many as have ORACLE_TOKENS together."""
        bounds = self.layout.host.cu_seqlens.tolist()
        first = 0
        for last in range(1, len(bounds)):
            if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > ORACLE_TOKENS:
                yield first, last
                first = last

    def _segments(self, first: int, last: int) -> list[list[tuple[int, int]]]:
        """(modality, length) of the segments of samples [first, last)."""
        own: list[list[tuple[int, int]]] = [[] for _ in range(last - first)]
        for sample, modality, length, _ in self.layout.host.segments:
            if first <= sample < last:
                own[int(sample) - first].append((int(modality), int(length)))
        return own

    def _some(self, first: int, last: int) -> tuple[PackedLayout, AttentionMask | None]:
        """Layout and mask of samples [first, last) by themselves."""
        own = self._segments(first, last)
        layout = PackedLayout.from_segments(own, num_modalities=self.layout.num_modalities)
        mask = self.mask
        if mask is not None and mask.prefix is not None:
            mask = replace(mask, prefix=mask.prefix[first:last])
        return layout.to(self.q.device), mask

    def _pairs(self, impl: str) -> dict[str, float]:
        pairs = attention_pairs.computed(self.plan, impl, self.q.dtype, self.q.shape[2])
        return {} if pairs is None else {"pairs_computed_over_visible": pairs / max(self.plan.visible_pairs, 1)}


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[Deferred]:
    for case in cases(shapes, device.type):
        short = shapes == "quick" and device.type == "cuda"
        # The GPU's own time of both is that of one and of the other: of a uniform batch it is not worth the third run.
        directions = DIRECTIONS[:2] if short and case.workload == "uniform" else DIRECTIONS
        yield deferred(case, device, seed, directions, shapes=shapes)


def more_problems(device: torch.device, seed: int) -> list[Deferred]:
    """What quick cases on a GPU leave out: other widths and fp32, and that third run."""
    both = [
        deferred(case, device, seed, DIRECTIONS[2:]) for case in cases("quick", "cuda") if case.workload == "uniform"
    ]
    return [*(deferred(case, device, seed) for case in CUDA_MORE), *both]


def deferred(
    case: Case,
    device: torch.device,
    seed: int,
    directions: tuple[str, ...] = DIRECTIONS,
    kind: type[AttentionProblem] = AttentionProblem,
    *,
    shapes: str = "quick",
) -> Deferred:
    """A problem that is drawn when its turn comes.  kind: AttentionProblem, or one of its kind."""
    peers = _peers(shapes, case, device.type)
    build = functools.partial(from_case, case, device, seed, peers, directions, kind)
    return Deferred(kind.op, name_of(case, seed), case.dtype, directions, build)


def _peers(shapes: str, case: Case, device_type: str) -> tuple[Peer, ...]:
    """All, but in quick cases those whose time would buy little.

    FlexAttention is compiled for each shape, half a minute: quick cases have it on a GPU alone, for masks that no
    kernel of others knows, of one batch.  There SDPA in a loop is hundreds of launches, and SDPA that pads or takes
    a dense mask goes where a batch needs it: cuDNN compiles a second for each form of a shape.
    """
    if shapes != "quick":
        return PEERS
    left_out: set[Peer] = set()
    plain = case.mask in ("full", "causal")
    if device_type == "cpu" or case.workload != "stamps" or case.mask not in MODALITY_MASKS:
        left_out |= {attention_flex.FLEX, attention_flex.FLEX_WITH_MASK}
    if device_type == "cuda":
        left_out.add(attention_sdpa_loop)
        left_out |= {attention_sdpa_dense} if plain else set()
        left_out |= {attention_sdpa_padded} if case.workload == "uniform" else set()
    return tuple(peer for peer in PEERS if peer not in left_out)


def from_case(
    case: Case,
    device: torch.device,
    seed: int,
    peers: tuple[Peer, ...] | None = None,
    directions: tuple[str, ...] = DIRECTIONS,
    kind: type[AttentionProblem] = AttentionProblem,
) -> AttentionProblem:
    """Random q, k and v for a case, in memory of their own.  peers None: those of a quick case."""
    peers = _peers("quick", case, device.type) if peers is None else peers
    layout = _layout(case, seed).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    total = layout.total_tokens

    def draw(count: int) -> Tensor:
        return torch.randn(total, count, case.width, generator=generator, device=device).to(DTYPES[case.dtype])

    q, k, v, grad_output = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    mask, name = MASKS[case.mask](layout), _name(case, layout)
    return kind(name, case.dtype, layout, mask, q, k, v, grad_output, peers, directions)


def _layout(case: Case, seed: int) -> PackedLayout:
    options = {} if case.length is None else {"length": case.length}
    return workloads.BY_NAME[case.workload](case.samples, seed, **options)


def name_of(case: Case, seed: int) -> str:
    """What the case's problem is called."""
    return _name(case, _layout(case, seed))


def _name(case: Case, layout: PackedLayout) -> str:
    grouped = "" if case.heads == case.kv_heads else f" G{case.kv_heads}"
    of_length = "" if case.length is None else f"x{case.length}"
    batch = f"{case.workload} {case.samples}{of_length} {case.mask} T{layout.total_tokens}"
    return f"{batch} H{case.heads}{grouped} D{case.width}"
