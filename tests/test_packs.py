"""plan_packs: every item once, no pack over a budget, cap or count, C++ and numpy agree.   n items, K budgets"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import packs, packs_numpy
from mmkernels.packs import POLICIES, plan_packs
from mmkernels.planner_backend import BACKEND

needs_cpp = pytest.mark.skipif(BACKEND != "cpp", reason="mmkernels._planner is not built")


@st.composite
def problems(draw):
    """(lengths [n, K], budgets, options): zero lengths, many equals, budgets of one token, items as large as them."""
    budgets = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    columns = st.tuples(*[st.integers(0, b) for b in budgets])
    lengths = np.array(draw(st.lists(columns, max_size=60)), np.int64).reshape(-1, len(budgets))
    options = {"max_items": draw(st.sampled_from([None, 1, 3])), "policy": draw(st.sampled_from(POLICIES))}
    cost = draw(st.sampled_from([None, st.integers(0, 9), st.floats(0, 1e6, allow_subnormal=False)]))
    if cost is not None:
        options["costs"] = draw(st.lists(cost, min_size=len(lengths), max_size=len(lengths)))
    return lengths, budgets, options


def assert_same(plan, other):
    np.testing.assert_array_equal(plan.order, other.order)
    np.testing.assert_array_equal(plan.offsets, other.offsets)


@given(problems())
@settings(max_examples=200, deadline=None)
def test_every_item_once_and_nothing_over_its_limit(problem):
    lengths, budgets, options = problem
    plan = plan_packs(lengths, budgets, **options)
    assert (plan.order.dtype, plan.offsets.dtype) == (np.int64, np.int64)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    for items in plan:
        assert len(items) > 0
        assert (lengths[items].sum(0) <= budgets).all()
        assert options["max_items"] is None or len(items) <= options["max_items"]
        assert items.tolist() == sorted(items.tolist())
    assert len(plan) >= plan.lower_bound
    assert (len(plan.dropped), plan.pieces) == (0, None)
    if "costs" in options:
        sums = [sum(options["costs"][i] for i in items) for items in plan]
        np.testing.assert_allclose(plan.costs, sums)
        assert max(sums, default=0) <= plan.cost_cap * (1 + 1e-12)
    assert_same(plan, plan_packs(lengths.copy(), budgets, **options))


def plan_in_numpy(*arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "_backend", packs_numpy)
        return plan_packs(*arguments, **options)


@needs_cpp
@given(problems())
@settings(max_examples=200, deadline=None)
def test_backends_make_the_same_plan(problem):
    lengths, budgets, options = problem
    assert_same(plan_packs(lengths, budgets, **options), plan_in_numpy(lengths, budgets, **options))


@needs_cpp
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("n", "budgets", "largest"),
    [
        (3000, [8192], 3000),  # three levels of the bitmap, packs closed by the stream policy
        (3000, [300_000], 200_000),  # longer than the tables of so few items: a tree of rooms and a sort
        (300, [2**40], 2**39),  # beyond any table
        (1500, [60, 8192, 3000], 60),  # more than 64 open packs; the first budget binds
        (3500, [60, 999], 25),  # two rounds of the pool; each pack takes a few
        (1100, [10, 10], 10),  # more than 1024 open packs
    ],
)
def test_backends_make_the_same_plan_at_size(policy, n, budgets, largest):
    rng = np.random.default_rng(n)
    lengths = rng.integers(largest // 4, largest + 1, (n, len(budgets)))
    assert_same(plan_packs(lengths, budgets, policy=policy), plan_in_numpy(lengths, budgets, policy=policy))


def test_first_fit_in_numpy_looks_at_open_packs_alone(monkeypatch):
    """Looking at as many as there are items took 8 s for 128,000 of them, of which 6,000 packs hold all."""
    looked_at, argmax = [], np.argmax
    monkeypatch.setattr(np, "argmax", lambda fits: looked_at.append(len(fits)) or argmax(fits))
    plan = plan_in_numpy(np.random.default_rng(0).integers(1, 200, 500), 4096, policy="first_fit")
    assert len(looked_at) == 500
    assert max(looked_at) <= len(plan) + 1


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_the_type_of_lengths_does_not_matter(dtype):
    lengths = np.random.default_rng(0).integers(0, 900, 5000)
    assert_same(plan_packs(lengths.astype(dtype), 1000), plan_packs(lengths.tolist(), 1000))


def best_fit_by_scanning(lengths, budget):
    """O(n^2): the packs of best-fit-decreasing.  Of packs with equal room, the one that was touched last is taken."""
    packs, rooms, touched = [], [], []
    for step, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [p for p, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            chosen = min(fitting, key=lambda p: (rooms[p], -touched[p]))
        else:
            chosen = len(packs)
            packs.append([])
            rooms.append(budget)
            touched.append(0)
        packs[chosen].append(item)
        rooms[chosen] -= lengths[item]
        touched[chosen] = step
    return [sorted(pack) for pack in packs]


DRAWS = {
    "uniform": lambda rng, n, budget: rng.integers(0, budget + 1, n),
    "few lengths": lambda rng, n, budget: rng.choice(rng.integers(0, budget + 1, 4), n),  # long runs of equals
    "short": lambda rng, n, budget: rng.integers(0, budget // 6 + 2, n),  # many to a pack
    "thirds": lambda rng, n, budget: np.minimum(rng.integers(budget // 4, budget // 2 + 2, n), budget),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_best_fit_is_the_textbooks(draw):
    """500 cases of each kind: the very packs, in order of opening."""
    rng = np.random.default_rng(sum(map(ord, draw)))
    for _ in range(500):
        budget = int(rng.choice([1, 7, 60, 1000]))
        lengths = DRAWS[draw](rng, int(rng.integers(0, 120)), budget).tolist()
        expected = best_fit_by_scanning(lengths, budget)
        assert [items.tolist() for items in plan_packs(lengths, budget)] == expected


def test_fill_on_mixed_lengths():
    """Captions, images and audio of one sample: a mean of about 500 tokens leaves little room unused."""
    rng = np.random.default_rng(0)
    n = 100_000
    lengths = rng.integers(5, 60, n) + rng.integers(64, 400, n) + rng.integers(0, 800, n) * (rng.random(n) < 0.6)
    plan = plan_packs(lengths, 8192)
    assert plan.fill >= 0.996
    assert plan.fill == pytest.approx(lengths.sum() / (len(plan) * 8192))
    assert plan.binding == "budget"


def test_the_binding_constraint_is_named():
    assert plan_packs([1] * 10, 100, max_items=2).binding == "max_items"
    assert plan_packs([1] * 10, 100, max_items=2).lower_bound == 5
    assert plan_packs([[1, 50]] * 10, [100, 100]).binding == "budget[1]"
    assert plan_packs([[1, 50]] * 10, [100, 100]).fills == (0.02, 1.0)
    assert plan_packs([60] * 10, 100).lower_bound == 10  # more than half: no two share a pack


def test_nothing_to_pack():
    plan = plan_packs([], 8)
    assert (len(plan), plan.fill, plan.lower_bound, list(plan)) == (0, 1.0, 0, [])
    assert len(plan_packs([0, 0], 8)) == 1


def test_a_long_item_is_named():
    with pytest.raises(ValueError, match="item 2 has length 9, over the budget of 8; long='split' or long='drop'"):
        plan_packs([3, 8, 9, 10], 8)
    with pytest.raises(
        ValueError, match=r"item 1 has length\[1\] 5, over the budget\[1\] of 4; long='drop' accepts it"
    ):
        plan_packs([[3, 4], [1, 5]], [8, 4])
    with pytest.raises(ValueError, match="item 0 has length 9, over the budget of 8; long='drop' accepts it"):
        plan_packs([9], 8, costs=[1])


def test_a_long_item_is_dropped_by_choice():
    plan = plan_packs([3, 9, 5, 10], 8, long="drop")
    assert plan.dropped.tolist() == [1, 3]
    assert [items.tolist() for items in plan] == [[0, 2]]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 12), st.sampled_from(POLICIES))
@settings(max_examples=60, deadline=None)
def test_a_long_item_is_split_by_choice(lengths, budget, policy):
    """The pieces of each item cover it once, and no pack is over budget."""
    plan = plan_packs(lengths, budget, long="split", policy=policy)
    covered = [np.zeros(n, int) for n in lengths]
    for begin, end in zip(plan.offsets[:-1], plan.offsets[1:], strict=True):
        assert plan.pieces[begin:end, 1].sum() <= budget
    for item, (start, tokens) in zip(plan.order, plan.pieces, strict=True):
        covered[item][start : start + tokens] += 1
    assert all((c == 1).all() for c in covered)
    assert set(plan.order.tolist()) == set(range(len(lengths)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.5], 8), {}, "lengths is float64, expected integers"),
        (([1], 8.0), {}, "budget is float64, expected integers"),
        (([1], 0), {}, r"budget is 0, expected 1 to 2\*\*63 - 1"),
        (([1], 2**63), {}, r"budget is 9223372036854775808, expected 1 to 2\*\*63 - 1"),
        (([1, -1], 8), {}, r"item 1 has length \[-1\], expected 0 to"),
        ((np.array([1, 2**63], np.uint64), 8), {}, r"item 1 has length \[9223372036854775808\], expected 0 to"),
        (([[1, 2], [3]], 8), {}, r"lengths\[1\] has 1 entries, expected 2 as lengths\[0\]"),
        (([1], torch.tensor(8, device="meta")), {}, "budget is no array of numbers on the host: .* meta device"),
        (([1], 8), {"max_items": True}, "max_items is True, expected a whole number"),
        (([1], 8), {"long": "split", "costs": [1]}, "long='split' needs one budget and no costs, got costs"),
        (([2**62, 2**62], 2**62), {}, r"lengths sum to 2\*\*62 or more"),
        (([1], 8), {"max_items": 0}, "max_items is 0, expected a whole number of at least 1 or None"),
        (([1], 8), {"max_items": 2.5}, "max_items is 2.5, expected a whole number"),
        (([1], 8), {"max_items": "2"}, "max_items is '2', expected a whole number"),
        (([1], 8), {"max_items": "two"}, "max_items is 'two', expected a whole number"),
        (([1], 8), {"policy": "worst"}, "policy is 'worst', expected one of best_fit, first_fit, stream"),
        (
            ([2**40], 8),
            {"long": "split"},
            f"budget 8 splits the lengths into {2**37} pieces, expected at most 2.*31 - 1",
        ),
        (([1], 8), {"long": "truncate"}, "long is 'truncate', expected one of error, split, drop"),
        (([[1, 2]], 8), {}, r"lengths has shape \[1, 2\] for 1 budgets"),
        (([[1, 2]], [8, 8]), {"long": "split"}, "long='split' needs one budget and no costs, got 2"),
    ],
)
def test_errors_say_which_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(*arguments, **options)


@pytest.mark.parametrize("budget", [8, [8]])
def test_a_limit_past_int64_is_no_limit(budget):
    for policy in POLICIES:
        assert len(plan_packs([1, 2, 3], budget, max_items=2**70, policy=policy)) == 1


def test_several_budgets_fill_the_one_that_binds():
    """Text, image and audio tokens of 20,000 samples, all three budgets about equally tight."""
    rng = np.random.default_rng(0)
    n = 20_000
    text = np.clip(rng.lognormal(5, 0.8, n), 8, 2048).astype(int)
    image = (rng.random(n) < 0.7) * rng.integers(12, 33, n) * rng.integers(12, 33, n)
    audio = (rng.random(n) < 0.5) * rng.integers(50, 1500, n)
    plan = plan_packs(np.stack([text, image, audio], 1), [2048, 3500, 4096])
    assert plan.lower_bound / len(plan) >= 0.99
    assert plan.fill == max(plan.fills) >= 0.99


def test_costs_are_evened_out():
    """Quadratic work: without costs the packs of long items cost 6 % more than the mean; the cap is 2 % over it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 64, 10_000) + rng.integers(16, 256, 10_000) + rng.integers(0, 512, 10_000)
    costs = lengths + lengths**2 / 4096
    plain, plan = plan_packs(lengths, 8192), plan_packs(lengths, 8192, costs=costs)
    without = np.add.reduceat(costs[plain.order], plain.offsets[:-1])
    assert plan.costs.max() <= plan.cost_cap <= 1.021 * costs.sum() / plain.lower_bound
    assert plan.costs.max() / plan.costs.mean() < 1.03 < without.max() / without.mean()
    assert plan.costs[:-5].min() / plan.costs.mean() > 0.85
    assert len(plan) <= 1.01 * len(plain)


