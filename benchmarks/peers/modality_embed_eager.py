"""The eager chain: embedding, position adds, cat, gather, modality add, LayerNorm.  Indices are built beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Implementation
from benchmarks.peers import row_index

NAME = "eager"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    forward = functools.partial(chain, *arguments(problem), modality=problem.layout.modality_ids.long())
    return Implementation(NAME, forward, problem.leaves, problem.grad_output)


def chain(
    streams: list[Tensor],
    tables: list[list[Tensor]],
    positions: list[list[Tensor]],
    joint: Tensor,
    token_weight: Tensor | None,
    modality_weight: Tensor,
    norm: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_norm: Callable = F.layer_norm,
    modality: Tensor | None = None,
) -> Tensor:
    """tables, positions: per modality.  modality: of each packed token; None to add its row to a stream as a whole.

    A function of its tensors alone: torch.compile can keep what it made.
    """
    parts = []
    rows_of = modality_weight.unbind()
    for stream, own_tables, own_positions, own_row in zip(streams, tables, positions, rows_of, strict=True):
        rows = stream if stream.is_floating_point() else F.embedding(stream, token_weight)
        for table, position in zip(own_tables, own_positions, strict=True):
            rows = rows + F.embedding(position, table)
        parts.append(rows + own_row if modality is None else rows)
    packed = torch.cat(parts).index_select(0, joint)
    if modality is not None:
        packed = packed + F.embedding(modality, modality_weight)
    return layer_norm(packed, packed.shape[-1:], norm_weight, norm_bias) if norm else packed


def arguments(problem) -> tuple:
    """Of `chain`: positions of each stream's rows in the stream's own order, as eager code keeps them."""
    layout, tensors = problem.layout, problem.tensors
    joint = row_index.joint_rows(layout)
    order = torch.argsort(joint)
    in_order = layout.positions.long()[:, order].split(list(layout.stream_lengths), dim=1)
    tables, positions = [], []
    for m, entry in enumerate(tensors.get("position_weights") or [None] * layout.num_modalities):
        tables.append([] if entry is None else list(entry) if isinstance(entry, tuple) else [entry])
        axes = range(layout.axes - len(tables[m]), layout.axes)
        positions.append([in_order[m][axis].contiguous() for axis in axes])
    return (
        problem.streams,
        tables,
        positions,
        joint,
        tensors.get("token_weight"),
        tensors["modality_weight"],
        tensors["norm"] is not None,
        tensors.get("norm_weight"),
        tensors.get("norm_bias"),
    )
