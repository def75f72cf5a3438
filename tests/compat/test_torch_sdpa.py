"""scaled_dot_product_attention against torch's: masks that stretches can hold, layouts of memory, refusals."""

import pytest
import torch
import torch.nn.functional as F
from dense import attention as dense
from dense import check
from padded_batch import CAUSAL, KEYS, LENGTHS, REAL, B, D, H, L, heads

from mmkernels import AttentionMask, dispatch
from mmkernels.compat import padded
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as ours


def packed_documents():
    """Block-diagonal: three documents in each row."""
    document = torch.bucketize(torch.arange(L), torch.tensor([9, 23]))
    return document[:, None] == document


MASKS = {
    "padding": KEYS,
    "left padding": KEYS.flip(-1),
    "padding, expanded": KEYS.expand(B, H, L, L),
    "padding of queries too": KEYS & REAL[:, None, :, None],
    "a hole": KEYS & (torch.arange(L) != 3),
    "causal and padding": KEYS & CAUSAL,
    "causal and left padding": KEYS.flip(-1) & CAUSAL,  # rows that see nothing come first
    "causal with a hole": (torch.arange(L) != 3) & CAUSAL,
    "window": CAUSAL & ~CAUSAL.tril(-6),
    "anticausal": CAUSAL.T,
    "prefix": CAUSAL | (torch.arange(L) < 11),
    "documents": packed_documents(),
    "blind amid others": (torch.arange(L) % 5 != 2)[:, None].expand(L, L),
    "sees nothing": torch.zeros(B, 1, 1, L, dtype=torch.bool),
    "one query row": (torch.arange(L) < 9)[None],
    "per head": torch.stack([KEYS[:, 0], KEYS[:, 0].flip(-1)] * 2, 1),
    "all": torch.ones(L, L, dtype=torch.bool),
    "causal": CAUSAL,
}


@pytest.mark.parametrize("memory", ["projection", "contiguous"])
@pytest.mark.parametrize("name", MASKS)
def test_boolean_and_float_masks(name, memory):
    mask = MASKS[name]
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    inputs = heads(memory)
    exact = lambda q, k, v: dense(q, k, v, mask.expand(B, H, L, L))[0]  # noqa: E731
    for given in (mask, added):
        check(
            lambda *t, m=given: ours(*t, m),
            lambda *t, m=given: F.scaled_dot_product_attention(*t, m),
            exact,
            inputs,
            f"{name} {given.dtype}",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    mask = KEYS & CAUSAL
    check(
        lambda *t: ours(*t, mask),
        lambda *t: F.scaled_dot_product_attention(*t, mask),
        lambda *t: dense(*t, mask)[0],
        heads("projection", dtype=dtype),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [37, 21, 50])  # as many, fewer, more than queries
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_shapes_of_cross_and_grouped_heads(kv_heads, keys, causal):
    q = torch.randn(B, L, H, D).transpose(1, 2)
    k, v = (torch.randn(B, keys, kv_heads, D).transpose(1, 2) for _ in range(2))
    mask = (torch.arange(keys) < torch.tensor([keys, 5, 20])[:, None])[:, None, None]
    seen = mask & torch.ones(L, keys, dtype=torch.bool).tril() if causal else mask
    for scale in (None, 0.4):
        check(
            lambda *t, s=scale: ours(*t, mask, is_causal=causal, scale=s, enable_gqa=True),
            lambda *t, s=scale: F.scaled_dot_product_attention(*t, seen, scale=s, enable_gqa=True),
            lambda *t, s=scale: dense(*t, seen, s)[0],
            (q, k, v),
        )


@pytest.mark.parametrize("lead", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_batch_dimensions(lead):
    q, k, v = (torch.randn(*lead, n, D) for n in (7, 9, 9))
    mask = torch.arange(9) < 6
    masks = [mask.expand(7, 9)]
    if lead:
        masks.append(mask.expand(*lead, 7, 9))
    for m in masks:
        expected = F.scaled_dot_product_attention(q, k, v, m)
        torch.testing.assert_close(ours(q, k, v, m), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shapes",  # of query, key and value before [length, width]
    [
        [(B, H), (1, 1), (B, 1)],
        [(B, 1), (B, H), (B, H)],
        [(1, H), (B, H), (1, 1)],
        [(1,), (5,), (5,)],
        [(), (5,), (1,)],
        [(H,), (B, H), (B, 1)],
        [(2, 1, H), (1, 3, H), (2, 3, 1)],
        [(B, H), (B, 2), (B, 1), "grouped"],  # keys and values shared by different numbers of heads
        [(B, 6), (B, 2), (B, 3), "grouped"],
        [(H,), (2,), (2,), "grouped"],
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(L, L), (0, 9), (9, 0)], ids=str)
def test_what_broadcasts_in_torch_does_here(shapes, sizes):
    *leads, grouped = shapes if shapes[-1] == "grouped" else (*shapes, False)
    mask = torch.arange(sizes[1]) < 30
    inputs = [torch.randn(*lead, n, D) for lead, n in zip(leads, (*sizes, sizes[1]), strict=True)]
    results = []
    for function in (ours, F.scaled_dot_product_attention):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves, mask.expand(*sizes), enable_gqa=bool(grouped))
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(0,), (B, 0)], ids=str)
def test_no_heads(lead):
    """Not beside torch's: on these tensors torch 2.11 ends the process."""
    q, k, v = (torch.randn(*lead, *size, requires_grad=True) for size in ((7, D), (9, D), (9, D)))
    out = ours(q, k, v, torch.arange(9) < 6)
    assert out.shape == (*lead, 7, D)
    assert [g.shape for g in torch.autograd.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]


