"""Several processes on one batch, by torch.distributed: started with torchrun, else all of this does nothing.

Each rank reads its own samples of every batch; gradients are averaged by DistributedDataParallel or FSDP2
(sharding.py), and losses are weighted so that the average is the gradient of the loss of the whole batch.

R ranks, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, for as long as the context lasts; yields this one's device."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own(samples: list[Any]) -> list[Any]:
    """This rank's of a batch's samples."""
    return samples[rank() :: size()]


def generator(*seed: int) -> np.random.Generator:
    """Draws of this rank alone; rank 0's are those of a single process."""
    return np.random.default_rng([*seed, *([rank()] if rank() else [])])


def wait() -> None:
    if size() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 goes first: what it writes is there when the others come."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


@contextmanager
def wrapped(learner: nn.Module) -> Iterator[nn.Module]:
    """The learner, its gradients averaged over ranks in backward for as long as the context lasts.

    One that `sharding.shard` has split averages them itself; any other is in DistributedDataParallel.
    """
    if size() == 1 or isinstance(learner, FSDPModule):
        yield learner
        return
    # An objective that finds nothing to do in a rank's samples leaves parameters without a gradient there.
    module = DistributedDataParallel(learner, find_unused_parameters=True)
    try:
        yield module
    finally:
        # The last to hold the process group must not be the reducer: its destructor waits, with Python's lock held, for
        # gloo's thread, which may itself wait for that lock to let go of a tensor.  Then the process never ends.
        module.reducer = module.logger = None


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over ranks."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def everyone(value: Any) -> list[Any]:
    """What every rank passed, in order of ranks."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def gathered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor's rows of all ranks, [sum of N, ...], in order of ranks; the same on every rank.

    Gradients are those of a loss that every rank computes from all rows, times R: averaged over ranks, parameters get
    the gradient of that loss once.
    """
    if size() == 1:
        return tensors
    counts = [torch.zeros(1, dtype=torch.int64, device=tensors[0].device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(tensors[0])], device=tensors[0].device))
    lengths = [int(count) for count in counts]
    return tuple(_Gather.apply(tensor, lengths) for tensor in tensors)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, lengths: list[int]) -> Tensor:
        ctx.start, ctx.count = sum(lengths[: rank()]), len(own)
        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return size() * grad[ctx.start : ctx.start + ctx.count], None
