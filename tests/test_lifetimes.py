"""What a batch holds goes with its last reference: training loops turn the cyclic collector off."""

import gc
import weakref

import pytest
import torch

from mmkernels import (
    AttentionMask,
    PackedLayout,
    attention,
    attention_qkvpacked,
    modality_embed,
    pack,
    pad,
    segment_mean,
    unpack,
)
from mmkernels.masks import MaskPlan

COUNTS = [[3, 4], [0, 5], [0, 0]]


def attends(layout, **options):
    q, k, v = (torch.randn(layout.total_tokens, 2, 16, requires_grad=True) for _ in range(3))
    for _ in range(2):  # the second call goes by what the first has found out
        attention(q, k, v, layout=layout, **options).sum().backward()


def crosses(layout):
    keys = PackedLayout.from_counts([[2], [1], [4]])
    q, kv = torch.randn(12, 2, 16, requires_grad=True), torch.randn(7, 2, 16, requires_grad=True)
    attention(q, kv, kv, layout=layout, k_layout=keys, mask=AttentionMask(causal=True)).sum().backward()


def moves(layout):
    streams = [torch.randn(n, 8, requires_grad=True) for n in layout.stream_lengths]
    packed = modality_embed(streams, layout, modality_weight=torch.randn(2, 8))
    (pack(unpack(packed, layout), layout).sum() + pad(packed, layout)[0].sum()).backward()
    segment_mean(packed, layout)


USES = {
    "everything": attends,
    "causal": lambda layout: attends(layout, mask=AttentionMask(causal=True, bidirectional=(1,))),
    "isolated": lambda layout: attends(layout, mask=AttentionMask.isolated(2)),
    "torch": lambda layout: attends(layout, impl="torch"),
    "reference": lambda layout: attends(layout, impl="reference"),
    "qkvpacked": lambda layout: attention_qkvpacked(
        torch.randn(12, 3, 2, 16, requires_grad=True), layout=layout
    ).sum().backward(),
    "cross": crosses,
    "another device": lambda layout: MaskPlan.lower(layout.to("meta"), AttentionMask(causal=True)),
    "moves": moves,
}  # fmt: skip


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", USES)
def test_a_layout_goes_without_the_cyclic_collector(use, no_collector):
    layout = PackedLayout.from_counts(COUNTS)
    USES[use](layout)
    kept = [plan for plans in layout.cache.values() if isinstance(plans, tuple) for plan in plans]
    plans = [weakref.ref(plan) for plan in kept if isinstance(plan, MaskPlan)]
    kept.clear()
    assert plans or use == "moves"
    gone = weakref.ref(layout)
    del layout
    assert gone() is None
    assert all(plan() is None for plan in plans)


def test_a_plan_outlives_its_layout(no_collector):
    plan = MaskPlan.lower(PackedLayout.from_counts(COUNTS), AttentionMask(causal=True))
    assert plan.k_layout.cu_seqlens.tolist() == [0, 7, 12, 12]
    assert len(plan.tiles("query", 4, 4).tiles) == 4  # two of each sample that is not empty
