"""The error rule bites: attention with one small, typical mistake fails it, where the honest one passes."""

import numpy as np
import pytest
import torch
from attention_oracle import check_plan

from mmkernels import AttentionMask, PackedLayout
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
