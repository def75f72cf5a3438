"""Floating-point operations of a training step, counted on real work, and the rate that the device can reach."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from mmkernels.masks import MaskPlan
from mmmodel.model import Block

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


class StepFlops:
    """Context manager around a forward pass; `total` is then what its forward and backward take.

    Linear layers and convolutions: 2 FLOPs per multiplication, as many for each gradient.  Attention: 4 D per visible
    pair and head, 2.5 times that for backward.  Norms, activations, losses and products outside of nn.Linear (the last
    maps of objectives) do not count, nor what activation checkpointing computes again: the figure is a little low.
    """

    def __init__(self, learner: nn.Module) -> None:
        self.learner = learner
        self.total = 0.0

    def __enter__(self) -> StepFlops:
        modules = list(self.learner.modules())
        self.weights = {block: _weights(block) for block in modules if isinstance(block, Block)}
        inside = {layer for block in self.weights for layer in block.children()}
        self.hooks = [block.register_forward_pre_hook(self._block) for block in self.weights]
        for module in modules:
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module not in inside:
                self.hooks.append(module.register_forward_hook(self._layer))
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def _block(self, block: Block, inputs: tuple) -> None:
        # Whole blocks, not their layers: a compiled block runs no hooks inside.
        x, layout, mask = inputs
        pairs = MaskPlan.lower(layout, mask).visible_pairs
        self.total += 3 * 2 * len(x) * self.weights[block] + 3.5 * 4 * x.shape[1] * pairs

    def _layer(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Each output element takes as many multiplications as one output channel has weights.
        forward = 2 * output.numel() * layer.weight[0].numel()
        self.total += forward * (3 if inputs[0].requires_grad else 2)  # pixels and frames need no gradient


def _weights(block: Block) -> int:
    return sum(layer.weight.numel() for layer in block.children() if isinstance(layer, nn.Linear))


def gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product, the best of repeated trials: what utilisation is a share of."""
    size = GEMM_SIZE[device.type]
    draws = torch.Generator(device).manual_seed(0)  # not torch's own, which the caller may be drawing from
    a, b = (torch.empty(size, size, device=device).uniform_(-1, 1, generator=draws).to(dtype) for _ in range(2))
    best = float("inf")
    torch.mm(a, b)
    deadline = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:  # once at least, on a machine too busy for more
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
