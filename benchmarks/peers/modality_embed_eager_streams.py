"""The eager chain by stream: a modality's row is added to its stream as a whole, before the streams are joined.

A look-up for each packed token, with its gradient, takes longer.
"""

from __future__ import annotations

import functools

from benchmarks.harness import Implementation
from benchmarks.peers import modality_embed_eager

NAME = "eager, by stream"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    forward = functools.partial(modality_embed_eager.chain, *modality_embed_eager.arguments(problem))
    return Implementation(NAME, forward, problem.leaves, problem.grad_output)
