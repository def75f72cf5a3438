"""The eager chain by stream with Liger's fused LayerNorm, where liger-kernel is installed and there is a GPU."""

from __future__ import annotations

import functools

from benchmarks.harness import Implementation
from benchmarks.peers import modality_embed_eager
from benchmarks.peers.packed import installed

NAME = "liger"


def missing(problem) -> str | None:
    if problem.grad_output.device.type != "cuda":
        return "runs on CUDA devices only"
    if problem.tensors["norm"] is None:
        return "is the eager chain where there is no norm"
    return None if installed("liger_kernel") else "not installed"


def build(problem) -> Implementation:
    from liger_kernel.transformers.functional import liger_layer_norm

    def layer_norm(x, shape, weight, bias):
        return liger_layer_norm(x, weight, bias, 1e-5)

    arguments = modality_embed_eager.arguments(problem)
    forward = functools.partial(modality_embed_eager.chain, *arguments, layer_norm=layer_norm)
    return Implementation(NAME, forward, problem.leaves, problem.grad_output)
