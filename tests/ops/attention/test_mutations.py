"""The error rule bites: attention with one small, typical mistake fails it, where the honest one passes."""

import numpy as np
import pytest
import torch
from attention_oracle import check_plan

from mmkernels import AttentionMask, PackedLayout
from mmkernels.masks import MaskPlan

LAYOUT = PackedLayout.from_segments([[(0, 40), (1, 30)], [(1, 25)], [(0, 20), (2, 35)]], num_modalities=3)
MASK = AttentionMask(causal=True, bidirectional=(1,), visible=[[1, 1, 0], [1, 1, 1], [1, 1, 1]])
KV_LO, KV_HI, Q_LO, Q_HI, Q_BITS, K_BITS = range(6)


def _bound_off_by_one(table):
    table[KV_HI] = np.maximum(table[KV_HI] - 1, table[KV_LO])


def _first_key_lost(table):
    table[KV_LO] = np.minimum(table[KV_LO] + 1, table[KV_HI])


def _one_query_loses_one_key(table):
    table[KV_LO, 60] += 1


def _one_query_sees_the_next_sample(table):
    table[KV_HI, 69] += 1


def _swapped_modality(table):
    table[K_BITS] = np.where(table[K_BITS] == 1, 4, np.where(table[K_BITS] == 4, 1, table[K_BITS]))


MISTAKES = (
    _bound_off_by_one,
    _first_key_lost,
    _one_query_loses_one_key,
    _one_query_sees_the_next_sample,
    _swapped_modality,
)


def _run(mistake, dtype, scale_factor=1.0):
    plan = MaskPlan(LAYOUT, MASK)  # not lower(): a plan of its own, to be spoilt
    if mistake is not None:
        mistake(plan.table.numpy())
    check_plan(plan, LAYOUT, MASK, dtype=dtype, scale_factor=scale_factor)


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
