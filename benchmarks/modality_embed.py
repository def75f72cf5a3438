"""modality_embed problems: ragged streams in, packed encoder input out.   T tokens, E width, M modalities, N_m rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.harness import Implementation, Missing, Work, close
from benchmarks.limits import DTYPES
from benchmarks.ours import our_rows
from benchmarks.peers import (
    modality_embed_compiled,
    modality_embed_eager,
    modality_embed_eager_streams,
    modality_embed_liger,
    peer_rows,
)
from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed.api import modality_embed

PEERS: tuple[ModuleType, ...] = (
    modality_embed_eager,
    modality_embed_eager_streams,
    modality_embed_compiled,
    modality_embed_liger,
)

VOCABULARY = 4096
TEXT_POSITIONS, GRID_SIDE, AUDIO_POSITIONS = 512, 64, 512


@dataclass
class EmbedProblem:
    """tensors: what modality_embed takes, by argument name; streams[0] may be token ids."""

    case: str
    dtype: str
    layout: PackedLayout
    streams: list[Tensor]
    tensors: dict[str, Any]
    grad_output: Tensor
    peers: tuple[ModuleType, ...] = PEERS
    op: str = "modality_embed"
    directions: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd")
    quick: bool = False

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        return [x for x in flat(self.streams, self.tensors) if x.is_floating_point()]

    def implementations(self) -> Iterator[Implementation | Missing]:
        def build(name: str, impl: str, extra: dict) -> Implementation:
            forward = functools.partial(modality_embed, self.streams, self.layout, **self.tensors, impl=impl)
            return Implementation(name, forward, self.leaves, self.grad_output, extra=extra)

        yield from our_rows("modality_embed", self.grad_output, build)
        yield from peer_rows(self, self.peers)

    def check(self, direction: str, results: list[Tensor]) -> str | None:
        return close(results, self._expected[:1] if direction == "fwd" else self._expected[1:])

    def work(self, direction: str) -> Work:
        """Bytes: each input read once, each output written once.  Of the token table only the rows looked up count.

        Backward reads the output's gradient and, where there is a norm, the inputs again; it writes every gradient.
        """
        if direction == "fwd+bwd":
            return replace(self.work("fwd"), amount=self.work("fwd").amount + self.work("bwd").amount)
        token_weight = self.tensors.get("token_weight")
        tables = sum(x.nbytes for x in self.leaves if x is not token_weight)
        if token_weight is not None:
            tables += min(len(self.streams[0]), len(token_weight)) * token_weight[0].nbytes
        ids = self.streams[0].nbytes if token_weight is not None else 0
        host = self.layout.host
        places = host.source_rows.nbytes + host.modality_ids.nbytes
        places += host.positions.nbytes if "position_weights" in self.tensors else 0
        amount = tables + ids + places + self.grad_output.nbytes
        if direction == "bwd":
            amount += tables if self.tensors["norm"] is not None else 0
            if token_weight is not None:  # its gradient is written whole, zeros too
                amount += token_weight.nbytes - min(len(self.streams[0]), len(token_weight)) * token_weight[0].nbytes
        return Work(amount, "GB/s", 9, "copy")

    def oracle(self) -> list[Tensor]:
        """Output and gradients of the leaves by the float64 reference."""
        streams, tensors = map_floats(lambda x: x.detach().double().requires_grad_(), self.streams, self.tensors)
        output = modality_embed(streams, self.layout, **tensors, impl="reference")
        leaves = [x for x in flat(streams, tensors) if x.is_floating_point()]
        return [output.detach(), *torch.autograd.grad(output, leaves, self.grad_output.double())]

    def with_new_layout(self) -> EmbedProblem:
        """The same problem on a layout that nothing has been derived from yet."""
        return replace(self, layout=copy.copy(self.layout.host).to(self.grad_output.device))

    @functools.cached_property
    def _expected(self) -> list[Tensor]:
        return self.oracle()


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[EmbedProblem]:
    for workload, samples, width, dtypes in _cases(shapes, device.type):
        for form in ("plain", "full"):
            for dtype in dtypes:
                yield replace(build(form, workload, samples, width, dtype, device, seed), quick=shapes == "quick")


def build(form, workload, samples, width, dtype, device, seed) -> EmbedProblem:
    """form "plain": x + W_m on three float streams; "full": token ids, positions and LayerNorm."""
    layout = workloads.BY_NAME[workload](samples, seed).to(device)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(DTYPES[dtype]).requires_grad_()

    streams: list[Tensor] = [draw(rows, width) for rows in layout.stream_lengths]
    tensors: dict[str, Any] = {"modality_weight": draw(layout.num_modalities, width), "norm": None}
    if form == "full":
        rows = layout.stream_lengths[workloads.TEXT]
        streams[workloads.TEXT] = torch.randint(VOCABULARY, (rows,), generator=generator, device=device)
        tensors |= {
            "token_weight": draw(VOCABULARY, width),
            "position_weights": [
                draw(TEXT_POSITIONS, width),
                (draw(GRID_SIDE, width), draw(GRID_SIDE, width)),
                draw(AUDIO_POSITIONS, width),
            ],
            "norm": "layernorm",
            "norm_weight": draw(width),
            "norm_bias": draw(width),
        }
    grad_output = draw(layout.total_tokens, width).detach()
    case = f"{workload} {samples} {form} T{layout.total_tokens} E{width}"
    return EmbedProblem(case, dtype, layout, streams, tensors, grad_output)


def flat(streams: list[Tensor], tensors: dict[str, Any]) -> list[Tensor]:
    """All tensors, always in the same order."""
    found = list(streams)
    for value in tensors.values():
        for part in value if isinstance(value, list) else [value]:
            found += [x for x in (part if isinstance(part, tuple) else (part,)) if isinstance(x, Tensor)]
    return found


def map_floats(change, streams: list[Tensor], tensors: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """The same structure with change applied to every float tensor."""

    def apply(value):
        if isinstance(value, (list, tuple)):
            return type(value)(apply(part) for part in value)
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return apply(streams), {name: apply(value) for name, value in tensors.items()}


def _cases(shapes: str, device: str) -> list[tuple]:
    """(workload, samples, width, dtypes); quick is a part of full."""
    if device == "cpu":
        cases = [("stamps", 32, 256, ["fp32"]), ("native", 32, 256, ["fp32"])]
        return cases if shapes == "quick" else [*cases, ("native", 64, 768, ["fp32"]), ("stamps", 256, 768, ["fp32"])]
    # 72 and 85 thousand tokens: the launch is small beside what they move
    cases = [("stamps", 1024, 768, ["bf16"]), ("native", 256, 768, ["bf16"])]
    if shapes == "quick":
        return cases
    return [*cases, ("native", 256, 1024, ["bf16", "fp32"]), ("stamps", 512, 256, ["bf16"])]
