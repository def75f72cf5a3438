"""balance_ranks: every item on one rank, even loads, C++ and numpy agree.   n items, K costs, R ranks"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import packs_numpy, ranks
from mmkernels.planner_backend import BACKEND
from mmkernels.ranks import balance_ranks


@st.composite
def problems(draw):
    """(costs [n] or [n, K], world_size, equal_count): fewer items than ranks, zeros, many equals, one giant."""
    kinds = draw(st.sampled_from([None, 1, 3]))
    cost = draw(st.sampled_from([st.integers(0, 5), st.floats(0, 1e6, allow_subnormal=False)]))
    row = cost if kinds is None else st.lists(cost, min_size=kinds, max_size=kinds)
    costs = np.array(draw(st.lists(row, max_size=30)), float)
    costs = costs.reshape(len(costs), *([] if kinds is None else [kinds]))
    return costs, draw(st.integers(1, 6)), draw(st.booleans())


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_item_has_a_rank(problem):
    costs, world_size, equal_count = problem
    found = balance_ranks(costs, world_size, equal_count=equal_count)
    assert (found.dtype, found.shape) == (np.int64, (len(costs),))
    assert ((found >= 0) & (found < world_size)).all()
    if equal_count:
        assert np.ptp(np.bincount(found, minlength=world_size)) <= 1
    np.testing.assert_array_equal(found, balance_ranks(costs.copy(), world_size, equal_count=equal_count))


@pytest.mark.skipif(BACKEND != "cpp", reason="mmkernels._planner is not built")
@given(problems())
@settings(max_examples=150, deadline=None)
def test_backends_agree(problem):
    costs, world_size, equal_count = problem
    expected = balance_ranks(costs, world_size, equal_count=equal_count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_backend", packs_numpy)
        np.testing.assert_array_equal(balance_ranks(costs, world_size, equal_count=equal_count), expected)


@pytest.mark.skipif(BACKEND != "cpp", reason="mmkernels._planner is not built")
@pytest.mark.parametrize("equal_count", [False, True])
def test_backends_agree_where_kinds_are_missing(equal_count):
    """Items that cost nothing of what the heaviest rank has most of: moving one does not make it lighter."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        costs = rng.integers(1, 9, (40, 3)) * (rng.random((40, 3)) < 0.4)
        expected = balance_ranks(costs, 5, equal_count=equal_count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "_backend", packs_numpy)
            np.testing.assert_array_equal(balance_ranks(costs, 5, equal_count=equal_count), expected)


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_one_cost_is_within_four_thirds_of_the_best(costs, world_size):
    """Graham's bound, against every assignment there is."""
    found = np.bincount(balance_ranks(costs, world_size), weights=costs, minlength=world_size).max()
    best = min(
        max(sum(c for c, r in zip(costs, way, strict=True) if r == rank) for rank in range(world_size))
        for way in itertools.product(range(world_size), repeat=len(costs))
    )
    assert found <= 4 / 3 * best


@pytest.mark.parametrize("equal_count", [False, True])
@pytest.mark.parametrize(("n", "world_size"), [(256, 8), (2048, 64)])
@pytest.mark.parametrize(("kinds", "most"), [(1, 1.005), (3, 1.05)])
def test_loads_are_even_at_32_items_a_rank(n, world_size, kinds, most, equal_count):
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(5, 0.8, n), 8, 2048)
    image = (rng.random(n) < 0.7) * rng.integers(144, 1024, n)
    audio = (rng.random(n) < 0.5) * rng.integers(50, 1500, n)
    costs = np.stack([text, image, audio], 1)[:, :kinds]
    found = balance_ranks(costs, world_size, equal_count=equal_count)
    for kind in costs.T:
        loads = np.bincount(found, weights=kind, minlength=world_size)
        assert loads.max() <= most * loads.mean()


@pytest.mark.parametrize("equal_count", [False, True])
def test_ranks_without_an_item_cost_nothing(equal_count):
    """A table of 2**40 ranks would fill the memory."""
    found = balance_ranks([1, 3, 2], 2**40, equal_count=equal_count)
    np.testing.assert_array_equal(found, balance_ranks([1, 3, 2], 4, equal_count=equal_count))


def test_swaps_improve_on_giving_out():
    """Longest first gives 3+2+2 against 3+2; the best is 3+3 against 2+2+2."""
    assert np.bincount(balance_ranks([3, 3, 2, 2, 2], 2), weights=[3, 3, 2, 2, 2]).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], 0), "world_size is 0, expected a whole number of at least 1"),
        (([1, 2], 1.5), "world_size is 1.5, expected a whole number"),
        (([1, 2], "2"), "world_size is '2', expected a whole number"),
        (([1, 2], None), "world_size is None, expected a whole number"),
        (([1, -2], 2), r"item 1 costs \[-2.0\], expected finite numbers >= 0"),
        (([[1, 2], [3, np.nan]], 2), r"item 1 costs \[3.0, nan\]"),
        (([np.inf], 2), r"item 0 costs \[inf\]"),
        (([1e308] * 10, 2), "sum to more than a float64 holds"),
        ((["a"], 2), "expected numbers"),
        (([[1, 2], [3]], 2), r"costs\[1\] has 1 entries, expected 2 as costs\[0\]"),
        (([1, 2], True), "world_size is True, expected a whole number"),
        ((np.zeros((2, 2, 2)), 2), r"costs has shape \[2, 2, 2\], expected \[n\] or \[n, K\]"),
        ((np.zeros((2, 0)), 2), r"costs has shape \[2, 0\]"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        balance_ranks(*arguments)
