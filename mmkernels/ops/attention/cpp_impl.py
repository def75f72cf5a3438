"""Packed attention by the C++ extension: one call of csrc/cpu/attention.cpp each way.   Tq, Tk tokens, D head width.

Forward walks the planner's query tiles; backward takes whole samples, cut by the C++ where there are too few of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mmkernels import native
from mmkernels.ops.attention.inputs import Lowered
from mmkernels.philox import threshold

native.load_cpu_ops()  # before the schemas, which a second try could not define again; it implements them
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? pair_bias, Tensor? rng"
_MASK = "float scale, bool has_visible, float dropout_p, int threshold"
torch.library.define(
    "mm_cpp::attention_fwd",
    f"({_INPUTS}, Tensor q_table, Tensor k_table, Tensor tiles, Tensor spans, {_MASK}, "
    "Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? mass) -> ()",
)
torch.library.define(
    "mm_cpp::attention_bwd",
    f"(Tensor do, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, Tensor q_table, Tensor k_table, Tensor samples, "
    f"{_MASK}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias) -> ()",
)
torch.library.define("mm_cpp::attention_terms", "(Tensor like) -> int")
run_forward, run_backward = torch.ops.mm_cpp.attention_fwd.default, torch.ops.mm_cpp.attention_bwd.default

SPAN_COLS = 64


def vector_terms(dtype: torch.dtype = torch.float32) -> int | None:
    """Numbers that a vector of this CPU's products takes: 16 with AVX-512, 8 with AVX2, else 4.

    For bf16 32 with AVX512_BF16; elsewhere it is widened to fp32 first, as fp16 always is.
    None where the extension is of a version that does not say.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mm_cpp::attention_terms", "CPU"):
        return None
    return torch.ops.mm_cpp.attention_terms(torch.empty(0, dtype=dtype, device="cpu"))


def tile_rows(head_dim: int, longest: int) -> int:
    """Queries of a forward tile: many, since each packs K and V, but few enough for the second-level cache.

    The longest sample falls into equal ones, so that the threads of a lonely sample end together.
    """
    most = 256 if head_dim <= 64 else 192 if head_dim <= 128 else 96
    return most if longest <= most else math.ceil(longest / math.ceil(longest / most))


def schedule(plan, request) -> tuple:
    """Query tiles and spans of the forward, samples [B, 4] of the backward, three empty tensors, no configuration."""
    tiles = plan.tiles("query", tile_rows(request.head_dim, plan.layout.max_seqlen), SPAN_COLS)
    empty = plan.q_table[0, :0]
    samples = _samples(plan) if request.needs_backward else empty
    return tiles.tiles, tiles.spans, empty, empty, samples, empty, []


def attention_fwd(q, k, v, pair_bias, rng, out, lse, mass, lowered) -> None:
    """Fills out [Tq, H, D], lse [H, Tq] and, where it is not None, mass [Tq, H, Mk]."""
    forward, _ = arguments(lowered)
    run_forward(q, k, v, pair_bias, rng, *forward, out, lse, mass)


def attention_bwd(do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, dbias, lowered) -> None:
    """Fills dq [Tq, H, D], dk and dv [Tk, G, D] and, where it is not None, dbias [H, Mq, Mk]."""
    _, backward = arguments(lowered)
    run_backward(do, dlse, q, k, v, pair_bias, rng, out, lse, *backward, dq, dk, dv, dbias)


def arguments(lowered: Lowered) -> tuple[tuple, tuple]:
    """What the C++ forward takes between rng and out, and the backward between lse and dq."""
    tables = lowered.q_table, lowered.k_table
    mask = lowered.scale, lowered.has_visible, lowered.dropout_p, threshold(lowered.dropout_p)
    return (*tables, lowered.fwd_tiles, lowered.fwd_spans, *mask), (*tables, lowered.dkdv_tiles, *mask)


def _samples(plan) -> Tensor:
    """int32 [B, 4]: first query, last (exclusive), first key, last (exclusive); most pairs first."""
    found = plan.cache.get("cpp_samples")  # the same for every dtype and width
    if found is None:
        queries, keys = (side.cu_seqlens.numpy() for side in (plan.layout, plan.k_layout))
        lengths = np.diff(queries).astype(np.int64) * np.diff(keys)
        table = np.stack([queries[:-1], queries[1:], keys[:-1], keys[1:]], 1)
        found = torch.from_numpy(np.ascontiguousarray(table[np.argsort(-lengths, kind="stable")], np.int32))
        plan.cache["cpp_samples"] = found
    return found
