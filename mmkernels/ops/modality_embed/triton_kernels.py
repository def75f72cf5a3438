"""Modality embedding by Triton: launches the kernels of triton_forward and triton_backward.   T tokens, E width.

Position tables are joined into one [P, E] (a few MB at most, against T x E), token ids stay where they are.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.ops.modality_embed import configs
from mmkernels.ops.modality_embed.inputs import Inputs, Options
from mmkernels.ops.modality_embed.triton_backward import (
    modality_embed_bwd_rows_kernel,
    modality_embed_bwd_spans_kernel,
    modality_embed_bwd_tables_kernel,
)
from mmkernels.ops.modality_embed.triton_forward import MAX_MODALITIES, modality_embed_fwd_kernel


def forward(inputs: Inputs, options: Options, out_dtype: torch.dtype):
    """As in reference.forward.  At most eight modalities."""
    norm, eps = _supported(options, inputs)
    (T,), E = inputs.modality_ids.shape, inputs.modality_weight.shape[1]
    out = inputs.modality_weight.new_empty((T, E), dtype=out_dtype)
    mean, rstd = (inputs.modality_weight.new_empty(T if norm != "none" else 0, dtype=torch.float32) for _ in range(2))
    if T == 0 or E == 0:
        return out, mean, rstd
    config = configs.forward(E)
    pointers, kinds = _streams(inputs.streams, read=True)
    joint, offsets = _joined(inputs.tables, inputs.table_counts)
    modality_embed_fwd_kernel[(triton.cdiv(T, config.rows),)](
        *pointers,
        inputs.modality_weight.contiguous(),
        _contiguous(inputs.token_weight),
        joint,
        _contiguous(inputs.norm_weight),
        _contiguous(inputs.norm_bias),
        inputs.modality_ids.contiguous(),
        inputs.source_rows.contiguous(),
        inputs.positions.contiguous(),
        out,
        mean if norm != "none" else None,
        rstd if norm != "none" else None,
        T,
        E,
        eps,
        M=len(inputs.streams),
        A=inputs.positions.shape[0],
        STREAMS=kinds,
        TABLES=offsets,
        ROWS=config.rows,
        BLOCK_E=triton.next_power_of_2(E),
        num_warps=config.warps,
    )
    return out, mean, rstd


def backward(grad_out: Tensor, inputs: Inputs, options: Options, mean: Tensor, rstd: Tensor, needs: list[bool]):
    """As in reference.backward."""
    norm, _ = _supported(options, inputs)
    M, P, (T, E) = len(inputs.streams), len(inputs.tables), grad_out.shape
    need_streams, need_modality, need_token = needs[:M], needs[M], needs[M + 1]
    need_tables, need_norm = needs[M + 2 : M + 2 + P], needs[-2] or needs[-1]
    keyed = need_token or any(need_tables)
    normed = norm != "none"
    pointers, kinds = _streams(inputs.streams, read=normed)
    joint, offsets = _joined(inputs.tables, inputs.table_counts)
    config = configs.backward(E, T)
    programs = triton.cdiv(T, config.rows)
    fp32 = {"dtype": torch.float32}
    d_streams = [s.new_empty(s.shape) if n else None for s, n in zip(inputs.streams, need_streams, strict=True)]
    norm_partial = grad_out.new_empty((programs, 2, E), **fp32) if need_norm else None
    modality_partial = grad_out.new_zeros((programs, M, E), **fp32) if need_modality else None
    dx = grad_out.new_empty((T, E), **fp32) if keyed else None
    slots = len(offsets) // M
    keys = inputs.modality_ids.new_empty((slots + 1, T), dtype=torch.int32) if keyed else None
    if T and E:
        modality_embed_bwd_rows_kernel[(programs,)](
            grad_out.contiguous(),
            *pointers,
            inputs.modality_weight.contiguous(),
            _contiguous(inputs.token_weight),
            joint,
            _contiguous(inputs.norm_weight),
            inputs.modality_ids.contiguous(),
            inputs.source_rows.contiguous(),
            inputs.positions.contiguous(),
            mean if normed else None,
            rstd if normed else None,
            *_padded(d_streams),
            norm_partial,
            modality_partial,
            dx,
            keys,
            T,
            E,
            M=M,
            A=inputs.positions.shape[0],
            STREAMS=kinds,
            TABLES=offsets,
            ROWS=config.rows,
            BLOCK_E=triton.next_power_of_2(E),
            num_warps=config.warps,
        )

    # Sums over programs: torch.sum adds in an order that depends on the shape alone.
    d_norm = norm_partial.sum(0) if need_norm else (None, None)
    d_modality = modality_partial.sum(0) if need_modality else None
    d_token = grad_out.new_zeros(inputs.token_weight.shape, **fp32) if need_token else None
    if need_token:
        _sum_by_key(dx, keys[slots], d_token)
    d_tables = [None] * P
    if any(need_tables):
        d_joint = grad_out.new_zeros((sum(t.shape[0] for t in inputs.tables), E), **fp32)
        for q in range(slots):  # a table belongs to one axis, so no table row is written twice
            _sum_by_key(dx, keys[q], d_joint)
        d_tables = [d.clone() for d in d_joint.split([t.shape[0] for t in inputs.tables])]

    def finish(value: Tensor | None, like: Tensor | None, needed: bool) -> Tensor:
        return value.to(like.dtype) if needed else grad_out.new_empty(0)

    return (
        [finish(d, s, n) for d, s, n in zip(d_streams, inputs.streams, need_streams, strict=True)],
        finish(d_modality, inputs.modality_weight, need_modality),
        finish(d_token, inputs.token_weight, need_token),
        [finish(d, t, n) for d, t, n in zip(d_tables, inputs.tables, need_tables, strict=True)],
        finish(d_norm[0], inputs.norm_weight, needs[-2]),
        finish(d_norm[1], inputs.norm_bias, needs[-1]),
    )


def _supported(options: Options, inputs: Inputs) -> tuple[str, float]:
    if options.norm == "rmsnorm" or inputs.rng is not None:
        raise NotImplementedError("modality_embed: RMSNorm and dropout have no Triton kernel yet (issue 5)")
    return options.norm, options.eps


def _sum_by_key(dx: Tensor, keys: Tensor, table: Tensor) -> None:
    """table[k] = sum of dx[t] over t with keys[t] == k, for every k that occurs.  Deterministic; never syncs."""
    T, E = dx.shape
    if T == 0 or E == 0:
        return
    keys, order = keys.sort(stable=True)
    block = min(configs.TABLE_BLOCK_E, triton.next_power_of_2(E))
    grid = (triton.cdiv(T, configs.CHUNK), triton.cdiv(E, block))
    head, tail = (dx.new_empty((grid[0], E)) for _ in range(2))
    sizes = {"CHUNK": configs.CHUNK, "BLOCK_E": block, "num_warps": 4}
    modality_embed_bwd_tables_kernel[grid](dx, order, keys, table, head, tail, T, E, **sizes)
    modality_embed_bwd_spans_kernel[grid](keys, table, head, tail, T, E, **sizes)


def _streams(streams: list[Tensor], *, read: bool) -> tuple[tuple, tuple[int, ...]]:
    """Eight pointers (None where a modality has no rows) and what each is: 0 nothing, 1 floats, 2 ids."""
    if len(streams) > MAX_MODALITIES:
        raise NotImplementedError(
            f"modality_embed: the Triton kernels take at most {MAX_MODALITIES} modalities, not {len(streams)} (issue 5)"
        )
    floats = [s for s in streams if s.is_floating_point() and s.numel()]
    common = floats[0].dtype if floats else None
    if len({s.dtype for s in floats}) > 1:  # under autocast; one pointer type serves all rows
        common = torch.float32
    found, kinds = [], []
    for stream in streams:
        ids = not stream.is_floating_point()
        kinds.append((2 if ids else 1) if stream.numel() else 0)
        if not kinds[-1]:
            found.append(None)
        elif ids:
            found.append(stream.contiguous())
        else:  # without a norm backward gets stand-ins, and does not read them
            found.append(stream.to(common).contiguous() if read else stream)
    return _padded(found), tuple(kinds)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padded(tensors: list) -> tuple:
    """Eight of them; those without elements are None, like those that are not there."""
    kept = [t if t is not None and t.numel() else None for t in tensors]
    return tuple(kept + [None] * (MAX_MODALITIES - len(kept)))


def _joined(tables: list[Tensor], table_counts: list[int]) -> tuple[Tensor | None, tuple[int, ...]]:
    """All position tables as one, and where each begins: [q * M + m] for modality m's q-th last axis, -1 for none."""
    M, slots = len(table_counts), max(table_counts, default=0)
    offsets, first, index = [-1] * (slots * M), 0, 0
    for m, count in enumerate(table_counts):
        for j in range(count):
            offsets[(count - 1 - j) * M + m] = first
            first += tables[index].shape[0]
            index += 1
    if not tables:
        return None, ()
    return (torch.cat(tables) if len(tables) > 1 else tables[0].contiguous()), tuple(offsets)
