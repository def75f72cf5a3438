"""One update: its learning rate, what it asks of the device, and none where a number is not finite."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from builders import batch_of, learner, samples
from torch.utils._python_dispatch import TorchDispatchMode

from mmmodel import configs, update


def test_a_step_that_is_not_finite_changes_nothing():
    config, learned = learner()
    optimizer = update.make_optimizer(learned, config)
    items, features = samples()
    batch = batch_of(learned, items, features)
    prepared = learned.prepare(batch, np.random.default_rng(0))
    before = {name: p.clone() for name, p in learned.named_parameters()}
    batch.inputs["audio"][0][3] = math.inf
    figures, made = update.train_step(learned, optimizer, batch, prepared, config)
    assert not made
    assert not math.isfinite(figures["grad_norm"])
    assert all(torch.equal(before[name], p) for name, p in learned.named_parameters())


class Reads(TorchDispatchMode):
    """Operators whose result, or its size, the host takes from tensors of numbers that a GPU computes: it would wait.

    A list of several numbers comes in one copy, which is no operator here.  Ids are looked at on the host only.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        number = name == "_local_scalar_dense" and args[0].dtype != torch.int64
        if number or by_mask or name in ("nonzero", "masked_select", "equal", "_unique2"):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_its_figures_alone():
    """Each other question lets a GPU run dry, since nothing is queued behind the answer."""
    config, learned = learner()
    optimizer = update.make_optimizer(learned, config)
    batch = batch_of(learned, *samples())
    prepared = learned.prepare(batch, np.random.default_rng(0))
    assert {"contrastive", "masked_text", "matching"} <= prepared.weights.keys()
    with Reads() as reads:
        figures, made = update.train_step(learned, optimizer, batch, prepared, config)
    assert made
    assert len(figures) > 8
    assert reads.found == []


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_warms_up_and_ends_near_zero(schedule):
    config = dataclasses.replace(configs.tiny(), schedule=schedule, steps=100, warmup_steps=10, lr=1.0)
    rates = [update.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates)
    assert rates[-1] < 0.06
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    if schedule == "wsd":
        assert rates[10:80] == [1.0] * 70
