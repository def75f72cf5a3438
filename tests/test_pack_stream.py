"""PackStream: how items arrive changes nothing, nor does a stop in between.   n items, K budgets"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import pack_stream, packs_numpy
from mmkernels.pack_stream import PackStream
from mmkernels.packs import plan_packs
from mmkernels.planner_backend import BACKEND


@st.composite
def streams(draw):
    """(lengths [n, K], budgets, options, chunks): small budgets and few open packs, so that packs are closed."""
    budgets = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    columns = st.tuples(*[st.integers(0, b) for b in budgets])
    lengths = np.array(draw(st.lists(columns, max_size=60)), np.int64).reshape(-1, len(budgets))
    options = {"max_items": draw(st.sampled_from([None, 2])), "open_packs": draw(st.sampled_from([1, 3, 64]))}
    cuts = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    return lengths, budgets, options, np.split(lengths, cuts)


def as_lists(packs):
    return [items.tolist() for items in packs]


@given(streams(), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_chunks_and_resuming_change_nothing(problem, stop):
    lengths, budgets, options, chunks = problem
    whole = PackStream(budgets, **options)
    expected = as_lists(whole.push(lengths) + whole.flush())
    assert sorted(i for items in expected for i in items) == list(range(len(lengths)))
    for items in expected:
        assert (lengths[items].sum(0) <= budgets).all()
        assert items == sorted(items)
        assert options["max_items"] is None or len(items) <= options["max_items"]

    stream, found = PackStream(budgets, **options), []
    for step, chunk in enumerate(chunks):
        if step == stop:  # as after a crash: only what a checkpoint of text can hold
            state = json.loads(json.dumps(stream.state_dict()))
            stream = PackStream(budgets, **options)
            stream.load_state_dict(state)
        found += as_lists(stream.push(chunk))
        assert len(stream.state_dict()["packs"]) <= options["open_packs"]
    assert found + as_lists(stream.flush()) == expected


@pytest.mark.skipif(BACKEND != "cpp", reason="mmkernels._planner is not built")
@given(streams())
@settings(max_examples=100, deadline=None)
def test_backends_stream_alike(problem):
    _, budgets, options, chunks = problem
    stream, expected = PackStream(budgets, **options), []
    for chunk in chunks:
        expected += as_lists(stream.push(chunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_stream, "_backend", packs_numpy)
        again = PackStream(budgets, **options)
        assert [items for chunk in chunks for items in as_lists(again.push(chunk))] == expected
        assert again.state_dict() == stream.state_dict()


def test_the_stream_policy_is_the_stream():
    lengths = np.random.default_rng(0).integers(1, 900, 3000)
    stream = PackStream(1024)
    expected = as_lists(stream.push(lengths) + stream.flush())
    assert sorted(as_lists(plan_packs(lengths, 1024, policy="stream"))) == sorted(expected)


def test_it_goes_on_after_a_flush():
    stream = PackStream(8)
    assert stream.push([5, 2]) == []
    assert as_lists(stream.flush()) == [[0, 1]]
    assert stream.flush() == []
    assert as_lists(stream.push([8, 1]) + stream.flush()) == [[2], [3]]


def test_a_long_item_is_named_and_nothing_taken_in():
    stream = PackStream([8, 4])
    stream.push([[3, 3]])
    before = stream.state_dict()
    with pytest.raises(ValueError, match=r"item 2 has length\[1\] 5, over the budget\[1\] of 4; drop or split it"):
        stream.push([[3, 3], [1, 5]])
    assert stream.state_dict() == before


def test_errors():
    with pytest.raises(ValueError, match="PackStream: budget is 0, expected 1 to"):
        PackStream(0)
    with pytest.raises(ValueError, match="PackStream: max_items is 0"):
        PackStream(8, max_items=0)
    with pytest.raises(ValueError, match="PackStream: open_packs is 0"):
        PackStream(8, open_packs=0)
    with pytest.raises(ValueError, match="PackStream: open_packs is '4', expected a whole number of at least 1"):
        PackStream(8, open_packs="4")
    with pytest.raises(ValueError, match="PackStream: lengths is float64"):
        PackStream(8).push([1.5])
    with pytest.raises(ValueError, match=r"the state has budget \[8\], this stream \[9\]"):
        PackStream(9).load_state_dict(PackStream(8).state_dict())
    with pytest.raises(ValueError, match="the state has open_packs 64, this stream 2"):
        PackStream(8, open_packs=2).load_state_dict(PackStream(8).state_dict())
    assert as_lists(PackStream(8, max_items=2**70, open_packs=2**70).push([8, 8])) == []


@pytest.mark.parametrize(
    "change",
    [
        {"arrived": None},
        {"arrived": 1.5},
        {"arrived": -5},  # items of that number would be given out
        {"arrived": 1},  # fewer than lie in the packs
        {"next_pack": 0},
        {"packs": None},
        {"packs": [{"pack": 0, "items": [0]}]},
        {"packs": [{"pack": 0, "items": [0], "room": [3, 4]}]},
        {"packs": [{"pack": 0, "items": [0], "room": [-1]}]},
        {"packs": [{"pack": 0, "items": [0], "room": [9]}]},  # would be filled over the budget
        {"packs": [{"pack": 0, "items": [0], "room": [2**70]}]},
        {"packs": [{"pack": 0, "items": [0, 0], "room": [3]}]},
        {"packs": [{"pack": 0, "items": [], "room": [8]}]},
        {"packs": [{"pack": 0, "items": [0, 1], "room": [3]}], "max_items": 2},  # full: it would never be finished
        {"packs": [{"pack": p, "items": [p], "room": [3]} for p in range(2)], "open_packs": 1},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change):
    stream = PackStream(8, open_packs=change.get("open_packs", 64), max_items=change.get("max_items"))
    stream.push([5, 5][: stream._max_open])
    before = stream.state_dict()
    with pytest.raises(ValueError, match="PackStream: the state "):
        stream.load_state_dict(before | {"arrived": 2, "next_pack": 2} | change)
    assert stream.state_dict() == before
    with pytest.raises(ValueError, match="PackStream: the state is not what state_dict gives"):
        stream.load_state_dict({})
