"""A learner whose weights, gradients and optimizer are split over the processes (FSDP2); others are left as they are.

It is whole on every rank while a step's forward and backward run, and 1 / R of every parameter at rest.  Buffers are
whole, and rank 0's in every step.   R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mmmodel import distributed


def shard(learner: nn.Module, device: torch.device) -> None:
    """Leaves this rank's rows of every parameter; all ranks must have the same.  Nothing to do in one process."""
    if distributed.size() == 1:
        return
    # One group, not one for each block: every rank must take part in a group's collectives, and how often a rank runs
    # the blocks in a step, or whether it runs a front end, depends on its samples.  The learner runs once on each rank.
    mesh = init_device_mesh(device.type, (distributed.size(),))
    fully_shard(learner, mesh=mesh, reshard_after_forward=False)
    if any(True for _ in learner.buffers()):
        learner.register_forward_pre_hook(_share_buffers)


@contextmanager
def whole(learner: nn.Module) -> Iterator[None]:
    """Weights are whole on every rank for as long as the context lasts, for a forward that no backward follows."""
    if not isinstance(learner, FSDPModule):
        yield
        return
    learner.unshard()
    try:
        yield
    finally:
        learner.reshard()


def backward(learner: nn.Module, loss: Tensor) -> None:
    """loss.backward(), after the learner's forward.  What no rank's loss reaches has no gradient, split or not.

    FSDP averages the gradients that a rank has, so every rank needs the same ones: of what its own loss does not reach,
    as a front end whose modality its samples lack, zeros.
    """
    if not isinstance(learner, FSDPModule):
        loss.backward()
        return
    parameters = _learning(learner)  # forward left them whole
    nodes = _nodes(loss)
    reached = [get_gradient_edge(parameter).node in nodes for parameter in parameters]
    for parameter, mine in zip(parameters, reached, strict=True):
        if not mine:
            parameter.grad = torch.zeros_like(parameter)
    loss.backward()
    for parameter, ranks in zip(_learning(learner), distributed.summed(reached, loss.device), strict=True):
        if not ranks:
            parameter.grad = None


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """nn.utils.clip_grad_norm_, by the norm of the parts of all ranks."""
    parts = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    if not parts:
        return nn.utils.clip_grad_norm_(parameters, most)
    squared = nn.utils.get_total_norm(parts).double().square()
    dist.all_reduce(squared)
    norm = squared.sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


@torch.no_grad()
def _share_buffers(learner: nn.Module, inputs: tuple) -> None:
    """Gives every rank rank 0's before a step's forward, as DistributedDataParallel does; validation keeps its own."""
    if not learner.training:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in learner.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        together = torch.cat([buffer.flatten() for buffer in buffers])  # a ResNet has hundreds: one message
        dist.broadcast(together, src=0)
        for buffer, part in zip(buffers, together.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _learning(learner: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in learner.parameters() if parameter.requires_grad]


def _nodes(loss: Tensor) -> set[Node]:
    """Of the graph that backward will go through, as DistributedDataParallel looks for unused parameters."""
    found, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return found
