"""Runs, against brute force: a visible pair is let through by exactly one run, a hidden one by none.

This is what lets the CPU path leave the mask out.  And: equal runs together, equal masks once, memory bounded.
"""

import contextlib

import numpy as np
import pytest
import torch
from attention_oracle import CROSS_MASKS, MASKS, brute_force, shared_layout
from largest_tensor import LargestTensor

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention import torch_blockwise, torch_runs
from mmkernels.ops.attention.torch_impl import schedule
from mmkernels.ops.attention.torch_runs import CAUSAL, FULL, MASKED
from mmkernels.ops.attention.torch_views import Schedule, runs_of


def _runs(layout, mask, k_layout=None):
    """The runs, their plan and what the operator is handed."""
    plan = MaskPlan(layout, mask or AttentionMask(), k_layout)
    lowered = _Lowered(plan, schedule(plan, None))
    return list(runs_of(lowered, 1, 1)), lowered


class _Lowered(tuple):
    """What a run reads of inputs.Lowered."""

    def __new__(cls, plan, parts):
        return super().__new__(cls, (plan.q_table, plan.k_table, *parts))

    q_table = property(lambda self: self[0])
    k_table = property(lambda self: self[1])


def _seen(runs, lowered, shape):
    """How often each query-key pair is let through by a run."""
    seen = np.zeros(shape, int)
    for run in runs:
        mask = run.mask(lowered, slice(0, run.q_len))
        own = np.ones((run.q_len, run.k_len), int)
        if run.kind == CAUSAL:
            assert run.q_len == run.k_len
            own = np.tri(run.q_len, dtype=int)
        elif run.kind == MASKED:
            own = (mask.numpy() == 0).astype(int)
            assert own.any(1).all()  # the kernel has no answer for a row that sees nothing
            assert not own.all()
        for queries, keys in zip(run.query_tokens().numpy(), run.key_tokens().numpy(), strict=True):
            seen[np.ix_(queries, keys)] += own
    return seen


@pytest.mark.parametrize("kept", [1 << 24, 40, 0])  # masks: all kept, some, none
@pytest.mark.parametrize("call_cost", [2000, 60, 0])  # samples and masked runs: whole, some cut, all cut
@pytest.mark.parametrize("cross", [False, True])
def test_runs_against_brute_force(cross, call_cost, kept, monkeypatch):
    monkeypatch.setattr(torch_runs, "MAX_KEPT", kept)
    monkeypatch.setattr(torch_runs, "CALL_COST", call_cost)
    monkeypatch.setattr(torch_runs, "WIDE_ROWS", 16)
    monkeypatch.setattr(torch_runs, "LONG_STRETCH", 5)
    for kind, make in (CROSS_MASKS if cross else MASKS).items():
        for seed in range(6):
            layout, k_layout = shared_layout(seed), shared_layout(seed + 10) if cross else None
            mask = make(layout, seed)
            runs, lowered = _runs(layout, mask, k_layout)
            expected = brute_force(layout, mask, k_layout).numpy()
            seen = _seen(runs, lowered, expected.shape)
            assert (seen == expected).all(), (kind, seed)
            parts = Schedule.of(lowered)
            blind = parts.blind_queries()
            assert set([] if blind is None else blind.tolist()) == set(np.flatnonzero(~expected.any(1)).tolist())
            assert len(parts.masks) <= max(kept, 2)
            touched = np.zeros(expected.shape[1], int)
            for run in runs:
                np.add.at(touched, run.key_tokens().numpy(), 1)
            assert parts.covered == (touched == 1).all()


def _shapes(layout, mask, k_layout=None):
    runs, _ = _runs(layout, mask, k_layout)
    return sorted((run.q_start, run.q_len, run.k_len, run.count, run.kind) for run in runs)


def test_isolated_modalities_need_no_mask():
    layout = PackedLayout.from_counts([[50, 70, 30], [50, 0, 30], [0, 0, 40]])
    assert {kind for *_, kind in _shapes(layout, AttentionMask.isolated(3))} == {FULL}
    # Text, image, text of one sample: the two texts are gathered into one run, where that computes less.
    layout = PackedLayout.from_segments([[(0, 200), (1, 300), (0, 200)]], num_modalities=2)
    assert [shape[1:] for shape in _shapes(layout, AttentionMask.isolated(2))] == [
        (400, 400, 1, FULL),
        (300, 300, 1, FULL),
    ]
    # Of a few tokens one run with a mask costs less than two.
    layout = PackedLayout.from_segments([[(0, 2), (1, 3), (0, 2)]], num_modalities=2)
    assert _shapes(layout, AttentionMask.isolated(2)) == [(0, 7, 7, 1, MASKED)]


def test_equal_runs_at_equal_distances_are_one_batch():
    layout = PackedLayout.from_counts([[4], [4], [0], [4], [6], [4]])
    assert _shapes(layout, None) == [(0, 4, 4, 3, FULL), (12, 6, 6, 1, FULL), (18, 4, 4, 1, FULL)]
    assert _shapes(layout, AttentionMask(causal=True))[0] == (0, 4, 4, 3, CAUSAL)
    assert _shapes(layout, AttentionMask(window=(1, 1)))[0] == (0, 4, 4, 3, MASKED)  # one mask for all three
    # Not adjacent: texts of 40 with images of 60 between them.
    layout = PackedLayout.from_counts([[40, 60]] * 4)
    assert _shapes(layout, AttentionMask.isolated(2)) == [(0, 40, 40, 4, FULL), (40, 60, 60, 4, FULL)]


