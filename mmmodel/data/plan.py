"""Which samples make up each batch: a deterministic, resumable batch sampler, sharded over ranks.

An epoch is a permutation drawn from (seed, epoch), cut into batches by number of samples and, if given, by a budget of
cost (tokens, usually). Every rank makes the same cut and takes every world_size-th batch; nothing is communicated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class BatchPlan(Sampler[list[int]]):
    """Batches of sample numbers, for ever (or for `epochs`), from wherever the plan stands.

    num_samples: samples of the data set. max_samples: most samples in a batch of one rank. budget, costs [num_samples]:
    no batch costs more than `budget`; a sample that alone does is an error that names it.
    Iterating does not move the plan, because loaders read ahead: `advance()` does, once per batch used; then
    `state_dict()` names the next batch. All ranks get equally many batches; where the last batches of an epoch do not
    go round they are cut smaller, and fewer than world_size left-over samples wait for another epoch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        max_samples: int,
        seed: int,
        budget: int | None = None,
        costs: Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchPlan: rank is {rank}, expected 0 to world_size - 1 = {world_size - 1}")
        if num_samples < world_size:
            raise ValueError(
                f"BatchPlan: {num_samples} samples for {world_size} ranks, expected at least one each; use fewer ranks"
            )
        if max_samples < 1:
            raise ValueError(f"BatchPlan: max_samples is {max_samples}, expected at least 1")
        if (budget is None) != (costs is None):
            raise ValueError("BatchPlan: budget and costs come together, got only one of them")
        self.costs = None if costs is None else np.asarray(costs, dtype=np.int64)
        if self.costs is not None:
            if self.costs.shape != (num_samples,):
                raise ValueError(f"BatchPlan: costs has shape {self.costs.shape}, expected ({num_samples},)")
            if (worst := int(self.costs.argmax())) >= 0 and self.costs[worst] > budget:
                raise ValueError(
                    f"BatchPlan: sample {worst} costs {self.costs[worst]}, more than the budget of {budget}"
                )
        self.num_samples, self.max_samples, self.budget = num_samples, max_samples, budget
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.rank, self.world_size = rank, world_size
        self.epoch, self.batch = 0, 0  # of the next batch
        self._cut: dict[int, list[list[int]]] = {}  # epoch -> batches

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch."""
        if epoch not in self._cut:
            self._cut = {kept: batches for kept, batches in self._cut.items() if kept == epoch - 1}
            self._cut[epoch] = self._all_batches(epoch)[self.rank :: self.world_size]
        return self._cut[epoch]

    def __iter__(self) -> Iterator[list[int]]:
        epoch, batch = self.epoch, self.batch
        while self.epochs is None or epoch < self.epochs:
            yield from self.batches(epoch)[batch:]
            epoch, batch = epoch + 1, 0

    def advance(self) -> None:
        """One batch was used."""
        self.batch += 1
        if self.batch >= len(self.batches(self.epoch)):
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch, "plan": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the very next batch.  Raises ValueError if the state is of another plan, whose batches differ."""
        own = self._fingerprint()
        if state["plan"] != own:
            differing = [
                f"{name} was {state['plan'].get(name)}, is {own[name]}"
                for name in own
                if state["plan"].get(name) != own[name]
            ]
            raise ValueError(f"BatchPlan: the saved state is of another plan: {'; '.join(differing)}")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _fingerprint(self) -> dict[str, Any]:
        names = ("num_samples", "max_samples", "seed", "budget", "shuffle", "world_size")
        costs = None if self.costs is None else hashlib.sha256(self.costs.tobytes()).hexdigest()[:16]
        return {name: getattr(self, name) for name in names} | {"costs": costs}

    def _all_batches(self, epoch: int) -> list[list[int]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        if self.costs is None:
            bounds = [*range(0, self.num_samples, self.max_samples), self.num_samples]
        else:
            from mmkernels import plan_packs

            packs = plan_packs(self.costs[order], self.budget, max_items=self.max_samples, policy="stream")
            order, bounds = order[packs.order], packs.offsets.tolist()
        batches = [order[start:end].tolist() for start, end in pairwise(bounds)]
        return _even(batches, self.world_size)


def _even(batches: list[list[int]], world_size: int) -> list[list[int]]:
    """Make len(batches) a multiple of world_size by halving the largest of the last round."""
    whole = len(batches) - len(batches) % world_size
    batches, last = batches[:whole], batches[whole:]
    if not last or sum(map(len, last)) < world_size:
        return batches
    while len(last) < world_size:
        largest = max(range(len(last)), key=lambda i: len(last[i]))
        middle = (len(last[largest]) + 1) // 2
        last[largest : largest + 1] = [last[largest][:middle], last[largest][middle:]]
    return batches + last
