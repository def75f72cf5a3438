"""Attention problems: packed ragged batches, several masks.   T tokens, H heads, G key/value heads, D head width."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.harness import Implementation, Missing, Work, close
from benchmarks.limits import DTYPES
from benchmarks.ours import our_impls
from benchmarks.peers import attention_sdpa_loop, attention_sdpa_padded
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.ops.attention.api import attention

PEERS: tuple[ModuleType, ...] = (attention_sdpa_padded, attention_sdpa_loop)
DTYPES_USED = {"cpu": ["fp32"], "cuda": ["bf16", "fp16"]}

MASKS = {
    "full": None,
    "causal": AttentionMask(causal=True),
    # three unimodal encoders in one pass
    "isolated": AttentionMask.isolated(3),
    # causal text with image segments that see themselves whole, as in multimodal prefix-LMs
    "bidirectional": AttentionMask(causal=True, bidirectional=(workloads.IMAGE,)),
}
BACKWARD_FLOPS = 2.5  # five products to the forward's two
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
    peers: tuple[ModuleType, ...] = PEERS
    op: str = "attention"
    directions: tuple[str, ...] = ("fwd", "bwd")

    @functools.cached_property
    def plan(self) -> MaskPlan:
        return MaskPlan.lower(self.layout, self.mask)

    def implementations(self) -> Iterator[Implementation | Missing]:
        leaves = (self.q, self.k, self.v)
        for name, impl in our_impls("attention", self.q.device, self.q.dtype):
            if isinstance(impl, Missing):
                yield impl
                continue
            forward = functools.partial(attention, *leaves, layout=self.layout, mask=self.mask, impl=impl)
            yield Implementation(name, forward, leaves, self.grad_output)
        for peer in self.peers:
            reason = peer.missing(self)
            yield Missing(peer.NAME, reason) if reason else peer.build(self)

    def check(self, direction: str, results: list[Tensor]) -> str | None:
        expected, heads = self._expected
        if direction == "fwd":
            return close([results[0][:, heads]], expected[:1])
        return close([gradient[:, heads] for gradient in results], expected[1:])

    def work(self, direction: str) -> Work:
        """4 D FLOPs per visible pair and head, exactly the pairs the mask lets through."""
        flops = 4 * self.q.shape[1] * self.q.shape[2] * self.plan.visible_pairs
        return Work(flops * (BACKWARD_FLOPS if direction == "bwd" else 1), "TFLOP/s", 12, f"gemm_{self.dtype}")

    def oracle(self, heads: slice = slice(None)) -> list[Tensor]:
        """Output and gradients of q, k and v by the float64 reference, of some heads (where H = G) or of all."""
        leaves = [x.detach()[:, heads].double().requires_grad_() for x in (self.q, self.k, self.v)]
        output = attention(*leaves, layout=self.layout, mask=self.mask, impl="reference")
        gradients = torch.autograd.grad(output, leaves, self.grad_output[:, heads].double())
        return [output.detach(), *gradients]

    def with_new_layout(self) -> AttentionProblem:
        """The same problem on a layout that nothing has been lowered on yet."""
        return replace(self, layout=copy.copy(self.layout.host).to(self.q.device))

    @functools.cached_property
    def _expected(self) -> tuple[list[Tensor], slice]:
        scores = 8 * self.layout.max_seqlen**2 * self.q.shape[1]
        heads = slice(0, 1) if self.q.shape[1] == self.k.shape[1] and scores > ORACLE_BYTES else slice(None)
        return self.oracle(heads), heads


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[AttentionProblem]:
    for workload, samples, masks, (heads, kv_heads, width), dtypes in _cases(shapes, device.type):
        for mask in masks:
            for dtype in dtypes:
                yield build(workload, samples, mask, heads, kv_heads, width, dtype, device, seed)


def build(workload, samples, mask, heads, kv_heads, width, dtype, device, seed) -> AttentionProblem:
    layout = workloads.BY_NAME[workload](samples, seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    total = layout.total_tokens

    def draw(count: int) -> Tensor:
        return torch.randn(total, count, width, generator=generator).to(device, DTYPES[dtype])

    q, k, v, grad_output = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    grouped = "" if heads == kv_heads else f" G{kv_heads}"
    case = f"{workload} {samples} {mask} T{total} H{heads}{grouped} D{width}"
    for leaf in (q, k, v):
        leaf.requires_grad_()
    return AttentionProblem(case, dtype, layout, MASKS[mask], q, k, v, grad_output)


def _cases(shapes: str, device: str) -> list[tuple]:
    """(workload, samples, masks, (H, G, D), dtypes); quick is a part of full."""
    if device == "cpu":
        cases = [
            ("stamps", 32, ["full", "isolated"], (4, 4, 64), ["fp32"]),
            ("native", 6, ["full"], (4, 4, 64), ["fp32"]),
            ("longtail", 6, ["causal"], (4, 4, 64), ["fp32"]),
        ]
        if shapes == "full":
            cases += [
                ("native", 16, ["full", "isolated", "bidirectional"], (12, 12, 64), ["fp32"]),
                ("uniform", 8, ["full", "causal"], (8, 8, 128), ["fp32"]),
                ("uniform", 8, ["full"], (8, 2, 64), ["fp32"]),
            ]
        return cases
    cases = [
        ("stamps", 256, ["full", "isolated"], (12, 12, 64), ["bf16"]),
        ("uniform", 32, ["full", "causal"], (16, 16, 64), ["bf16"]),
        ("uniform", 32, ["full"], (16, 16, 128), ["bf16"]),
        ("longtail", 32, ["causal"], (16, 16, 64), ["bf16"]),
        ("native", 64, ["bidirectional"], (12, 12, 64), ["bf16"]),
    ]
    if shapes == "full":
        cases += [
            ("native", 64, ["full", "isolated"], (12, 12, 64), ["bf16", "fp16"]),
            ("longtail", 32, ["full", "causal"], (16, 16, 128), ["bf16"]),
            ("uniform", 32, ["full"], (32, 8, 128), ["bf16"]),
        ]
    return cases
