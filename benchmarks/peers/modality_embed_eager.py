"""The eager chain: embedding, position adds, cat, gather, modality add, LayerNorm.  Indices are built beforehand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation
from benchmarks.peers import row_index

NAME = "eager"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    layout, tensors = problem.layout, problem.tensors
    joint = row_index.joint_rows(layout)
    # Positions of each stream's rows, in the stream's own order: what eager code keeps beside its features.
    order = torch.argsort(joint)
    positions = layout.positions.long()[:, order].split(list(layout.stream_lengths), dim=1)
    modality = layout.modality_ids.long()
    position_weights = tensors.get("position_weights") or [None] * layout.num_modalities

    def forward():
        parts = []
        for m, stream in enumerate(problem.streams):
            rows = stream if stream.is_floating_point() else F.embedding(stream, tensors["token_weight"])
            tables = position_weights[m]
            tables = () if tables is None else tables if isinstance(tables, tuple) else (tables,)
            for axis, table in enumerate(tables, start=layout.axes - len(tables)):
                rows = rows + F.embedding(positions[m][axis], table)
            parts.append(rows)
        packed = torch.cat(parts).index_select(0, joint)
        packed = packed + F.embedding(modality, tensors["modality_weight"])
        if tensors["norm"] is None:
            return packed
        return F.layer_norm(packed, packed.shape[-1:], tensors["norm_weight"], tensors["norm_bias"])

    return Implementation(NAME, forward, problem.leaves, problem.grad_output)
