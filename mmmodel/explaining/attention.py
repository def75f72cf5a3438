"""Where attention went: mass by modality from the kernel itself, and rollout through the layers.

L layers, H heads, M modalities, T tokens of a batch, n tokens of one sample.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor

from mmkernels.ops.attention.api import attention
from mmmodel.batches import Batch
from mmmodel.model import Model


@torch.no_grad()
def projections(model: Model, batch: Batch) -> list[Tensor]:
    """q, k and v of every layer as the model computes them for this batch, each [T, 3, H, D]."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            handle = block.qkv.register_forward_hook(lambda layer, inputs, output: found.append(output))
            hooks.callback(handle.remove)
        model(batch)
    return [qkv.view(len(qkv), 3, block.heads, -1).detach() for qkv, block in zip(found, model.blocks, strict=True)]


@torch.no_grad()
def modality_mass(model: Model, batch: Batch) -> Tensor:
    """Share of attention from modality to modality, [L, H, M, M]: rows query, columns key, each row sums to 1.

    The mean over a modality's tokens of what the attention kernel itself reports (`return_modality_mass`); rows of NaN
    for modalities that the batch lacks.
    """
    layers = []
    for qkv in projections(model, batch):
        q, k, v = qkv.unbind(1)
        impl = model.config.impl
        _, mass = attention(q, k, v, layout=batch.layout, return_modality_mass=True, impl=impl)  # [T, H, M]
        queries = batch.layout.modality_ids.long()
        sums = mass.new_zeros(mass.shape[2], *mass.shape[1:]).index_add_(0, queries, mass)  # [M, H, M]
        counts = torch.bincount(queries, minlength=mass.shape[2]).to(mass.dtype)
        layers.append((sums / counts[:, None, None]).transpose(0, 1))
    return torch.stack(layers).cpu()


@torch.no_grad()
def rollout(model: Model, batch: Batch) -> Tensor:
    """Attention rollout of a batch of one sample, float64 [n, n]: how much of token j ends up in token i.

    R = B_L ... B_1 with B_l = (mean over heads of A_l + identity) / 2, A_l = softmax(q k^T / sqrt(D)); rows sum
    to 1.  Abnar & Zuidema 2020 (arXiv 2005.00928), equation 1.  Raises ValueError for several samples.
    """
    if batch.layout.num_samples != 1:
        raise ValueError(f"rollout: the batch has {batch.layout.num_samples} samples, expected 1")
    result = identity = torch.eye(batch.layout.total_tokens, dtype=torch.float64, device=batch.layout.device)
    for qkv in projections(model, batch):
        q, k, _ = qkv.double().permute(1, 2, 0, 3)  # [H, n, D] each
        scores = (q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
        weights = scores.softmax(dim=-1).mean(dim=0)
        result = (weights + identity) / 2 @ result
    return result.cpu()
