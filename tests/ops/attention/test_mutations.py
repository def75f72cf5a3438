"""The error rule bites: attention with one small, typical mistake fails it, where the honest one passes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_oracle import Case, Pool, check_plan, compare

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.masks import MaskPlan

LAYOUT = PackedLayout.from_segments([[(0, 40), (1, 30)], [(1, 25)], [(0, 20), (2, 35)]], num_modalities=3)
MASK = AttentionMask(causal=True, bidirectional=(1,), visible=[[1, 1, 0], [1, 1, 1], [1, 1, 1]])
KV_LO, KV_HI = range(2)  # rows of the query table
K_BITS, K_MODALITY = 2, 3  # rows of the key table


def _bound_off_by_one(queries, keys):
    queries[KV_HI] = np.maximum(queries[KV_HI] - 1, queries[KV_LO])


def _first_key_lost(queries, keys):
    queries[KV_LO] = np.minimum(queries[KV_LO] + 1, queries[KV_HI])


def _one_query_loses_one_key(queries, keys):
    queries[KV_LO, 60] += 1


def _one_query_sees_the_next_sample(queries, keys):
    queries[KV_HI, 69] += 1


def _swapped_modality(queries, keys):
    keys[K_BITS] = np.where(keys[K_BITS] == 1, 4, np.where(keys[K_BITS] == 4, 1, keys[K_BITS]))


MISTAKES = (
    _bound_off_by_one,
    _first_key_lost,
    _one_query_loses_one_key,
    _one_query_sees_the_next_sample,
    _swapped_modality,
)


def _run(mistake, dtype, **changes):
    plan = MaskPlan(LAYOUT, MASK)  # not lower(): a plan of its own, to be spoilt
    if mistake is not None:
        mistake(plan.q_table.numpy(), plan.k_table.numpy())
    check_plan(plan, LAYOUT, MASK, dtype=dtype, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_honest_computation_passes(dtype):
    _run(None, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_a_wrong_mask_fails(mistake, dtype):
    with pytest.raises(AssertionError, match="error"):
        _run(mistake, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_scale_wrong_by_one_percent_fails(factor, dtype):
    with pytest.raises(AssertionError, match="error"):
        _run(None, dtype, scale_factor=factor)


def _swapped_bias_modality(queries, keys):
    keys[K_MODALITY] = np.where(keys[K_MODALITY] == 1, 2, keys[K_MODALITY])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pair_bias_passes_and_its_mistakes_fail(dtype):
    _run(None, dtype, bias_factor=1.0)
    with pytest.raises(AssertionError, match="error"):
        _run(None, dtype, bias_factor=0.0)  # a bias that is not there
    with pytest.raises(AssertionError, match="error"):
        _run(_swapped_bias_modality, dtype, bias_factor=1.0)


CASE = Case(LAYOUT, MASK, heads=4, kv_heads=2, width=32, pair_bias=True, dropout_p=0.2)


def _call_and_compare(
    dtype, *, seed=0, dropout_p=CASE.dropout_p, v_factor=1.0, change=lambda *results: results, pool=None
):
    """The reference on CASE with one mistake, by what it is given or by what is made of its results."""
    case = replace(CASE, dtype=dtype)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    torch.manual_seed(seed)
    results = attention(
        q, k, v * v_factor, layout=LAYOUT, mask=MASK, pair_bias=bias, dropout_p=dropout_p, return_lse=True,
        return_modality_mass=True, impl="reference",
    )  # fmt: skip
    compare(case, leaves, *change(*results), lse_gradient=True, pool=pool)


FEATURE_MISTAKES = {
    "no division by the keep rate": {"v_factor": 1 - CASE.dropout_p},
    "a keep rate wrong by one percent": {"v_factor": 1.01},
    "another seed": {"seed": 1},
    "one element in a thousand dropped too many": {"dropout_p": CASE.dropout_p + 0.001},
    "no dropout": {"dropout_p": 0.0},
    "no gradient through lse": {"change": lambda out, lse, mass: (out, lse.detach(), mass)},
    "lse in base 2": {"change": lambda out, lse, mass: (out, lse * 1.4427, mass)},
    "mass of another modality": {"change": lambda out, lse, mass: (out, lse, mass.roll(1, 2))},
    "mass after dropout": {"change": lambda out, lse, mass: (out, lse, mass * (torch.rand(mass.shape) < 0.8))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_lse_and_mass_pass(dtype):
    _call_and_compare(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mistake", FEATURE_MISTAKES)
def test_a_mistake_in_dropout_lse_or_mass_fails(mistake, dtype):
    with pytest.raises(AssertionError, match="error"):
        _call_and_compare(dtype, **FEATURE_MISTAKES[mistake])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_mistake_among_many_cases_fails(dtype):
    honest = Pool()
    for _ in range(15):
        _call_and_compare(dtype, pool=honest)
    honest.check()
    for mistake in FEATURE_MISTAKES.values():
        pool = Pool()
        pool.results = {name: list(cases) for name, cases in honest.results.items()}
        _call_and_compare(dtype, pool=pool, **mistake)
        with pytest.raises(AssertionError, match="error"):
            pool.check()
