"""The usual torch ways to move ragged rows; index tensors and lists of bounds are built before the clock starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Implementation, Missing
from benchmarks.peers import row_index

NAME = "torch"
LARGEST_SLICED = 8 << 30  # bytes that the gradients of all slices may take together


def missing(problem) -> str | None:
    return None


def build(problem) -> Iterator[Implementation | Missing]:
    """torch.cat of views and index_select for pack; index_select, or segment_reduce, for the others."""
    layout, packed = problem.layout, problem.packed
    places, grad_output = problem.leaves, problem.grad_output
    if problem.function in ("pack", "pack_out"):
        yield from _pack(problem)
    elif problem.function == "unpack":
        order = torch.argsort(row_index.joint_rows(layout)).split(list(layout.stream_lengths))
        yield Implementation("index_select", lambda: [packed.index_select(0, rows) for rows in order])
    elif problem.function == "gather_rows":
        yield Implementation("index_select", lambda: packed.index_select(0, problem.rows), places, grad_output)
    elif problem.function == "segment_mean":
        lengths = torch.from_numpy(layout.segments[:, 2].copy()).long().to(packed.device)
        yield Implementation(
            "segment_reduce", lambda: torch.segment_reduce(packed, "mean", lengths=lengths), places, grad_output
        )


def _pack(problem) -> Iterator[Implementation | Missing]:
    """Joint: the streams lie in one tensor before the clock starts, which spares a peer the concatenation."""
    views = row_index.segment_views(problem.streams, problem.layout)
    rows = row_index.joint_rows(problem.layout)
    joint = torch.cat([stream.detach() for stream in problem.streams])
    if problem.function == "pack_out":
        out = torch.zeros_like(joint)
        yield Implementation("torch.cat(out=)", lambda: torch.cat(views(), out=out))
        yield Implementation("joint index_select(out=)", lambda: torch.index_select(joint, 0, rows, out=out))
        return
    places, grad_output = problem.leaves, problem.grad_output
    slow = problem.layout.num_segments * joint.nbytes > LARGEST_SLICED
    directions = ("fwd",) if slow else ("fwd", "bwd")
    yield Implementation("torch.cat", lambda: torch.cat(views()), places, grad_output, directions=directions)
    if slow:
        yield Missing("torch.cat", "backward makes a whole gradient for each slice: a minute for one call", ("bwd",))
    yield Implementation(
        "cat+index_select", lambda: torch.cat(problem.streams).index_select(0, rows), places, grad_output
    )
    yield Implementation("joint index_select", lambda: joint.index_select(0, rows), directions=("fwd",))
