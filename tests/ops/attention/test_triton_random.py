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

PER_TEST = 25


def run(first, count):
    """Pooled by dtype, and apart for the fused kernel: see Pool."""
    pools = {}
    for seed in range(first, first + count):
        case = random_case(seed)
        pool = pools.setdefault((case.options["dtype"], "fused" in case.kernels), Pool())
        with case.configured(), poisoned_empty():
            check(case.layout, case.mask, k_layout=case.k_layout, impl="triton", pool=pool, **case.options)
    for (dtype, fused), pool in pools.items():
        biases = pool.results.pop("dbias", None)
        if biases and not (fused and dtype == torch.float16):
            check_bias_gradients(biases)
        pool.check()


def check_bias_gradients(cases):
    """Few numbers, each a sum over many pairs whose terms cancel: luck enough that their rms may be 4 times torch's.

    test_triton_backward.py holds the pair to the error rule, and the fused kernel, whose dbias inherits the rounding of
    a 16-bit out, to a bound of its own.
    """
    ours, ref, torchs = (torch.cat(parts).double() for parts in zip(*cases, strict=True))
    assert (ours - ref).square().mean() <= 16 * (torchs - ref).square().mean()


@pytest.mark.parametrize("block", range(4))
def test_error_rule(block):
    run(PER_TEST * block, PER_TEST)


@pytest.mark.extended
@pytest.mark.parametrize("block", range(4, 80))
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
