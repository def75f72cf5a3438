"""What Config.late compiles to for sm_90: which products are in flight while a softmax is computed.

The order of the loop over whole blocks in TTGIR: products (dot, all asynchronous), waits for all of them, exponentials.
A product that no wait follows before an exponential, or before the next step's first product, may run meanwhile.
"""

import re

import pytest

from mmkernels import dispatch, inspect
from mmkernels.ops.attention.configs import Config

ORDERS = {
    ("fwd", False): "dot wait exp2 exp2 dot",
    ("fwd", True): "dot wait dot exp2 exp2",  # scores; the block before's values; p and alpha
    ("dkdv", False): "dot wait exp2 dot dot wait dot",
    ("dkdv", True): "dot wait exp2 dot wait dot dot",  # scores; dp; dv, dk
}


@pytest.mark.parametrize(("kernel", "late"), ORDERS, ids=str)
def test_order_of_the_loop(kernel, late):
    pytest.importorskip("triton")
    if dispatch.triton_version() != (3, 6):
        pytest.skip("the order is that of Triton 3.6")
    from mmkernels.ops.attention.kernel_specs import spec

    compiled, _ = inspect.compile_spec(spec(kernel, "bf16", 64, Config(64, 32, 4, 3, late=late), False), "sm_90")
    first_inner_loop = re.search(r"scf\.for(?:(?!scf\.for).)*?scf\.yield", compiled.asm["ttgir"], re.DOTALL).group()
    names = {"warp_group_dot ": "dot", "warp_group_dot_wait ": "wait", "math.exp2 ": "exp2"}
    found = [names[match] for match in re.findall("|".join(names), first_inner_loop)]
    assert " ".join(found) == ORDERS[kernel, late]
