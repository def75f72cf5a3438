"""Eager modality embedding: the specification, and in float64 the oracle.

T tokens, E width, M modalities, A position axes.  For token t of modality m with source row r:

    x[t]   = stream_m[r]                    a stream of floats [N_m, E]
           | token_weight[stream_m[r]]      a stream of token ids [N_m]
           | token_weight[-(r + 1)]         r < 0: a special token, whatever the stream holds
    x[t]  += modality_weight[m] + sum_j table_(m, j)[positions[A - k_m + j, t]]      k_m tables for modality m;
                                                                                    an axis that is not there is 0
    y[t]   = (x - mean(x)) / sqrt(var(x) + eps) * norm_weight + norm_bias            norm="layernorm"
           | x / sqrt(mean(x^2) + eps) * norm_weight                                 norm="rmsnorm"
           | x                                                                       norm="none"
    out[t] = y where dropout keeps it, divided by 1 - dropout_p, else 0              see dropout.keep_mask

Sums and statistics are in fp32 (float64 where the inputs are), gradients of tables are summed there too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.modality_embed.dropout import dropped
from mmkernels.ops.modality_embed.inputs import Inputs, Options


def forward(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """-> out [T, E] of out_dtype, mean [T] (layernorm, else empty), rstd [T] (empty without a norm).

    Differentiable by torch.
    """
    inputs.refuse_freed()
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    x = _summed(inputs, dtype)
    mean, rstd = x.new_empty(0), x.new_empty(0)
    if options.normed:
        if options.centred:
            mean = x.mean(1)
            x = x - mean[:, None]
        rstd = x.square().mean(1).add(float(options.eps)).rsqrt()
        x = x * rstd[:, None]
        if inputs.norm_weight is not None:
            x = x * inputs.norm_weight.to(dtype)
        if inputs.norm_bias is not None:
            x = x + inputs.norm_bias.to(dtype)
    return dropped(x, inputs.rng, options.dropout_p).to(out_dtype), mean, rstd


def backward(
    grad_out: Tensor, inputs: Inputs, options: Options, mean: Tensor, rstd: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """The gradient of each of inputs.leaves, None where not needed.

    needs  a flag for each of them
    """
    inputs.refuse_freed()
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    grad = dropped(grad_out.to(dtype), inputs.rng, options.dropout_p)
    dx, d_norm_weight, d_norm_bias = grad, None, None
    if options.normed:
        x = _summed(inputs, dtype)
        normed = (x - mean[:, None] if options.centred else x) * rstd[:, None]
        scaled = grad if inputs.norm_weight is None else grad * inputs.norm_weight.to(dtype)
        dx = scaled - normed * (scaled * normed).mean(1, keepdim=True)
        if options.centred:
            dx = dx - scaled.mean(1, keepdim=True)
        dx = dx * rstd[:, None]
        d_norm_weight, d_norm_bias = (grad * normed).sum(0), grad.sum(0)

    d_streams, d_tables = [], []
    # Not index_add: that adds one row after the other, and rounds each time.
    d_modality = torch.stack([dx[inputs.modality_ids == m].sum(0) for m in range(len(inputs.streams))])
    d_token = None if inputs.token_weight is None else torch.zeros_like(inputs.token_weight, dtype=dtype)
    for m, stream in enumerate(inputs.streams):
        tokens, rows = _rows_of(m, inputs)
        if stream.is_floating_point():
            d_streams.append(torch.zeros_like(stream, dtype=dtype).index_add(0, rows, dx[tokens]))
        else:
            d_streams.append(None)
            d_token = d_token.index_add(0, stream[rows].long(), dx[tokens])
        for table, rows, tokens in _position_rows(m, inputs):
            d_tables.append(torch.zeros_like(table, dtype=dtype).index_add(0, rows, dx[tokens]))
    special = (inputs.source_rows < 0).nonzero().squeeze(1)
    if d_token is not None:
        d_token = d_token.index_add(0, -(inputs.source_rows[special].long() + 1), dx[special])
    grads = (*d_streams, d_modality, d_token, *d_tables, d_norm_weight, d_norm_bias)
    return [grad.to(leaf.dtype) if n else None for grad, leaf, n in zip(grads, inputs.leaves, needs, strict=True)]


def _summed(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """x [T, E], before the norm."""
    x = inputs.modality_weight.to(dtype)[inputs.modality_ids.long()]
    for m, stream in enumerate(inputs.streams):
        tokens, rows = _rows_of(m, inputs)
        picked = stream[rows]
        if not stream.is_floating_point() and tokens.numel():
            picked = inputs.token_weight[picked.long()]
        if tokens.numel():
            x = x.index_add(0, tokens, picked.to(dtype))
        for table, rows, tokens in _position_rows(m, inputs):
            x = x.index_add(0, tokens, table.index_select(0, rows).to(dtype))  # [-1] would wrap
    special = (inputs.source_rows < 0).nonzero().squeeze(1)
    if special.numel():
        x = x.index_add(0, special, inputs.token_weight[-(inputs.source_rows[special].long() + 1)].to(dtype))
    return x


def _rows_of(m: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Tokens of modality m that come from its stream, and the stream's row of each."""
    tokens = ((inputs.modality_ids == m) & (inputs.source_rows >= 0)).nonzero().squeeze(1)
    return tokens, inputs.source_rows[tokens].long()


def _position_rows(m: int, inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each position table of modality m: the table, the rows read, and the tokens that read them."""
    first, count = sum(inputs.table_counts[:m]), inputs.table_counts[m]
    tokens = (inputs.modality_ids == m).nonzero().squeeze(1)
    found = []
    for j in range(count):
        axis = inputs.positions.shape[0] - count + j  # a batch without grids has one axis; grid tables then read row 0
        rows = inputs.positions[axis, tokens].long() if axis >= 0 else torch.zeros_like(tokens)
        found.append((inputs.tables[first + j], rows, tokens))
    return found
