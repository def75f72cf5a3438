"""varlen_attn and flash_attn's functions: what each form hands on, and what of shapes and masks it refuses."""

import pytest
import torch
import torch.nn.attention.varlen as original
from dense import attention as dense

from mmkernels import AttentionMask, PackedLayout
from mmkernels.compat import flash_attn, packed, padded
from mmkernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, unpad_input
from mmkernels.compat.torch_varlen import varlen_attn

D = 16


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.4},
        {"window_size": (2, 1), "dropout_p": 0.4},
        {"window_size": (2, 1), "return_attn_probs": True, "softmax_scale": 0.3},
        {"causal": True, "return_attn_probs": True},
    ],
    ids=str,
)
def test_packed_forms_are_the_plain_form(options):
    x, cu = torch.randn(2, 9, 3, 4, D), bounds([9, 9])
    q, k, v = x.unbind(2)
    rows = x.flatten(0, 1)
    calls = {
        "padded": (
            lambda: flash_attn_func(q, k, v, **options),
            lambda: flash_attn.flash_attn_qkvpacked_func(x, **options),
            lambda: flash_attn.flash_attn_kvpacked_func(q, x[:, :, 1:], **options),
        ),
        "varlen": (
            lambda: flash_attn_varlen_func(*rows.unbind(1), cu, cu, 9, 9, **options),
            lambda: flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu, 9, **options),
            lambda: flash_attn.flash_attn_varlen_kvpacked_func(rows[:, 0], rows[:, 1:], cu, cu, 9, 9, **options),
        ),
    }
    for plain, *forms in calls.values():
        torch.manual_seed(0)
        expected = plain()
        assert isinstance(expected, tuple) == bool(options.get("return_attn_probs"))
        for form in forms:
            torch.manual_seed(0)
            found = form()
            if isinstance(expected, tuple):
                assert len(found) == len(expected) == 3
                assert found[2] is expected[2] is None
                torch.testing.assert_close(found[:2], expected[:2])
            else:
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["flash_attn_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"])
def test_refusals_of_the_plain_form_hold_for_packed_ones(name):
    x, cu = torch.randn(1, 6, 3, 2, D), bounds([6])
    given = (x,) if name == "flash_attn_qkvpacked_func" else (x[0], cu, 6)
    for options in ({}, {"dropout_p": 0.1}):
        for argument, value in (("softcap", 30.0), ("alibi_slopes", torch.ones(2))):
            with pytest.raises(NotImplementedError, match=argument):
                getattr(flash_attn, name)(*given, **options, **{argument: value})
    with pytest.raises(ValueError, match=r"flash_attn: qkv is .*, expected 3 at dimension"):
        getattr(flash_attn, name)(given[0].repeat_interleave(2, -3), *given[1:])


def test_shapes_of_the_padded_form_are_checked():
    x = torch.randn(2, 6, 2, D)
    for argument, given in (("q", (x[0], x, x)), ("k", (x, x[0], x)), ("v", (x, x, x[0]))):
        with pytest.raises(ValueError, match=rf"{argument} has shape \(6, 2, 16\), expected \[B, S, heads, D\]"):
            flash_attn_func(*given)
    for given in ((x, x, x[:, 1:]), (x, x[:1], x[:1])):
        with pytest.raises(ValueError, match="expected k and v alike, of q's batch size"):
            flash_attn_func(*given)


def test_unpad_counts_what_the_first_mask_marks():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows, _, cu, longest, used = unpad_input(torch.randn(2, 3, D), mask, torch.tensor([[0, 0, 1], [0, 1, 0]]))
    assert (len(rows), cu.tolist(), longest, used.tolist()) == (5, [0, 3, 5], 3, [2, 1])


def test_determinism_and_impl_reach_attention(monkeypatch):
    seen = []

    def spy(real):
        return lambda *t, **o: seen.append((o.get("deterministic"), o.get("impl"))) or real(*t, **o)

    monkeypatch.setattr(packed, "attention", spy(packed.attention))
    monkeypatch.setattr(padded, "attention", spy(padded.attention))
    monkeypatch.setattr(flash_attn, "attention_qkvpacked", spy(flash_attn.attention_qkvpacked))
    x, cu = torch.randn(2, 9, 3, 4, D), bounds([9, 9])
    rows = x.flatten(0, 1)
    for given, handed in ((True, True), (False, None)):  # None follows torch's switch
        flash_attn_func(*x.unbind(2), deterministic=given)
        flash_attn.flash_attn_qkvpacked_func(x, deterministic=given)
        flash_attn_varlen_func(*rows.unbind(1), cu, cu, 9, 9, deterministic=given)
        assert [deterministic for deterministic, _ in seen] == [handed] * 3
        seen.clear()
    varlen_attn(*rows.unbind(1), cu, cu, 9, 9, deterministic=True, impl="torch")
    assert seen == [(True, "torch")]


def test_scale_window_and_lse_of_varlen_attn():
    x, cu = torch.randn(9, 3, 4, D), bounds([9])
    q, k, v = (t.transpose(0, 1)[None] for t in x.unbind(1))
    near = torch.ones(9, 9, dtype=torch.bool).tril(1).triu(-2)
    expected = dense(q, k, v, near, 0.3)[0][0].transpose(0, 1)
    for mask in (None, AttentionMask()):
        out = varlen_attn(*x.unbind(1), cu, cu, 9, 9, window_size=(2, 1), scale=0.3, mask=mask)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    aux = original.AuxRequest(lse=False)
    assert isinstance(varlen_attn(*x.unbind(1), cu, cu, 9, 9, return_aux=aux), torch.Tensor)
    every = varlen_attn(*x.unbind(1), cu, cu, 9, 9)
    assert torch.equal(varlen_attn(*x.unbind(1), cu, cu, 9, 9, window_size=(-7, -9)), every)
    with pytest.raises(ValueError, match="key has 2 heads, expected query's 4, or enable_gqa=True"):
        varlen_attn(x[:, 0], x[:, 1, :2], x[:, 2, :2], cu, cu, 9, 9)


def test_one_seqused_serves_several_bounds():
    q, used = torch.randn(12, 4, D), torch.tensor([3, 2])
    for lengths in ([6, 6], [4, 8], [6, 6]):
        cu = bounds(lengths)
        out = varlen_attn(q, q, q, cu, cu, 8, 8, seqused_k=used)
        for part, n in zip(q.split(lengths), used.tolist(), strict=True):
            one, keys = part.transpose(0, 1)[None], part[:n].transpose(0, 1)[None]
            expected = dense(one, keys, keys, torch.ones(1, n, dtype=torch.bool))[0][0].transpose(0, 1)
            torch.testing.assert_close(out[: len(part)], expected, rtol=1e-5, atol=1e-5)
            out = out[len(part) :]


@pytest.mark.parametrize("mask", [AttentionMask(causal=True), AttentionMask(align="top_left")], ids=["causal", "place"])
def test_seqused_with_a_place_of_the_masks_own_is_refused(mask):
    layout = PackedLayout.from_counts([[6]])
    q = torch.randn(6, 4, D)
    with pytest.raises(NotImplementedError, match="seqused_k with a mask of its own place, causality or intervals"):
        varlen_attn(q, q, q, layout, layout, 6, 6, mask=mask, seqused_k=torch.tensor([3]))
