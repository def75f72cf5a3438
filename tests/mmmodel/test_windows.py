"""The image CNN on gathered windows: the same as its convolutions, for any shapes, in as many operators for all."""

import collections
import copy

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmmodel import configs
from mmmodel.flops import StepFlops
from mmmodel.frontends.image import CELL, ImageFrontEnd
from mmmodel.frontends.windows import Axis, Conv, Windows

AXES = [(Axis(8, 4, 4), Axis(2, 1, 1)), (Axis(3, 2, 1), Axis(3, 2, 1)), (Axis(5, 3, 2), Axis(2, 2, 1))]


@pytest.fixture(scope="module")
def front_end():
    torch.manual_seed(0)
    return ImageFrontEnd(configs.tiny().model, None)


def pictures(cells, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (3, CELL * rows, CELL * cols), dtype=np.uint8) for rows, cols in cells]


def ragged(seed, count=12):
    rng = np.random.default_rng(seed)
    return [(1, 1), (1, 6), (5, 1), *map(tuple, rng.integers(1, 5, (count, 2)))]


def results(front_end, way, chunks):
    """Result and the gradient of every parameter."""
    out = getattr(front_end, way)(chunks)
    gradient = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, list(front_end.parameters()), gradient)]


@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients_are_those_of_the_convolutions(front_end, seed):
    exact = copy.deepcopy(front_end).double()
    _, *chunks = exact.collate(pictures(ragged(seed), seed))
    for ours, theirs in zip(results(exact, "at_once", chunks), results(exact, "by_shape", chunks), strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()


@pytest.mark.parametrize(("down", "right"), AXES)
def test_windows_read_what_a_convolution_reads_and_positions_know_who_reads_them(down, right):
    windows = Windows(down, right, ((2, 3), (1, 1), (3, 1), (1, 4)))
    reads, outside = windows.reads(torch.device("cpu"))
    expected, first = [], 0
    for rows, cols in windows.shapes:
        high, wide = rows * down.stride, cols * right.stride
        for row, col in np.ndindex(rows, cols):
            for a, b in np.ndindex(down.kernel, right.kernel):
                y, x = row * down.stride - down.before + a, col * right.stride - right.before + b
                assert y < high
                assert x < wide
                expected.append(first + y * wide + x if y >= 0 and x >= 0 else -1)
        first += high * wide
    assert torch.where(outside, -1, reads).tolist() == expected
    readers = collections.defaultdict(set)
    for place, position in enumerate(expected):
        readers[position].add(place)
    found = windows.used_by(torch.device("cpu"))
    assert len(found) == first
    for position, places in enumerate(found.tolist()):
        used = [place for place in places if place != 0]
        assert sorted(used) == sorted(readers[position])
    assert 0 in readers[-1]  # what stands for no place is outside of its picture


def test_autocast_gathers_in_its_dtype_and_stays_close(front_end):
    _, *chunks = front_end.collate(pictures(ragged(3)))
    with torch.autocast("cpu", torch.bfloat16), Dtypes() as seen:
        found = front_end.at_once(chunks)
    exact = front_end.at_once(chunks)
    assert seen.floats("aten::index_select") == {torch.bfloat16}
    assert (found.float() - exact).square().mean() <= 1e-4 * exact.square().mean()


def test_as_many_operators_for_one_shape_as_for_many(front_end):
    counts = []
    for cells in ([(2, 2)] * 4, ragged(4, 40)):
        _, *chunks = front_end.collate(pictures(cells))
        with Dtypes() as forward:
            out = front_end.at_once(chunks)
        with Dtypes() as backward:
            out.sum().backward()
        counts.append((forward.total(), backward.total()))
        front_end.zero_grad()
    assert len(chunks) > 10
    assert counts[0] == counts[1]


def test_no_value_is_read_back_from_the_device(front_end):
    """On fake tensors, where asking for a value is an error."""
    _, *chunks = front_end.collate(pictures(ragged(5)))
    with FakeTensorMode() as mode:
        fake = ImageFrontEnd(configs.tiny().model, None)
        out = fake.at_once([mode.from_tensor(chunk) for chunk in chunks])
        out.sum().backward()
    assert out.shape == front_end.at_once(chunks).shape


def test_multiplications_are_counted_alike(front_end):
    _, *chunks = front_end.collate(pictures(ragged(6)))
    totals = []
    for way in ("by_shape", "at_once"):
        with StepFlops(front_end) as flops:
            getattr(front_end, way)(chunks)
        totals.append(flops.total)
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("axis", [(3, 2, 0), (3, 1, 3), (5, 2, 2)])
def test_an_axis_whose_windows_end_outside_or_begin_inside_is_an_error(axis):
    with pytest.raises(ValueError, match="must begin in front of a picture and end inside it"):
        Axis(*axis)


def test_a_grouped_convolution_has_the_weights_of_a_plain_one():
    conv = Conv(3, 5, 7, 4, group=4)
    flat = conv.flat_weight()
    assert flat.shape == (5, conv.flat_width) == (5, 192)
    assert flat.count_nonzero() == conv.weight.count_nonzero()


class Dtypes(TorchDispatchMode):
    """Operators that ran, views left out, and the dtype of their first tensor."""

    def __init__(self):
        super().__init__()
        self.names = collections.defaultdict(list)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            first = next((a for a in args if isinstance(a, torch.Tensor)), None)
            self.names[operator.name().split(".")[0]].append(None if first is None else first.dtype)
        return operator(*args, **(kwargs or {}))

    def floats(self, name):
        return {dtype for dtype in self.names[name] if dtype.is_floating_point}

    def total(self):
        return sum(map(len, self.names.values()))
