"""attention in C++: the error rule over random layouts, threads, edges of blocks and vectors.

Isolation, repeats and the edges of layouts: test_attention_isolation.py and test_attention_rule.py.
"""

import pytest
import torch
from attention_oracle import CROSS_MASKS, MASKS, NUM_MODALITIES, Case, Pool, check, shared_layout

from mmkernels import AttentionMask, PackedLayout, attention, dispatch
from mmkernels.testing import poisoned_empty

pytestmark = pytest.mark.skipif(dispatch.cpp_missing() is not None, reason="the extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads, key heads, width: MHA, GQA, MQA; widths below, at and between vectors of 4, 8 and 16 floats, and the widest.
SHAPES = [(2, 2, 16), (4, 2, 8), (3, 1, 40), (1, 1, 64), (4, 4, 33), (2, 1, 80), (1, 1, 256), (2, 2, 128), (6, 2, 12)]
EXTRAS = [{}, {"pair_bias": True}, {"dropout_p": 0.3}, {"pair_bias": True, "dropout_p": 0.1}]


def _check(seed, kind, dtype, *, max_length=24, cross=False, **extras):
    heads, kv_heads, width = SHAPES[seed % len(SHAPES)]
    layout = shared_layout(seed, max_length)
    k_layout = _keys_for(layout, seed) if cross else None
    mask = (CROSS_MASKS if cross else MASKS)[kind](layout, seed)
    with poisoned_empty():
        check(
            layout, mask, k_layout=k_layout, impl="cpp", dtype=dtype, heads=heads, kv_heads=kv_heads, width=width,
            seed=seed, mass=True, **extras,
        )  # fmt: skip


def _keys_for(layout, seed):
    """As many samples as `layout` has, of other lengths, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 12, (layout.num_samples, NUM_MODALITIES), generator=generator)
    counts[torch.rand(layout.num_samples, generator=generator) < 0.1] = 0
    return PackedLayout.from_counts(counts.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_error_rule(kind, dtype):
    for seed in range(3):
        _check(seed + 3 * DTYPES.index(dtype), kind, dtype)
    # Several bands, panels and blocks, whose edges fall inside segments.
    _check(5, kind, dtype, max_length=200, lse_gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", EXTRAS[1:], ids=str)
@pytest.mark.parametrize("kind", ["document", "causal", "bidirectional", "visible_blind"])
def test_extras(kind, extras, dtype):
    for seed in (0, 1):
        _check(seed, kind, dtype, lse_gradient=True, **extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CROSS_MASKS)
def test_cross(kind, dtype):
    for seed in (1, 2):
        _check(seed, kind, dtype, cross=True, lse_gradient=True, **EXTRAS[seed])


@pytest.mark.extended
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_many_layouts(seed, dtype):
    pool = Pool()  # thousands of small cases: some would be unlucky alone
    for number, kind in enumerate(MASKS):
        extras = EXTRAS[(seed + number) % 4]
        _check(seed, kind, dtype, max_length=(24, 60)[seed % 2], lse_gradient=seed % 3 == 0, pool=pool, **extras)
    for kind in CROSS_MASKS:
        _check(seed, kind, dtype, cross=True, lse_gradient=True, pool=pool, **EXTRAS[seed % 4])
    pool.check()


# Around the band (12), the panels (8, 16, 32), the blocks (64, 128, 256), the tile of queries (192), and the length
# from which backward cuts a lonely sample into ranges of keys (512).  Many heads: the rule compares root mean squares.
@pytest.mark.parametrize("length", [1, 7, 8, 12, 13, 16, 17, 33, 128, 129, 192, 193, 257, 515])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 24), (torch.bfloat16, 24), (torch.bfloat16, 35)], ids=str)
def test_lengths_at_the_edges_of_blocks(length, causal, dtype, width):
    layout, n = PackedLayout.from_counts([[length]]), 96 // length + 1
    with poisoned_empty():
        check(
            layout, AttentionMask(causal=causal), impl="cpp", dtype=dtype, heads=n, kv_heads=n, width=width, mass=True
        )


@pytest.mark.parametrize(
    ("dtype", "pair_bias"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
def test_a_lonely_sample(dtype, pair_bias):
    """Without a bias it is cut into ranges of keys; with one it must not be: delta needs all of a row."""
    layout = PackedLayout.from_counts([[300, 400]])
    mask = AttentionMask(causal=True, visible=[[True, False], [True, True]])
    with poisoned_empty():
        check(layout, mask, impl="cpp", dtype=dtype, heads=4, kv_heads=2, pair_bias=pair_bias, lse_gradient=True)


@pytest.mark.parametrize("side", [30, 31, 32, 33])
def test_windows_at_the_edges_of_panels(side):
    """Bands whose last row begins to see, or whose first ceases to, one key to either side of a panel's edge."""
    check(PackedLayout.from_counts([[300]]), AttentionMask(window=(side, side)), impl="cpp", heads=2, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("longest", "width"), [(3, 24), (12, 64), (50, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_short_segments_by_turns(longest, width, causal, dtype):
    """Bands and panels end where the modality changes: after every token or so, and in more panels than a block has."""
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (3, 90 if longest < 50 else 12), generator=generator)
    layout = PackedLayout.from_segments(
        [[(i % 3, int(length)) for i, length in enumerate(sample)] for sample in lengths], num_modalities=3
    )
    mask = AttentionMask(causal=causal, visible=[[True, True, True], [False, True, False], [True, False, False]])
    with poisoned_empty():
        check(
            layout, mask, impl="cpp", dtype=dtype, heads=2, kv_heads=1, width=width, mass=True, pair_bias=longest > 3,
            dropout_p=0.1 * (longest > 12), lse_gradient=True,
        )  # fmt: skip


def test_a_row_of_nan_is_not_a_row_that_sees_nothing():
    layout = PackedLayout.from_counts([[20]])
    q, k, v = torch.randn(3, 20, 1, 16)
    q[7] = float("nan")
    out, lse = attention(q, k, v, layout=layout, return_lse=True, impl="cpp")
    assert out[7].isnan().all()
    assert lse[:, 7].isnan().all()
    assert not out[:7].isnan().any()


def test_the_gradient_of_a_blind_rows_lse_is_not_used():
    """Whatever a loss makes of -inf, NaN too."""
    layout = PackedLayout.from_counts([[20, 30]])
    mask = AttentionMask(visible=[[True, True], [False, False]])
    qkv = torch.randn(50, 3, 1, 16, requires_grad=True)
    found = []
    for of_blind in (0.0, float("nan")):
        out, lse = attention(*qkv.unbind(1), layout=layout, mask=mask, return_lse=True, impl="cpp")
        dlse = torch.where(lse.isinf(), of_blind, torch.ones_like(lse))
        found.append(torch.autograd.grad((out, lse), qkv, (torch.ones_like(out), dlse))[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_between_those_that_a_band_sees(dtype):
    """Text on both sides of an image that it does not see: the tile visits the image, whose own rows are in it."""
    layout = PackedLayout.from_segments([[(0, 40), (1, 100), (0, 45)]], num_modalities=2)
    check(layout, AttentionMask.isolated(2), impl="cpp", dtype=dtype, heads=4, kv_heads=2, mass=True, dropout_p=0.1)


@pytest.mark.parametrize("counts", [[[40, 60, 9]] * 5, [[300, 700, 100]]], ids=["samples", "one sample in ranges"])
@pytest.mark.parametrize("biased", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(counts, biased):
    mask = AttentionMask(causal=True, bidirectional=(1,))
    case = Case(PackedLayout.from_counts(counts), mask, heads=4, kv_heads=2, width=32, pair_bias=biased)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(7)
            out, lse, mass = attention(
                q, k, v, layout=case.layout, mask=mask, pair_bias=bias, dropout_p=0.1, return_lse=True,
                return_modality_mass=True, impl="cpp",
            )  # fmt: skip
            found.append((out, lse, mass, *torch.autograd.grad((out, lse), leaves, case.gradients)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_sample_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    alone = PackedLayout.from_counts([[70, 50]])
    batch = PackedLayout.from_counts([[70, 50], [3, 9], [200, 1]])
    qkv = torch.randn(batch.total_tokens, 6, 16, generator=generator)
    whole = attention(*qkv.split(2, 1), layout=batch, impl="cpp")
    assert torch.equal(whole[:120], attention(*qkv[:120].split(2, 1), layout=alone, impl="cpp"))


def test_a_table_out_of_range_is_named():
    layout = PackedLayout.from_counts([[5]])
    q = torch.randn(5, 1, 8)
    from mmkernels.masks import MaskPlan

    plan = MaskPlan.lower(layout)
    spans, out, lse = torch.tensor([[0, 5, 0]], dtype=torch.int32), torch.empty_like(q), torch.empty(1, 5)
    for tiles, wrong in (([[0, 6, 0, 1]], "tiles"), ([[0, 5, 0, 2]], "tiles"), ([[0, 5, 0, 1]], "spans")):
        if wrong == "spans":
            spans = torch.tensor([[0, 9, 0]], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=f"{wrong} is out of range"):
            torch.ops.mm_cpp.attention_fwd(
                q, q, q, None, None, plan.q_table, plan.k_table, torch.tensor(tiles, dtype=torch.int32), spans,
                1.0, False, 0.0, 0, out, lse, None,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("width", "longest", "rows"), [(64, 0, 256), (64, 256, 256), (64, 512, 256), (64, 300, 150), (128, 1024, 171)]
)
def test_the_longest_sample_falls_into_equal_tiles(width, longest, rows):
    from mmkernels.ops.attention import cpp_impl

    assert cpp_impl.tile_rows(width, longest) == rows


def test_zeros_that_lie_nowhere_are_taken():
    """torch hands them over as one number with strides of 0, also as the gradient of the result."""
    layout = PackedLayout.from_counts([[5], [3]])
    q, k, v = (torch.randn(8, 2, 16) for _ in range(3))
    zeros = torch._efficientzerotensor((8, 2, 16))
    for at in range(3):
        given = [q, k, v]
        given[at] = zeros
        expected = attention(*(t.clone() for t in given), layout=layout, impl="cpp")
        for _ in range(2):  # the second goes the short way
            assert torch.equal(attention(*given, layout=layout, impl="cpp"), expected)
    bias = torch._efficientzerotensor((2, 1, 1))
    torch.testing.assert_close(
        attention(q, k, v, layout=layout, pair_bias=bias, impl="cpp"), attention(q, k, v, layout=layout, impl="cpp")
    )
    q.requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(attention(q, k, v, layout=layout, impl="cpp"), q, zeros)
        assert (gradient == 0).all()


def test_a_storage_that_was_freed_is_named_not_read():
    layout = PackedLayout.from_counts([[5], [3]])
    q, k, v = (torch.randn(8, 2, 16, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, layout=layout, impl="cpp")
    k.untyped_storage().resize_(0)
    for call in (lambda: attention(q, k, v, layout=layout, impl="cpp"), out.sum().backward):
        with pytest.raises(RuntimeError, match="k lies in a storage of 0 bytes, expected 1024"):
            call()
