"""Modality embedding from PyTorch's own kernels, modality by modality: the CPU path where nothing is compiled.

T tokens, E width, M modalities, n tokens of one modality.
On a GPU it runs too, but syncs (nonzero).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.modality_embed.dropout import dropped
from mmkernels.ops.modality_embed.inputs import Inputs, Options


def forward(inputs: Inputs, options: Options, out_dtype: torch.dtype):
    """As in reference.forward."""
    inputs.refuse_freed()
    x = _summed(_blocks(inputs), inputs)
    mean, rstd = x.new_empty(0), x.new_empty(0)
    if options.centred:
        weight, bias = _float(inputs.norm_weight), _float(inputs.norm_bias)
        x, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, options.eps)
    elif options.normed:
        rstd = _mean_square(x).add_(options.eps).rsqrt_()
        x.mul_(rstd[:, None])
        if inputs.norm_weight is not None:
            x.mul_(inputs.norm_weight)
    return dropped(x, inputs.rng, options.dropout_p).to(out_dtype), mean.reshape(-1), rstd.reshape(-1)


def backward(grad_out: Tensor, inputs: Inputs, options: Options, mean: Tensor, rstd: Tensor, needs: list[bool]):
    """As in reference.backward."""
    inputs.refuse_freed()
    M, P = len(inputs.streams), len(inputs.tables)
    blocks = _blocks(inputs)
    dx, d_norm_weight, d_norm_bias = dropped(grad_out.float(), inputs.rng, options.dropout_p), None, None
    if options.centred:
        x = _summed(blocks, inputs)
        weight, bias = _float(inputs.norm_weight), _float(inputs.norm_bias)
        wanted = [True, needs[-2], needs[-1]]
        dx, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            dx, x, x.shape[1:], mean[:, None], rstd[:, None], weight, bias, wanted
        )
    elif options.normed:
        normed = _summed(blocks, inputs).mul_(rstd[:, None])
        d_norm_weight = torch.linalg.vecdot(dx, normed, dim=0) if needs[-2] else None
        dx = dx if inputs.norm_weight is None else dx * inputs.norm_weight
        dx = (dx - normed * (torch.linalg.vecdot(dx, normed) / dx.shape[1])[:, None]).mul_(rstd[:, None])

    d_streams = [s.new_empty(s.shape) if n else None for s, n in zip(inputs.streams, needs[:M], strict=True)]
    d_modality = torch.zeros_like(inputs.modality_weight, dtype=torch.float32) if needs[M] else None
    d_tables = [
        torch.zeros_like(t, dtype=torch.float32) if n else None  # of a modality that is missing
        for t, n in zip(inputs.tables, needs[M + 2 : M + 2 + P], strict=True)
    ]
    token_rows: list[tuple[Tensor, Tensor]] = []
    for m, tokens, rows, table_rows in blocks:
        block = dx if len(tokens) == len(dx) else dx.index_select(0, tokens)  # [n, E]
        if d_modality is not None:
            d_modality[m] = block.sum(0)
        for table, keys in table_rows:
            if d_tables[table] is not None:
                d_tables[table] = _sum_by_row(block, keys, inputs.tables[table])
        if d_streams[m] is not None:  # every row of a stream belongs to one token
            own = (rows >= 0).nonzero().squeeze(1)
            part = block if len(own) == len(rows) else block.index_select(0, own)
            d_streams[m].index_copy_(0, rows[own], part.to(inputs.streams[m].dtype))
        if needs[M + 1]:
            is_token, ids = _token_rows(inputs.streams[m], rows)
            token_rows.append((block if len(is_token) == len(rows) else block.index_select(0, is_token), ids))
    d_token = None
    if needs[M + 1]:
        parts, ids = zip(*token_rows, strict=True) if token_rows else ((dx,), (dx.new_empty(0, dtype=torch.long),))
        d_token = _sum_by_row(torch.cat(parts), torch.cat(ids), inputs.token_weight)
    grads = (*d_streams, d_modality, d_token, *d_tables, d_norm_weight, d_norm_bias)
    return [grad.to(leaf.dtype) if n else None for grad, leaf, n in zip(grads, inputs.leaves, needs, strict=True)]


Block = tuple[int, Tensor, Tensor, list[tuple[int, Tensor]]]


def _blocks(inputs: Inputs) -> list[Block]:
    """Per modality present: m, its tokens [n], their source rows [n], and (table, rows [n]) of each position table."""
    blocks, first = [], 0
    for m, count in enumerate(inputs.table_counts):
        tokens = (inputs.modality_ids == m).nonzero().squeeze(1)
        if len(tokens):
            table_rows = []
            for j in range(count):
                axis = inputs.positions.shape[0] - count + j
                rows = inputs.positions[axis].index_select(0, tokens).long() if axis >= 0 else torch.zeros_like(tokens)
                table_rows.append((first + j, rows))
            blocks.append((m, tokens, inputs.source_rows.index_select(0, tokens).long(), table_rows))
        first += count
    return blocks


def _summed(blocks: list[Block], inputs: Inputs) -> Tensor:
    """x [T, E] fp32, before the norm."""
    total = sum(len(tokens) for _, tokens, _, _ in blocks)
    x = inputs.modality_weight.new_empty((total, inputs.modality_weight.shape[1]), dtype=torch.float32)
    for m, tokens, rows, table_rows in blocks:
        block = _gathered(inputs.streams[m], rows, inputs.token_weight)
        block += inputs.modality_weight[m]
        for table, keys in table_rows:
            block += inputs.tables[table].index_select(0, keys)
        if len(tokens) == total:
            return block
        x.index_copy_(0, tokens, block)
    return x


def _gathered(stream: Tensor, rows: Tensor, token_weight: Tensor | None) -> Tensor:
    """The source row of each token of one modality, fp32 [n, E]."""
    is_token, ids = _token_rows(stream, rows)
    if not len(is_token):
        return stream.index_select(0, rows).to(torch.float32)
    if len(is_token) == len(rows):
        return token_weight.index_select(0, ids).to(torch.float32)
    own = (rows >= 0).nonzero().squeeze(1)
    block = stream.new_empty((len(rows), stream.shape[1]), dtype=torch.float32)
    block.index_copy_(0, own, stream.index_select(0, rows[own]).to(torch.float32))
    return block.index_copy_(0, is_token, token_weight.index_select(0, ids).to(torch.float32))


def _token_rows(stream: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which of a modality's tokens read the token table, and the row that each reads."""
    if stream.is_floating_point():
        is_token = (rows < 0).nonzero().squeeze(1)
        return is_token, -(rows[is_token] + 1)
    ids = -(rows + 1)
    own = (rows >= 0).nonzero().squeeze(1)
    ids[own] = stream[rows[own]].long()
    return torch.arange(len(rows), device=rows.device), ids


def _sum_by_row(grad: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """fp32, like table: row r is the sum of grad[i] over rows[i] == r.  Several times as fast as index_add_."""
    return torch.ops.aten.embedding_dense_backward(grad, rows, table.shape[0], -1, False)


def _mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, x).div_(x.shape[1])


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
