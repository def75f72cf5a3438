"""Modality embedding by Triton: launches the kernels of triton_forward and triton_backward.   T tokens, E width."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.devices import on_device
from mmkernels.ops.modality_embed import configs
from mmkernels.ops.modality_embed.inputs import NORM_CODES, Inputs, Options
from mmkernels.ops.modality_embed.triton_backward import (
    modality_embed_bwd_rows_kernel,
    modality_embed_bwd_spans_kernel,
    modality_embed_bwd_tables_kernel,
    modality_embed_bwd_walks_kernel,
)
from mmkernels.ops.modality_embed.triton_forward import modality_embed_fwd_kernel
from mmkernels.philox import threshold


def forward(inputs: Inputs, options: Options, out_dtype: torch.dtype):
    """As in reference.forward."""
    (T,), E = inputs.modality_ids.shape, inputs.modality_weight.shape[1]
    out = inputs.modality_weight.new_empty((T, E), dtype=out_dtype)
    mean = inputs.modality_weight.new_empty(T if options.centred else 0, dtype=torch.float32)
    rstd = inputs.modality_weight.new_empty(T if options.normed else 0, dtype=torch.float32)
    if T == 0 or E == 0:
        return out, mean, rstd
    config = configs.forward(E, out.element_size(), options.normed)
    grid = (min(triton.cdiv(T, config.rows), config.walks) * triton.cdiv(E, config.columns),)
    with on_device(out):
        modality_embed_fwd_kernel[grid](
            **_shared(inputs, options, read_streams=True),
            norm_bias_ptr=_contiguous(inputs.norm_bias),
            out_ptr=out,
            mean_ptr=mean if options.centred else None,
            rstd_ptr=rstd if options.normed else None,
            eps=options.eps,
            R=config.rows,
            COLUMNS=config.columns,
            num_warps=config.warps,
        )
    return out, mean, rstd


def backward(grad_out: Tensor, inputs: Inputs, options: Options, mean: Tensor, rstd: Tensor, needs: list[bool]):
    """As in reference.backward."""
    M, P, (T, E) = len(inputs.streams), len(inputs.tables), grad_out.shape
    need_streams, need_modality, need_norm = needs[:M], needs[M], needs[-2] or needs[-1]
    # Gradients of the position tables and the token table, whose rows are numbered through: keys.
    summed = [*inputs.tables, *([] if inputs.token_weight is None else [inputs.token_weight])]
    wanted = [*needs[M + 2 : M + 2 + P], needs[M + 1]][: len(summed)]
    d_summed = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None
        for t, n in zip(summed, wanted, strict=True)
    ]
    first = tuple(itertools.accumulate((t.shape[0] for t in inputs.tables), initial=0))
    keyed, slots = any(wanted), max(inputs.table_counts, default=0) + 1

    config = configs.backward(E, grad_out.element_size(), options.normed)
    tiles = configs.tiles_per_walk(T, config)
    walks = triton.cdiv(T, config.rows * tiles)
    fp32 = {"dtype": torch.float32}
    d_streams = [s.new_empty(s.shape) if n else None for s, n in zip(inputs.streams, need_streams, strict=True)]
    sums = 2 * need_norm + M * need_modality
    partial = grad_out.new_empty((walks, sums, E), **fp32) if sums else None
    grad_out = grad_out.contiguous()
    # What the tables' sums read: rounded no further than the result or a table is.
    kinds = {grad_out.dtype, *(t.dtype for t, n in zip(summed, wanted, strict=True) if n)}
    apart = keyed and (options.normed or inputs.rng is not None)  # else dx is the gradient that came in
    dx = grad_out.new_empty((T, E), dtype=functools.reduce(torch.promote_types, kinds)) if apart else None
    # Half the bits are half the passes of the sort.
    few = first[-1] + (0 if inputs.token_weight is None else inputs.token_weight.shape[0]) < 2**15
    keys = grad_out.new_empty((slots, T), dtype=torch.int16 if few else torch.int32) if keyed else None
    with on_device(grad_out):
        if T and E:
            shared = _shared(inputs, options, read_streams=options.normed)
            written = [d is not None and d.numel() > 0 for d in d_streams]
            modality_embed_bwd_rows_kernel[(walks * triton.cdiv(E, config.columns),)](
                **shared,
                grad_ptr=grad_out,
                mean_ptr=mean if options.centred else None,
                rstd_ptr=rstd if options.normed else None,
                d_streams=tuple(  # one that is not written has the type of its stream all the same
                    d if w else s for s, d, w in zip(shared["streams"], d_streams, written, strict=True)
                ),
                dx_ptr=dx,
                partial_ptr=partial,
                keys_ptr=keys,
                WANTED=tuple(int(w) for w in written),
                NORM_SUMS=int(need_norm),
                MODALITY_SUMS=int(need_modality),
                FIRST=first,
                TILES=tiles,
                R=config.rows,
                COLUMNS=config.columns,
                num_warps=config.warps,
                maxnreg=config.registers,
            )
            if keyed:
                _sum_tables(grad_out if dx is None else dx, keys, d_summed, first)

        d_norm_weight, d_norm_bias, d_modality = _sum_walks(
            partial, inputs.modality_weight, M, need_norm, need_modality
        )
    grads = (*d_streams, d_modality, d_summed[-1] if needs[M + 1] else None, *d_summed[:P], d_norm_weight, d_norm_bias)
    return [grad.to(leaf.dtype) if n else None for grad, leaf, n in zip(grads, inputs.leaves, needs, strict=True)]


def _sum_walks(partial: Tensor | None, like: Tensor, M: int, need_norm: bool, need_modality: bool):
    """Gradients of the norm's weight and bias and of the modalities, None where not needed, in the type of like."""
    if partial is None:
        return None, None, None
    W, N, E = partial.shape
    make = like.new_empty if W and E else like.new_zeros
    d_weight, d_bias = (make(E) if need_norm else None for _ in range(2))
    d_modality = make((M, E)) if need_modality else None
    if W and E:
        rows, columns, warps = configs.WALK_SUMS
        modality_embed_bwd_walks_kernel[(triton.cdiv(E, columns), N)](
            partial, d_weight, d_bias, d_modality, W, E, N=N, R=rows, COLUMNS=columns, num_warps=warps
        )
    return d_weight, d_bias, d_modality