def test_equal_masks_are_kept_once():
    layout = PackedLayout.from_counts([[2000]] * 3)
    runs, lowered = _runs(layout, AttentionMask(window=(20, 20)))
    # Blocks of 64 rows, alike but for the first and the last two of a sample, where the window meets its ends.
    assert sum(run.count for run in runs) == 3 * -(-2000 // (torch_runs.WIDE_ROWS // 2))
    assert len({run.mask_at for run in runs}) == 4
    assert len(Schedule.of(lowered).masks) <= 4 * 64 * 104


def test_masked_runs_leave_out_what_no_row_sees():
    def computed(segments, mask):
        layout = PackedLayout.from_segments([segments], num_modalities=2)
        runs, _ = _runs(layout, mask)
        return sum(run.count * run.q_len * run.k_len for run in runs) / MaskPlan.lower(layout, mask).visible_pairs

    mixed = [(0, 100), (1, 400), (0, 60), (1, 300), (0, 140)]
    assert computed(mixed, AttentionMask(causal=True, bidirectional=(1,))) < 1.1
    assert computed(mixed, AttentionMask(causal=True, prefix=(500,))) < 1.15
    assert computed(mixed, AttentionMask(visible=[[True, True], [False, True]])) == 1.0
    assert computed([(0, 3000)], AttentionMask(window=(300, 300))) < 1.3


def test_no_mask_grows_with_the_square_of_a_sample():
    layout = PackedLayout.from_counts([[40_000]])
    runs, lowered = _runs(layout, AttentionMask(causal=True, prefix=(7,)))
    assert max(run.q_len for run in runs) <= torch_runs.WIDE_ROWS
    assert len(Schedule.of(lowered).masks) <= torch_runs.MAX_KEPT


# A mask kept and one built in each call, in one process with a model that is loaded in bf16, or on another device.
@pytest.mark.parametrize("kept", [1 << 24, 0])
@pytest.mark.parametrize("extras", [{}, {"pair_bias": torch.zeros(1, 1, 1), "dropout_p": 0.1}])
@pytest.mark.parametrize("setting", [torch.float64, torch.bfloat16, torch.device("meta")], ids=repr)
def test_torchs_defaults_of_dtype_and_device_change_nothing(setting, extras, kept, monkeypatch):
    monkeypatch.setattr(torch_runs, "MAX_KEPT", kept)
    leaves = [torch.randn(300, 1, 8, requires_grad=True) for _ in range(3)]

    def gradients():
        layout = PackedLayout.from_counts([[300]])  # keys in several runs
        mask = AttentionMask(causal=True, window=(150, -1))
        torch.manual_seed(0)
        out = attention(*leaves, layout=layout, mask=mask, impl="torch", **extras)
        return torch.autograd.grad(out.square().sum(), leaves)

    expected = gradients()
    default, context = torch.get_default_dtype(), contextlib.nullcontext()
    if isinstance(setting, torch.device):
        context = setting
    else:
        torch.set_default_dtype(setting)
    try:
        with context:
            found = gradients()
    finally:
        torch.set_default_dtype(default)
    assert all(map(torch.equal, found, expected))


# Blind queries, keys in several runs, masks beyond what is kept.
@pytest.mark.parametrize("mask", [None, AttentionMask(causal=True, visible=[[1, 0], [1, 1]])])
@pytest.mark.parametrize("extras", [False, True])
def test_no_tensor_grows_with_the_square_of_a_sample(extras, mask, monkeypatch):
    monkeypatch.setattr(torch_runs, "MAX_KEPT", 1 << 16)
    layout = PackedLayout.from_counts([[1500, 1500]])
    q, k, v = torch.randn(3000, 3, 1, 8, requires_grad=True).unbind(1)
    options = {}
    if extras:
        options = {"pair_bias": torch.randn(1, 2, 2), "dropout_p": 0.1, "return_modality_mass": True}
    with LargestTensor() as seen:
        out, lse, *_ = attention(q, k, v, layout=layout, mask=mask, return_lse=True, impl="torch", **options)
        torch.autograd.grad((out, lse), (q, k, v), (out, lse))
    # A block of scores (twice: dropout pads keys to fours), or the mask of a block of rows.
    assert seen.elements <= max(2 * torch_blockwise.BLOCK, torch_runs.WIDE_ROWS * 3000) < 3000**2 / 10


@pytest.mark.parametrize("bidirectional", [(), (1,)])
@pytest.mark.parametrize("extras", ["none", "return_modality_mass", "dropout_p", "pair_bias"])
def test_a_default_device_reaches_nothing(extras, bidirectional):
    """With it on a GPU the tensors in between would be there."""
    layout = PackedLayout.from_counts([[5, 12], [3, 0], [40, 2]])
    q = torch.randn(layout.total_tokens, 4, 16, requires_grad=True)
    options = {"none": {}, "return_modality_mass": {extras: True}, "dropout_p": {extras: 0.5}}
    options["pair_bias"] = {extras: torch.zeros(4, 2, 2, requires_grad=True)}
    mask = AttentionMask(causal=True, bidirectional=bidirectional)
    with torch.device("meta"):
        result = attention(q, q, q, layout=layout, mask=mask, impl="torch", **options[extras])
        out = result[0] if isinstance(result, tuple) else result
        out.sum().backward()
    assert out.device.type == q.grad.device.type == "cpu"
