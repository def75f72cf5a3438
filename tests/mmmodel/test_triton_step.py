"""One pretraining step at tiny size through Triton's interpreter equals the CPU path: loss and every gradient."""

import numpy as np
import pytest
import torch
from builders import batch_of, learner, samples

pytestmark = pytest.mark.interpreter


def step(impl, items, features):
    _, learned = learner(impl=impl, layers=1)
    batch = batch_of(learned, items, features)
    loss, _ = learned(batch, learned.prepare(batch, np.random.default_rng(0)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in learned.named_parameters()}


def test_step_through_triton_equals_the_cpu_path():
    """Both objectives' paths: isolated and joint attention, the fused embedding with every kind of stream."""
    items, features = samples()
    items = items[:4]
    expected_loss, expected = step("auto", items, features)
    loss, gradients = step("triton", items, features)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        # fp32 on both sides, sums in another order: a few units of the seventh digit of the largest
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale + 1e-7, msg=name)
