"""plan_packs: every item once, no pack over a budget, C++ and numpy agree.   n items, K budgets"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import planner, planner_numpy
from mmkernels.planner import POLICIES, plan_packs

needs_cpp = pytest.mark.skipif(planner.BACKEND != "cpp", reason="mmkernels._planner is not built")


@st.composite
def problems(draw):
    """(lengths [n, K], budgets, max_items): zero lengths, many equals, budgets of one token, items as large as them."""
    budgets = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    columns = st.tuples(*[st.integers(0, b) for b in budgets])
    lengths = np.array(draw(st.lists(columns, max_size=60)), np.int64).reshape(-1, len(budgets))
    return lengths, budgets, draw(st.sampled_from([None, 1, 3]))


@given(problems(), st.sampled_from(POLICIES))
@settings(max_examples=150, deadline=None)
def test_every_item_once_and_no_pack_over_budget(problem, policy):
    lengths, budgets, max_items = problem
    plan = plan_packs(lengths, budgets, max_items=max_items, policy=policy)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    for items in plan:
        assert len(items) > 0
        assert (lengths[items].sum(0) <= budgets).all()
        assert max_items is None or len(items) <= max_items
        assert items.tolist() == sorted(items.tolist())
    assert len(plan) >= plan.lower_bound
    assert (len(plan.dropped), plan.pieces) == (0, None)
    again = plan_packs(lengths.copy(), budgets, max_items=max_items, policy=policy)
    assert np.array_equal(plan.order, again.order)
    assert np.array_equal(plan.offsets, again.offsets)


@needs_cpp
@given(problems(), st.sampled_from(POLICIES))
@settings(max_examples=150, deadline=None)
def test_backends_make_the_same_plan(problem, policy):
    lengths, budgets, max_items = problem
    arguments = (lengths, np.array(budgets), max_items or len(lengths) + 1, policy)
    for ours, theirs in zip(planner._planner.plan_packs(*arguments), planner_numpy.plan_packs(*arguments), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@needs_cpp
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("n", "budgets", "largest"),
    [
        (3000, [8192], 3000),  # three levels of the bitmap, bins closed by the stream policy
        (300, [2**40], 2**39),  # beyond buckets and counting sort
        (1500, [60, 8192, 3000], 60),  # more than 64 open bins; the first budget binds
        (1100, [10, 10], 10),  # more than 1024 open bins
    ],
)
def test_backends_make_the_same_plan_at_size(policy, n, budgets, largest):
    rng = np.random.default_rng(n)
    lengths = rng.integers(largest // 2, largest + 1, (n, len(budgets)))
    arguments = (lengths, np.array(budgets), n + 1, policy)
    for ours, theirs in zip(planner._planner.plan_packs(*arguments), planner_numpy.plan_packs(*arguments), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def best_fit_by_scanning(lengths, budget):
    """O(n^2): how many bins best-fit-decreasing opens."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(budget - length)
    return len(rooms)


@given(st.lists(st.integers(0, 50), max_size=80), st.integers(50, 120))
@settings(max_examples=100, deadline=None)
def test_best_fit_opens_as_many_bins_as_the_textbook(lengths, budget):
    assert len(plan_packs(lengths, budget)) == best_fit_by_scanning(lengths, budget)


def test_fill_on_mixed_lengths():
    """Captions, images and audio of one sample: a mean of about 500 tokens leaves little room unused."""
    rng = np.random.default_rng(0)
    n = 10_000
    lengths = rng.integers(5, 60, n) + rng.integers(64, 400, n) + rng.integers(0, 800, n) * (rng.random(n) < 0.6)
    plan = plan_packs(lengths, 8192)
    assert plan.fill >= 0.99
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
    with pytest.raises(ValueError, match=r"item 1 has length\[1\] 5, over the budget\[1\] of 4"):
        plan_packs([[3, 4], [1, 5]], [8, 4])


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
        (([1], 0), {}, "budget is 0, expected at least 1"),
        (([1, -1], 8), {}, "item 1 has a negative length"),
        (([1], 8), {"max_items": 0}, "max_items is 0, expected at least 1"),
        (([1], 8), {"policy": "worst"}, "policy is 'worst', expected one of best_fit, first_fit, stream"),
        (([1], 8), {"long": "truncate"}, "long is 'truncate', expected one of error, split, drop"),
        (([[1, 2]], 8), {}, r"lengths has shape \[1, 2\] for 1 budgets"),
        (([[1, 2]], [8, 8]), {"long": "split"}, "long='split' needs one budget, got 2"),
    ],
)
def test_errors_say_which_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(*arguments, **options)


def test_costs_are_not_here_yet():
    with pytest.raises(NotImplementedError, match="costs comes with issue 4"):
        plan_packs([1], 8, costs=[1.0])
