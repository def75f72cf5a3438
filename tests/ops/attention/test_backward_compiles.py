"""What the fused backward's two dQ bodies compile to for sm_90; `python -m benchmarks gpu` runs them."""

import pytest
import torch

from mmkernels.ops.attention import configs

CONFIG = configs.Config(128, 64, 8, 2)


def compiled(config, **extras):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mmkernels.ops.attention.kernel_specs import spec

    s = spec("fused", "bf16", 64, config, visible=True, **extras)
    attrs = {(s.fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in s.divisible_by_16}
    source = ASTSource(s.fn, s.signature, s.constexprs, attrs)
    options = {"num_warps": s.num_warps, "num_stages": s.num_stages}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.parametrize(
    ("tma", "has", "has_not"), [(True, "cp.reduce.async.bulk", "red.global"), (False, "atom", "cp.reduce")]
)
def test_bodies(tma, has, has_not):
    ptx = compiled(configs.Config(*CONFIG.flat()[:4], tma=tma))
    adds = [
        line
        for line in ptx.splitlines()
        if "add" in line and ("cp.reduce" in line or "atom." in line or "red." in line)
    ]
    assert any(has in line for line in adds), adds[:3]
    assert not any(has_not in line for line in adds), adds[:3]
    assert "wgmma" in ptx


def test_a_descriptor_is_made_of_every_dq_sum():
    # Rows of odd widths are padded to 16 bytes, so that the hardware takes their strides.
    from mmkernels.ops.attention.triton_launch import descriptor
    from mmkernels.ops.attention.triton_launch_backward import zeroed_dq_sum

    for width in (8, 33, 250):
        dq_sum = zeroed_dq_sum(torch.empty(5, 3, width, dtype=torch.float16))
        assert dq_sum.shape == (5, 3, width)
        assert descriptor(dq_sum, 64) is not None
