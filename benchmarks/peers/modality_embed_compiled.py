"""torch.compile of the eager chain by stream.  Shapes are dynamic: one compilation serves every batch of a form."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator

import torch
import torch._functorch.config

from benchmarks.harness import LEFT_OUT, Implementation, Missing
from benchmarks.peers import modality_embed_eager

NAME = "compiled"


def missing(problem) -> str | None:
    if problem.grad_output.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile needs a C++ compiler (g++ or clang++) on CPU"
    return None


def build(problem) -> Iterator[Implementation | Missing]:
    forward = functools.partial(_compiled(), *modality_embed_eager.arguments(problem))
    directions = problem.directions
    if problem.quick and problem.grad_output.device.type == "cpu":
        # A compilation takes ten seconds or more; the quick run makes do with the one that trains.
        directions = ("fwd+bwd",)
        yield Missing(NAME, LEFT_OUT, ("fwd", "bwd"))
    yield Implementation(NAME, forward, problem.leaves, problem.grad_output, directions=directions)


@functools.cache
def _compiled():
    # The harness times backward alone by going through one graph again, which donated buffers do not allow.
    torch._functorch.config.donated_buffer = False
    return torch.compile(modality_embed_eager.chain, dynamic=True)