def test_a_costly_item_sets_the_cap():
    plan = plan_packs([1, 1, 1, 1, 1], 4, costs=[100, 1, 1, 1, 1])
    assert (plan.cost_cap, len(plan), max(plan.costs)) == (100, 2, 100)
    assert plan_packs([4, 4], 4, costs=[7, 1]).cost_cap == 7
    assert plan_packs([], 4, costs=[]).costs.tolist() == []
    assert plan_packs([1, 9], 4, costs=[2, 50], long="drop").costs.tolist() == [2]


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([1.0], r"costs has shape \[1\], expected one number per item: \[2\]"),
        ([1.0, -2.0], "item 1 costs -2.0, expected >= 0"),
        ([np.inf, 1.0], "item 0 costs inf"),
        ([np.nan, 1.0], "item 0 costs nan"),
        ([1e308, 1e308], r"costs sum to 2\*\*1023 or more"),
        ([0.9e308, 0.8e308], r"costs sum to 2\*\*1023 or more"),  # a float64, but not with what a pack may be over
        (["a", "b"], "expected numbers"),
    ],
)
def test_errors_of_costs(costs, message):
    with pytest.raises(ValueError, match=message):
        plan_packs([1, 2], 8, costs=costs)
    with pytest.raises(ValueError, match="long='split' needs one budget and no costs"):
        plan_packs([1, 2], 8, costs=[1, 1], long="split")
