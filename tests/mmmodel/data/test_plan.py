"""Batch plans: every sample once an epoch, the same on every rank, resumable."""

from itertools import islice

import numpy as np
import pytest

from mmmodel.data.plan import BatchPlan


def flat(batches):
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (7, 3), (9, 3), (5, 100)])  # single, tail, no tail, one batch
def test_an_epoch_holds_every_sample_once(samples, size):
    plan = BatchPlan(samples, max_samples=size, seed=1)
    for epoch in range(3):
        batches = plan.batches(epoch)
        assert sorted(flat(batches)) == list(range(samples))
        assert all(0 < len(batch) <= size for batch in batches)


def test_order_follows_seed_and_epoch():
    plan, same, other = (
        BatchPlan(50, max_samples=4, seed=1),
        BatchPlan(50, max_samples=4, seed=1),
        BatchPlan(50, max_samples=4, seed=2),
    )
    assert plan.batches(0) == same.batches(0)
    assert plan.batches(0) != plan.batches(1)
    assert plan.batches(0) != other.batches(0)
    assert flat(BatchPlan(50, max_samples=4, seed=1, shuffle=False).batches(3)) == list(range(50))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [7, 8, 25, 26, 31])
def test_ranks_share_an_epoch_evenly(samples, world):
    ranks = [BatchPlan(samples, max_samples=4, seed=3, rank=r, world_size=world).batches(0) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # or a collective would hang
    assert len(ranks[0]) > 0
    seen = [i for batches in ranks for i in flat(batches)]
    assert len(seen) == len(set(seen))
    assert samples - len(seen) < world  # fewer than one each are left for another epoch
    assert all(0 < len(batch) <= 4 for batches in ranks for batch in batches)


def test_fewer_samples_than_ranks_is_refused():
    with pytest.raises(ValueError, match="3 samples for 4 ranks"):
        BatchPlan(3, max_samples=2, seed=0, rank=0, world_size=4)


@pytest.mark.parametrize("world", [1, 2])
def test_a_budget_bounds_every_batch(world):
    costs = np.random.default_rng(0).integers(1, 60, 200)
    plans = [
        BatchPlan(200, max_samples=16, seed=0, budget=128, costs=costs, rank=r, world_size=world) for r in range(world)
    ]
    batches = [batch for plan in plans for batch in plan.batches(0)]
    assert all(costs[batch].sum() <= 128 and len(batch) <= 16 for batch in batches)
    assert sorted(flat(batches)) == list(range(200))
    assert len(batches) < 1.2 * costs.sum() / 128 + 2  # well filled
    assert plans[0].batches(0) != plans[0].batches(1)


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(ValueError, match="sample 1 costs 9, more than the budget of 8"):
        BatchPlan(3, max_samples=2, seed=0, budget=8, costs=[1, 9, 3])


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 8])  # 5 batches an epoch: start, inside, last, next epoch, inside it
def test_state_names_the_next_batch_while_reading_ahead(stop):
    plan = BatchPlan(13, max_samples=3, seed=2)
    unbroken = list(islice(plan, 12))
    assert plan.state_dict()["batch"] == 0  # iterating ahead did not move it
    for _ in range(stop):
        plan.advance()
    resumed = BatchPlan(13, max_samples=3, seed=2)
    resumed.load_state_dict(plan.state_dict())
    assert list(islice(resumed, 12 - stop)) == unbroken[stop:]


def test_state_of_another_plan_is_refused():
    state = BatchPlan(13, max_samples=3, seed=2).state_dict()
    with pytest.raises(ValueError, match="max_samples was 3, is 4"):
        BatchPlan(13, max_samples=4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="world_size was 1, is 2"):
        BatchPlan(13, max_samples=3, seed=2, world_size=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_samples": 0}, "max_samples is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"budget": 3}, "come together"),
        ({"budget": 3, "costs": [1]}, r"shape \(1,\), expected \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(4, **{"max_samples": 2, "seed": 0, **arguments})
