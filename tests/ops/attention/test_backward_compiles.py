"""What backward kernels compile to: the fused one's two dQ bodies for sm_90, which `benchmarks gpu` runs; spills."""

import pytest
import torch

from mmkernels import inspect
from mmkernels.ops.attention import configs


@pytest.mark.parametrize(
    ("tma", "has", "has_not"), [(True, "cp.reduce.async.bulk", "red.global"), (False, "atom", "cp.reduce")]
)
def test_bodies(tma, has, has_not):
    pytest.importorskip("triton")
    from mmkernels.ops.attention.kernel_specs import spec

    kernel, _ = inspect.compile_spec(spec("fused", "bf16", 64, configs.Config(128, 64, 8, 2, tma=tma), True), "sm_90")
    ptx = kernel.asm["ptx"]
    adds = [
        line
        for line in ptx.splitlines()
        if "add" in line and ("cp.reduce" in line or "atom." in line or "red." in line)
    ]
    assert any(has in line for line in adds), adds[:3]
    assert not any(has_not in line for line in adds), adds[:3]
    assert "wgmma" in ptx


def test_dropout_leaves_registers_on_sm80():
    """Tiles as without it spilled 13 KB a thread: gigabytes of local memory on an A100."""
    pytest.importorskip("triton")
    from mmkernels.ops.attention.kernel_specs import EXTRAS, spec

    (config,) = configs.built_in("sm_80", 2, 64, True, True).dkdv
    row = inspect.inspect_spec(spec("dkdv", "bf16", 64, config, True, EXTRAS), "sm_80")
    assert row["spill_bytes"] < 100


def test_a_descriptor_is_made_of_every_dq_sum():
    # Rows of odd widths are padded to 16 bytes, so that the hardware takes their strides.
    from mmkernels.ops.attention.triton_launch import descriptor
    from mmkernels.ops.attention.triton_launch_backward import zeroed_dq_sum

    for width in (8, 33, 250):
        dq_sum = zeroed_dq_sum(torch.empty(5, 3, width, dtype=torch.float16))
        assert dq_sum.shape == (5, 3, width)
        assert descriptor(dq_sum, 64) is not None
