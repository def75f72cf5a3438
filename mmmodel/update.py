"""One update of the weights: the loss, its gradients over all ranks, and AdamW with its learning rate."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mmmodel import distributed, sharding
from mmmodel.batches import Batch
from mmmodel.configs import PretrainConfig
from mmmodel.flops import StepFlops
from mmmodel.model import autocast
from mmmodel.pretraining import Prepared, Pretraining
from mmmodel.recompute import Recompute, wrap_front_ends


def train_step(
    learner: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, prepared: Prepared, config: PretrainConfig
) -> tuple[dict[str, float], bool]:
    """One update; (figures, whether it was made): not when the loss or a gradient is not finite on some rank.

    learner: Pretraining, split or not, or that in DistributedDataParallel.  "tflop" is what forward and backward take.
    """
    learner.train()
    device = next(learner.parameters()).device
    with autocast(config.device, config.precision), StepFlops(learner) as flops:
        loss, figures = learner(batch.to(device), prepared)
    optimizer.zero_grad(set_to_none=True)
    sharding.backward(learner, loss)
    parameters = [p for p in learner.parameters() if p.grad is not None]
    norm = sharding.clip(parameters, config.clip_norm or math.inf)
    figures = _read({"loss": loss.detach(), "grad_norm": norm, **figures}, device)
    wrong = not (math.isfinite(figures["grad_norm"]) and math.isfinite(figures["loss"]))
    (wrong,) = distributed.summed([wrong], device)
    if not wrong:
        optimizer.step()
    return figures | {"tflop": flops.total / 1e12}, not wrong


def _read(figures: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """All in one copy, before the optimizer's kernels are asked for: each read lets a GPU run dry."""
    values = torch.stack([value.to(device) for value in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))


def prepare_modules(learner: Pretraining, config: PretrainConfig) -> None:
    """What is computed again in backward, and what is compiled."""
    model = learner.model
    model.recompute = Recompute(config.chunk_tokens, config.checkpointing)
    if model.recompute != Recompute():
        wrap_front_ends(model.front_ends)
    if config.compile:
        # The parts around attention, which is one operator and takes a layout, whose numbers change with every batch.
        for block in model.blocks:
            block.project = torch.compile(block.project, dynamic=True)
            block.mix = torch.compile(block.mix, dynamic=True)


def reweighted(prepared: Prepared, device: torch.device) -> Prepared:
    """With this rank's weights of the losses that are means over its own hidden tokens or pairs.

    Averaged over ranks such a loss becomes the mean over all of theirs.  The contrastive loss needs none: every rank
    computes it from the segments of all.
    """
    if distributed.size() == 1:
        return prepared
    masked = prepared.masked.targets if prepared.masked is not None else {}
    own = {f"masked_{modality}": len(targets) for modality, targets in masked.items()}
    if "matching" in prepared.weights:
        own["matching"] = sum(len(anchors.first) for anchors in prepared.inputs["matching"])
    total = dict(zip(own, distributed.summed(list(own.values()), device), strict=True))
    weights = {
        name: weight * distributed.size() * own[name] / max(1, total[name]) if name in own else weight
        for name, weight in prepared.weights.items()
    }
    return dataclasses.replace(prepared, weights=weights)


def make_optimizer(learner: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW, in one group what decays, in another what does not."""
    decayed, free = [], []
    for name, parameter in learner.named_parameters():
        (decayed if decays(name, parameter) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return adamw([{**group, "lr": config.lr} for group in groups])


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether it has weight decay: matrices, not norms, biases, scales and embedding tables."""
    return parameter.ndim > 1 and ".embedding." not in name


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """groups: of parameters, each with its learning rate and weight decay."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to zero, or wsd: constant, then linear to zero over the last fifth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = step / config.steps
    if config.schedule == "cosine":
        return config.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * min(warm, 5 * (1 - done))


def seed_dropout(seed: int, device: torch.device) -> None:
    """Of the generators that dropout draws from: the CPU's and the device's, no other GPU's."""
    torch.default_generator.manual_seed(seed)
    for gpu in gpus(device):
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(seed)


def dropout_apart(device: torch.device) -> AbstractContextManager[None]:
    """As long as it lasts, these generators are the caller's to seed and to draw from; then they are as before."""
    return torch.random.fork_rng(devices=gpus(device))


def gpus(device: torch.device) -> list[torch.device]:
    """The one, if any, whose generator draws dropout beside the CPU's."""
    return [device] if device.type == "cuda" else []


def set_learning_rate(optimizer: torch.optim.Optimizer, config: PretrainConfig, step: int) -> float:
    """The same for all groups: that of a step, which it returns."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