def test_a_mask_of_one_dimension_is_one_of_keys():
    q, k, v = torch.randn(L, D), torch.randn(9, D), torch.randn(9, D)
    mask = torch.arange(9) < 6
    torch.testing.assert_close(ours(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_nested_tensors_are_refused_where_torch_does_not_run():
    nested = torch.nested.nested_tensor([torch.randn(n, H, D) for n in (7, 5)], layout=torch.jagged).transpose(1, 2)
    assert ours(nested, nested, nested).is_nested
    with pytest.raises(NotImplementedError, match="query, key or value is a nested tensor"):
        ours(nested, nested, nested, lengths=[7, 5])


@pytest.mark.parametrize("given", [LENGTHS, LENGTHS.tolist(), LENGTHS.numpy()])
def test_lengths_are_padding_of_queries_and_keys(given):
    seen = KEYS & REAL[:, None, :, None]
    check(
        lambda *t: ours(*t, lengths=given),
        lambda *t: F.scaled_dot_product_attention(*t, seen),
        lambda *t: dense(*t, seen)[0],
        heads("projection"),
    )
    out = ours(*heads("projection"), lengths=given)
    assert not out.transpose(1, 2)[~REAL].any()


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0), (3, 2), (0, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_window_and_place(causal, window, align):
    """Key lengths of their own; the last real query at the last real key, or the first at the first."""
    q, (_, k, v) = heads("projection")[0], heads("projection", length=50)
    key_lengths = torch.tensor([50, 3, 31])
    i, j = torch.arange(L)[:, None], torch.arange(50)
    place = i + (key_lengths - LENGTHS)[:, None, None] if align == "bottom_right" else i.expand(B, L, 1)
    seen = (j < key_lengths[:, None, None]) & (i < LENGTHS[:, None, None])
    seen &= (place - j <= window[0]) | (window[0] < 0)
    seen &= (j - place <= window[1]) | (window[1] < 0)
    seen = (seen & (j <= place) if causal else seen)[:, None]
    options = {"lengths": LENGTHS, "key_lengths": key_lengths, "window": window, "align": align, "is_causal": causal}
    check(
        lambda *t: ours(*t, **options),
        lambda *t: F.scaled_dot_product_attention(*t, seen),
        lambda *t: dense(*t, seen)[0],
        (q, k, v),
    )


def test_dropout_drops_its_share_and_keeps_the_mean():
    q, k, v = (torch.randn(8, H, 64, D) for _ in range(3))
    mask = torch.arange(64) < 50
    mask = mask.expand(64, 64)
    kept = torch.stack([ours(q, k, v, mask, dropout_p=0.3) for _ in range(60)])
    assert not torch.equal(kept[0], kept[1])
    assert (kept.mean(0) - ours(q, k, v, mask)).abs().mean() < 0.25 * kept.std(0).mean()


REFUSED = {
    "attn_mask has values": {"attn_mask": torch.randn(L, L)},
    "attn_mask lets query 34 of mask 0 see keys that are not": {"attn_mask": torch.eye(L).roll(3, 1).bool() | CAUSAL.T},
    "attn_mask lets query 1 of mask 0 see earlier": {"attn_mask": torch.eye(L).flip(0).bool()},
    "attn_mask has a row of lowest": {"attn_mask": torch.full((L, L), torch.finfo(torch.float32).min)},
    "attn_mask requires a gradient": {"attn_mask": torch.zeros(L, L, requires_grad=True)},
    "scale is -1": {"attn_mask": KEYS, "scale": -1.0},
    "dropout_p is 1": {"attn_mask": KEYS, "dropout_p": 1.0},  # torch drops everything
    "query is torch.float64": {"attn_mask": KEYS, "dtype": torch.float64},
    "query has width 4": {"attn_mask": KEYS, "width": 4},
    "value has width 6": {"attn_mask": KEYS, "value_width": 6},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_by_name_or_handed_to_torch(reason):
    options = dict(REFUSED[reason])
    dtype, width, value_width = (
        options.pop("dtype", torch.float32),
        options.pop("width", D),
        options.pop("value_width", 0),
    )
    q, k, v = (torch.randn(B, H, L, w, dtype=dtype) for w in (width, width, value_width or width))
    with pytest.raises(NotImplementedError, match=reason):
        ours(q, k, v, **options)
    # As they came, also where torch would choose another kernel for [B, H, L, D].
    for lead in (4, 3):
        given = [t if lead == 4 else t[0] for t in (q, k, v)]
        mask = options["attn_mask"] if lead == 4 or options["attn_mask"].ndim == 2 else options["attn_mask"][0]
        call = options | {"attn_mask": mask}
        assert torch.equal(ours(*given, **call, fallback="torch"), F.scaled_dot_product_attention(*given, **call))
    assert f"scaled_dot_product_attention -> torch: {reason}" in dispatch.explain()


def test_fallback_keeps_our_own_keywords():
    q, k, v = (torch.randn(B, H, L, D, dtype=torch.float64) for _ in range(3))
    out = ours(q, k, v, lengths=LENGTHS, window=(2, 1), is_causal=True, fallback="torch")
    seen = KEYS & REAL[:, None, :, None] & CAUSAL & ~CAUSAL.tril(-3)
    torch.testing.assert_close(out, dense(q, k, v, seen)[0])


def test_grouped_heads_with_masks_per_head_are_refused():
    q, k = torch.randn(B, H, L, D), torch.randn(B, 2, L, D)
    with pytest.raises(NotImplementedError, match="attn_mask differs between heads"):
        ours(q, k, k, MASKS["per head"], enable_gqa=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [1, 2]}, "lengths: .* expected 3 whole numbers"),
        ({"lengths": 5}, "lengths: int, expected 3 whole numbers"),
        ({"lengths": torch.tensor(5)}, "lengths: Tensor, expected 3 whole numbers"),
        ({"lengths": [[1, 2, 3]]}, r"lengths: entry 0 is \[1, 2, 3\], expected 3"),
        ({"lengths": [[1, 2], [3]]}, r"lengths: entry 0 is \[1, 2\]"),
        ({"lengths": [1, 2, 38]}, "lengths: from 1 to 38, expected 0 to 37"),
        ({"lengths": [1, 2.0, 3.0]}, "lengths: entry 1 is 2.0, expected 3 whole numbers"),
        ({"lengths": [True, False, True]}, "lengths: entry 0 is True"),
        ({"lengths": torch.ones(3)}, "lengths: entry 0 is 1.0"),
        ({"lengths": torch.ones(3), "dtype": torch.float64, "fallback": "torch"}, "lengths: entry 0 is 1.0"),
        ({"key_lengths": [1, 2, -1]}, "key_lengths: from -1 to 2, expected 0 to 37"),
        ({"scale": torch.tensor(0.3), "lengths": [1, 2, 3]}, "scale is a tensor, expected a number; multiply the quer"),
        ({"scale": torch.tensor(0.3)}, "scale is a tensor"),
        ({"dropout_p": torch.tensor(0.3)}, "dropout_p is a tensor, expected a number"),
        ({"dropout_p": "0.3", "lengths": [1, 2, 3]}, "dropout_p is str, expected a number"),
        ({"scale": [0.3], "lengths": [1, 2, 3]}, "scale is list, expected a number"),
        ({"is_causal": "False", "lengths": [1, 2, 3]}, "is_causal is 'False', expected a bool"),
        ({"is_causal": "False"}, "is_causal is 'False', expected a bool"),
        ({"scale": True}, "scale is bool, expected a number"),
        ({"deterministic": "no"}, "deterministic is 'no', expected a bool"),
        ({"window": None}, r"window is None, expected \(left, right\) as integers"),
        ({"window": (1, 2, 3)}, r"window is \(1, 2, 3\), expected \(left, right\)"),
        ({"window": (1.5, 0)}, r"window is \(1.5, 0\), expected"),
        ({"attn_mask": AttentionMask()}, "attn_mask is AttentionMask, expected a tensor or None; mmkernels.attention"),
        ({"attn_mask": torch.ones(L, L, dtype=torch.int32)}, "attn_mask is torch.int32"),
        ({"attn_mask": torch.ones(2, 1, L, L, dtype=torch.bool)}, "attn_mask is .* does not broadcast"),
        ({"attn_mask": torch.ones(1, 1, 1, L, L, dtype=torch.bool)}, "attn_mask is .* does not broadcast"),
        ({"attn_mask": torch.ones(L + 1, dtype=torch.bool)}, "attn_mask is .* does not broadcast"),
        ({"attn_mask": CAUSAL, "align": "middle"}, "align is 'middle'"),
        ({"attn_mask": CAUSAL, "fallback": "flash"}, "fallback is 'flash'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    options = dict(options)
    tensors = heads("projection", dtype=options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        ours(*tensors, **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": CAUSAL}])
def test_fewer_values_than_keys_are_named(options):
    """torch's kernel reads past their end, and we hand it calls with nothing to skip."""
    q, k, v = heads("projection")
    with pytest.raises(ValueError, match=r"value \(.*expected \[..., Lq, D\], \[..., Lk, D\] and"):
        ours(q, k, v[:, :, :5], **options)


@pytest.mark.parametrize("options", [{}, {"attn_mask": KEYS}, {"lengths": LENGTHS}, {"window": (3, 0)}], ids=list)
def test_the_meta_device_gives_the_shape(options):
    options = {name: value.to("meta") if name == "attn_mask" else value for name, value in options.items()}
    q, k, v = (t.to("meta") for t in heads("projection"))
    out = ours(q, k, v, **options)
    assert out.is_meta
    assert out.shape == q.shape


def test_what_does_not_fit_is_named_also_after_what_does():
    """3 == 3.0 == True and so on, but a kept plan answers for whole numbers alone."""
    tensors = heads("projection", 2, 1, 4)
    ours(*tensors, lengths=[1, 3])
    for lengths in ([1, 3.0], [True, 3], (1, 3.0)):
        with pytest.raises(ValueError, match="lengths: entry"):
            ours(*tensors, lengths=lengths)


@pytest.mark.parametrize("lengths", [[], (), torch.tensor([]), torch.tensor([], dtype=torch.int32)], ids=repr)
def test_a_batch_of_no_samples_has_no_lengths(lengths):
    tensors = [t.requires_grad_() for t in heads("projection", 0)]
    out = ours(*tensors, lengths=lengths)
    assert out.shape == tensors[0].shape
    out.sum().backward()


def test_lengths_on_a_device_are_checked_by_what_needs_no_reading():
    q = heads("projection")[0]
    for lengths in (torch.ones(B), torch.ones(B, dtype=torch.bool), torch.ones(B + 1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"lengths: torch\..* expected 3 whole numbers, one per sample"):
            ours(q, q, q, lengths=lengths.to("meta"))


def test_a_window_may_be_wider_than_any_sample():
    q, k, v = heads("projection")
    expected = ours(q, k, v, lengths=LENGTHS)
    for window in ((2**63 - 1, 2**63 - 1), (2**80, -(2**70)), (-7, -7)):
        assert torch.equal(ours(q, k, v, lengths=LENGTHS, window=window), expected)


def test_where_nothing_is_hidden_torch_runs(monkeypatch):
    """No mask, is_causal, full lengths and masks that say no more: torch's own kernel, unless impl is asked for.

    Or deterministic=True, which torch's kernels do not know of.
    """
    q, k, v = heads("projection")
    monkeypatch.setattr(padded, "attention", None)
    for options in ({}, {"is_causal": True}, {"lengths": [L] * B}, {"attn_mask": MASKS["all"]}):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=options.get("is_causal", False))
        for deterministic in (None, False):
            assert torch.equal(ours(q, k, v, deterministic=deterministic, **options), expected)
        with pytest.raises(TypeError):
            ours(q, k, v, deterministic=True, **options)
    assert torch.equal(ours(q, k, v, CAUSAL), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(TypeError):
        ours(q, k, v, impl="cpp")


@pytest.mark.parametrize("memory", ["projection", "separate", "contiguous"])
def test_tensors_reach_the_operator_as_they_lie(monkeypatch, memory):
    """No copy in, and none out: the operator gets the caller's memory, and its output is what is returned."""
    q, k, v = heads(memory)
    seen = []

    def spy(*tensors, **options):
        seen.append([t.data_ptr() for t in tensors])
        out = real(*tensors, **options)
        seen.append(out.data_ptr())
        return out

    real = padded.attention
    monkeypatch.setattr(padded, "attention", spy)
    for options in ({"lengths": LENGTHS}, {"attn_mask": KEYS}, {"attn_mask": KEYS & CAUSAL}):
        seen.clear()
        out = ours(q, k, v, **options)
        assert seen == [[t.data_ptr() for t in (q, k, v)], out.data_ptr()]
        assert out.stride() == F.scaled_dot_product_attention(q, k, v).stride()


def test_inference_mode_and_no_grad():
    q, k, v = heads("projection")
    expected = F.scaled_dot_product_attention(q, k, v, KEYS)
    with torch.inference_mode():
        mask = KEYS & True  # an inference tensor has no version
        torch.testing.assert_close(ours(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)
        mask[1] = False
        assert not ours(q, k, v, mask)[1].any()


def test_autocast_casts_as_torch_does():
    q, k, v = heads("projection")
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(q, k, v, KEYS)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v, KEYS).dtype == torch.bfloat16


def test_no_gradient_where_none_is_wanted():
    q, k, v = heads("projection")
    k.requires_grad_()
    out = ours(q, k, v, KEYS)
    (dk,) = torch.autograd.grad(out.sum(), [k])
    assert not dk.transpose(1, 2)[~REAL].any()
    assert not ours(q, k.detach(), v, KEYS).requires_grad


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_one_mask_for_a_batch_of_no_samples(kv_heads):
    q, k = torch.randn(0, 2, 5, 16, requires_grad=True), torch.randn(0, kv_heads, 5, 16)
    for mask in (CAUSAL[..., :5, :5], torch.ones(5, 5, dtype=torch.bool).triu()):
        out = ours(q, k, k, attn_mask=mask, enable_gqa=True)
        assert out.shape == q.shape
        out.sum().backward()
    assert q.grad.shape == q.shape
