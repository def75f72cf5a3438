"""The usual torch ways to move ragged rows; index tensors and lists of bounds are built before the clock starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Implementation
from benchmarks.peers import row_index

NAME = "torch"


def missing(problem) -> str | None:
    return None


def build(problem) -> Iterator[Implementation]:
    """torch.cat of views and index_select for pack; index_select, or segment_reduce, for the others."""
    layout, packed = problem.layout, problem.packed
    places, grad_output = problem.leaves, problem.grad_output
    if problem.function == "pack":
        segments = layout.segments.tolist()

        def cat_views():
            return torch.cat([problem.streams[m][row : row + length] for _, m, length, row in segments])

        joint = row_index.joint_rows(layout)
        yield Implementation("torch.cat", cat_views, places, grad_output)
        yield Implementation(
            "cat+index_select", lambda: torch.cat(problem.streams).index_select(0, joint), places, grad_output
        )
    elif problem.function == "unpack":
        order = torch.argsort(row_index.joint_rows(layout)).split(list(layout.stream_lengths))
        yield Implementation("index_select", lambda: [packed.index_select(0, rows) for rows in order])
    elif problem.function == "gather_rows":
        yield Implementation("index_select", lambda: packed.index_select(0, problem.rows), places, grad_output)
    else:
        lengths = torch.from_numpy(layout.segments[:, 2].copy()).long().to(packed.device)
        yield Implementation(
            "segment_reduce", lambda: torch.segment_reduce(packed, "mean", lengths=lengths), places, grad_output
        )
