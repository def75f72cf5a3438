"""What the two ways of the forward to load K and V compile to for sm_90: strides may ask for either."""

import itertools

import pytest

from mmkernels import inspect
from mmkernels.ops.attention import configs


# D 64 and 96: a width that the tile pads goes through the same descriptors.
@pytest.mark.parametrize(("head_dim", "tma"), [(64, False), (64, True), (96, True)])
def test_bodies(head_dim, tma):
    pytest.importorskip("triton")
    from mmkernels.ops.attention.kernel_specs import spec

    row = inspect.inspect_spec(spec("fwd", "bf16", head_dim, configs.Config(128, 64, 8, 3, tma=tma), True), "sm_90")
    assert inspect.problems(row) == []
    assert row["wgmma"] > 0
    assert row["spill_bytes"] == 0
    assert (row["tma"] > 0) is tma


def test_an_absent_feature_leaves_no_code():
    pytest.importorskip("triton")
    from mmkernels.ops.attention.kernel_specs import spec

    config = configs.Config(64, 32, 4, 2)
    plain, mass = (inspect.inspect_spec(spec("fwd", "fp16", 32, config, False, e), "sm_90") for e in ((), ("mass",)))
    assert plain["registers"] < mass["registers"]


def test_defaults_fit_the_shared_memory_of_an_sm():
    """K, V of every stage, and Q: 227 KiB on sm_90, 99 KiB on the smaller ones that sm_80's table serves."""
    for family, room in (("sm_80", 99), ("sm_90", 227)):
        for itemsize in (2, 4):
            for width in configs.BUCKETS:
                for extras, visible in itertools.product((False, True), repeat=2):
                    for c in configs.built_in(family, itemsize, width, extras, visible).fwd:
                        tiles = (c.rows + 2 * max(1, c.stages - 1) * c.cols) * configs.padded(width) * itemsize
                        assert tiles <= room * 1024, (family, itemsize, width, c)
