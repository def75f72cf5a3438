"""The error rule over random ragged layouts, Triton through the interpreter: 100 here, 2,000 with --extended.

Every mask kind, self- and cross-attention, head grouping, head width, extras, both schedules, descriptors and
pointers, the backward pair and the fused kernel.  bf16 is refused in the interpreter, whose bf16 products are wrong.
"""

import pytest
import torch
from attention_oracle import Pool, check
from triton_cases import random_case

from mmkernels.testing import poisoned_empty

pytestmark = pytest.mark.interpreter

PER_TEST = 10


def run(first, count):
    """Pooled by dtype, and apart for the fused kernel: see Pool."""
    pools = {}
    for seed in range(first, first + count):
        case = random_case(seed)
        fused = "fused" in case.kernels
        pool = pools.setdefault((case.options["dtype"], fused), Pool())
        with case.configured(), poisoned_empty():
            check(case.layout, case.mask, k_layout=case.k_layout, impl="triton", pool=pool, **case.options)
    for (_, fused), pool in pools.items():
        if fused:  # its dbias has a bound of its own in test_triton_backward.py
            pool.results.pop("dbias", None)
        pool.check()


@pytest.mark.parametrize("block", range(10))
def test_error_rule(block):
    run(PER_TEST * block, PER_TEST)


@pytest.mark.extended
@pytest.mark.parametrize("block", range(10, 200))
def test_error_rule_on_many(block):
    run(PER_TEST * block, PER_TEST)


def test_the_cases_cover_what_they_say():
    cases = [random_case(seed) for seed in range(100)]
    kinds = {(c.mask, c.k_layout is not None) for c in cases}
    assert len(kinds) > 16
    for seen, expected in (
        ({c.options["dtype"] for c in cases}, {torch.float32, torch.float16}),
        ({c.schedule for c in cases}, {"sample", "token"}),
        ({"fused" in c.kernels for c in cases}, {False, True}),
        ({c.kernels["fwd"].tma for c in cases}, {False, True}),
        ({c.options["heads"] // c.options["kv_heads"] for c in cases}, {1, 2, 3}),
        ({c.options["width"] for c in cases}, {8, 16, 24, 33, 80, 256}),
    ):
        assert seen == expected