def _sum_tables(dx: Tensor, keys: Tensor, d_tables: list[Tensor | None], first: tuple[int, ...]) -> None:
    """Writes each row of d_tables that a key names: the sum of dx over its tokens.  Deterministic; never syncs."""
    (T, E), slots = dx.shape, len(keys)
    keys, order = keys.reshape(-1).sort(stable=True)
    config = configs.tables()
    grid = (triton.cdiv(len(keys), configs.CHUNK), triton.cdiv(E, config.columns))
    head, tail = (keys.new_empty((grid[0], E), dtype=torch.float32) for _ in range(2))
    some = next(d for d in d_tables if d is not None)
    outs = tuple(some if d is None else d for d in d_tables)
    outs = outs if len(outs) == len(first) else (*outs, some)
    rest = {"keys_ptr": keys, "outs": outs, "head_ptr": head, "tail_ptr": tail, "N": len(keys), "E": E, "FIRST": first}
    rest["SUMMED"] = tuple(int(d is not None) for d in d_tables) + (0,) * (len(first) - len(d_tables))
    rest |= {"CHUNK": configs.CHUNK, "COLUMNS": config.columns, "num_warps": config.warps}
    modality_embed_bwd_tables_kernel[grid](dx_ptr=dx, order_ptr=order, T=T, SLOTS=slots, R=config.rows, **rest)
    modality_embed_bwd_spans_kernel[grid](R=configs.SPANS, **rest)


def _shared(inputs: Inputs, options: Options, *, read_streams: bool) -> dict[str, Any]:
    """What both kernels that read rows are given, by name."""
    streams = [s.contiguous() if read_streams or not s.is_floating_point() else s for s in inputs.streams]
    kinds, dtypes = [], {}
    for m, stream in enumerate(streams):
        if not stream.numel():
            kinds.append(-1)
        elif stream.is_floating_point():
            kinds.append(dtypes.setdefault(stream.dtype, m))  # the first modality of this dtype
        else:
            kinds.append(-2)
    weight = inputs.modality_weight.contiguous()
    token_weight = _contiguous(inputs.token_weight)
    has_tokens = token_weight is not None and token_weight.numel() > 0
    tables = [t.contiguous() for t in inputs.tables] or [weight]
    return {
        "streams": tuple(weight if kind == -1 else s for s, kind in zip(streams, kinds, strict=True)),
        "sizes": tuple(2 * s.shape[0] + 3 for s in streams),
        "modality_weight_ptr": weight,
        "token_weight_ptr": token_weight if has_tokens else None,
        "tables": tuple(tables),
        "norm_weight_ptr": _contiguous(inputs.norm_weight),
        "modality_ids_ptr": inputs.modality_ids.contiguous(),
        "source_rows_ptr": inputs.source_rows.contiguous(),
        "positions_ptr": inputs.positions.contiguous(),
        "rng_ptr": inputs.rng,
        "T": inputs.modality_ids.shape[0],
        "threshold": threshold(options.dropout_p) if inputs.rng is not None else 0,
        "keep_scale": 1.0 / (1.0 - options.dropout_p),
        "E": weight.shape[1],
        "M": len(streams),
        "A": inputs.positions.shape[0],
        "V": 0 if token_weight is None else token_weight.shape[0],
        "STREAMS": tuple(kinds),
        "TOKENS": dtypes.get(token_weight.dtype, -1) if has_tokens else -1,
        "TABLES": _slots(inputs.table_counts),
        "ROWS_OF": tuple(t.shape[0] for t in inputs.tables),
        "NORM": NORM_CODES[options.norm],
    }


def _slots(table_counts: list[int]) -> tuple[int, ...]:
    """[q * M + m]: which table modality m reads on the q-th last axis, -1 for none."""
    M = len(table_counts)
    found, index = [-1] * (max(table_counts, default=0) * M), 0
    for m, count in enumerate(table_counts):
        for j in range(count):
            found[(count - 1 - j) * M + m] = index
            index += 1
    return tuple(found)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
