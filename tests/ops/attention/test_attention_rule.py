"""The error rule over random ragged layouts on CPU: every mask kind, self- and cross-attention, features and dtypes.

1,200 layouts for each implementation, a few dozen tokens each because the oracle's mask is made pair by pair.
`extended`: three times as many, and longer.
"""

import pytest
import torch
from attention_oracle import CPU_IMPLS, CROSS_MASKS, MASKS, Pool, check, shared_layout

from mmkernels import AttentionMask, PackedLayout
from mmkernels.ops.attention import torch_blockwise, torch_runs
from mmkernels.testing import poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = {
    "plain": {},
    "lse": {"lse_gradient": True},
    "bias": {"pair_bias": True, "mass": True},
    "dropout": {"dropout_p": 0.3, "mass": True},
    "all": {"pair_bias": True, "dropout_p": 0.1, "mass": True, "lse_gradient": True},
}
# Heads, key heads, width: MHA, GQA and MQA; widths at both ends, not powers of two, odd.
SHAPES = [(2, 2, 16), (4, 2, 8), (3, 1, 40), (1, 1, 64), (4, 4, 33), (2, 1, 80), (1, 1, 256)]


def _pool(features):
    return Pool(4.0 if "dropout_p" in FEATURES[features] else 2.0)


def _sweep(features, dtype, impl, count, max_length):
    """`count` layouts of each mask kind, of seeds that no other (features, dtype) has."""
    seed = (list(FEATURES).index(features) * len(DTYPES) + DTYPES.index(dtype)) * 1000
    pool = _pool(features)
    for masks in (MASKS, CROSS_MASKS):
        for make in masks.values():
            for _ in range(count):
                seed += 1
                heads, kv_heads, width = SHAPES[seed % len(SHAPES)]
                layout = shared_layout(seed, max_length)
                with poisoned_empty():
                    check(
                        layout, make(layout, seed), impl=impl, dtype=dtype, heads=heads, kv_heads=kv_heads,
                        width=width, seed=seed, pool=pool, **FEATURES[features],
                        k_layout=shared_layout(seed + 500, max_length) if masks is CROSS_MASKS else None,
                    )  # fmt: skip
    pool.check()


# The implementation is the innermost parameter: the oracle's results are kept from one to the next.
@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_error_rule(features, dtype, impl):
    _sweep(features, dtype, impl, count=5, max_length=7)


@pytest.mark.extended
@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_error_rule_extended(features, dtype, impl):
    _sweep(features, dtype, impl, count=15, max_length=14)


@pytest.mark.parametrize("features", FEATURES)
def test_reference(features):
    for masks in (MASKS, CROSS_MASKS):
        for seed, make in enumerate(masks.values()):
            layout, k_layout = shared_layout(seed, 7), shared_layout(seed + 20, 7) if masks is CROSS_MASKS else None
            check(
                layout, make(layout, seed), k_layout=k_layout, impl="reference", heads=4, kv_heads=2,
                **FEATURES[features],
            )  # fmt: skip


# Nothing at all; empty samples around one token; tile and vector edges; one modality missing everywhere.
EDGES = ([[0, 0]], [[0, 0], [1, 0], [0, 0]], [[127, 1], [0, 129]], [[5, 0], [7, 0]])
# No queries, no keys, neither, in the midst of others; more queries than keys; one key for many.
CROSS_EDGES = (([0], [3]), ([3], [0]), ([0, 4, 2], [3, 0, 2]), ([9, 1], [2, 1]), ([70], [1]))


@pytest.mark.parametrize("features", ["plain", "bias", "all"])
@pytest.mark.parametrize("impl", [*CPU_IMPLS, "reference"])
def test_edges(impl, features):
    layouts = [(PackedLayout.from_counts(counts), None) for counts in EDGES]
    for lengths in CROSS_EDGES:
        sides = (PackedLayout.from_segments([[(0, n)] for n in side], num_modalities=2) for side in lengths)
        layouts.append(tuple(sides))
    pool = _pool(features)
    for layout, k_layout in layouts:
        last = AttentionMask.isolated(2) if k_layout is None else AttentionMask(causal=True, align="top_left")
        for mask in (None, AttentionMask(causal=True), last):
            with poisoned_empty():
                check(layout, mask, k_layout=k_layout, impl=impl, pool=pool, **FEATURES[features])
    pool.check()


@pytest.mark.parametrize("features", ["plain", "lse", "all"])
@pytest.mark.parametrize("kind", MASKS)
def test_torch_blocks(kind, features, monkeypatch):
    # Everything that is cut by size is cut: runs, blocks of rows, masks that are not kept.
    monkeypatch.setattr(torch_blockwise, "BLOCK", 100)
    for name, value in (("CALL_COST", 0), ("WIDE_ROWS", 16), ("LONG_STRETCH", 4), ("MAX_KEPT", 300)):
        monkeypatch.setattr(torch_runs, name, value)
    for seed in range(3):
        layout = shared_layout(seed, 16)
        options = {"heads": 4, "kv_heads": (2, 4, 1)[seed], "seed": seed, "pool": _pool(features)}
        layout.cache.clear()  # of runs that were found under other values
        check(layout, MASKS[kind](layout, seed), impl="torch", **options, **FEATURES[features])
        layout.cache.clear()
        options["pool"].check()
