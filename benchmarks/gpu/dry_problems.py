"""Tiny problems on the CPU, one of each kind that the GPU will get: what `gpu --dry-run` times."""

from __future__ import annotations

from dataclasses import replace

import torch

CPU = torch.device("cpu")


def of(op: str) -> list:
    drawn = {"attention": _attention, "attention_more": _more, "modality_embed": _embed, "packing": _packing}
    return (drawn | {"train_step": _train_step})[op]()


def _attention() -> list:
    """One of each mask that the table on the GPU has: ragged, and uniform as in the published ones."""
    from benchmarks import attention as op

    cases = [op.Case("stamps", 3, mask, 2, 2, 32) for mask in ("isolated", "prefix", "bidirectional", "visible")]
    cases += [op.Case("uniform", 2, mask, 2, 2, 32, length=16) for mask in ("full", "causal")]
    return [op.from_case(case, CPU, 0) for case in cases]


def _more() -> list:
    """Short samples in several tiles, and forward and backward in one."""
    from benchmarks import attention as op
    from benchmarks import attention_tiles

    case = op.Case("uniform", 2, "full", 2, 2, 64, length=16)
    return [*attention_tiles.problems(CPU, 0, [case]), op.deferred(case, CPU, 0, op.DIRECTIONS[2:])]


def _embed() -> list:
    """Without the compiled peer, which needs half a minute to compile on a CPU."""
    from benchmarks import modality_embed as op

    found = [op.build(form, "stamps", 3, 24, "fp32", CPU, 0) for form in ("plain", "full")]
    return [replace(problem, peers=(op.modality_embed_eager,)) for problem in found]


def _packing() -> list:
    from benchmarks import packing as op

    return [op.build(function, "stamps", 3, 24, "bf16", CPU, 0) for function in op.FUNCTIONS]


def _train_step() -> list:
    from benchmarks import train_step as op

    case = op.Case("tiny", "longtail", 4, batches=1, buckets=(1, 1), every_peer=False)
    return [op.build(case, CPU, 0)]
