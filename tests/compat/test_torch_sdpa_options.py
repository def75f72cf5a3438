"""scaled_dot_product_attention where its own keywords, masks and fallback meet, and what it hands on."""

import pytest
import torch
import torch.nn.functional as F
from dense import attention as dense
from padded_batch import CAUSAL, KEYS, LENGTHS, REAL, B, D, H, L, heads

from mmkernels.compat import padded, plans, torch_sdpa
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as ours


def test_causal_at_the_bottom_right_without_lengths():
    q, (_, k, v) = heads("projection")[0], heads("projection", length=50)
    seen = torch.ones(L, 50, dtype=torch.bool).tril(50 - L)
    out = ours(q, k, v, is_causal=True, align="bottom_right")
    torch.testing.assert_close(out, dense(q, k, v, seen)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_the_fallback_adds_our_keywords_to_the_mask(kind):
    """In float64, which is not taken; causal from the last real key, where torch's counts from the first."""
    q, (_, k, v) = heads("projection")[0].double(), (t.double() for t in heads("projection", length=50))
    keys = torch.tensor([50, 30, 41])
    i, j = torch.arange(L)[:, None], torch.arange(50)
    seen = (j <= i + (keys - LENGTHS)[:, None, None]) & (j < keys[:, None, None]) & REAL[:, :, None]
    seen, bias = seen[:, None], torch.zeros(L, 50, dtype=torch.float64)
    given = {"none": None, "bool": (j != 4).expand(L, 50), "float": bias.masked_fill(j == 4, -torch.inf)}[kind]
    options = {"lengths": LENGTHS, "key_lengths": keys, "is_causal": True, "align": "bottom_right"}
    out = ours(q, k, v, given, **options, fallback="torch")
    expected = dense(q, k, v, seen if kind == "none" else seen & (j != 4))[0]
    torch.testing.assert_close(out, expected)


def test_more_masks_that_stretches_hold():
    q, k, v = heads("projection")
    blind = (torch.arange(L) != 3) & (torch.arange(L) != 0)[:, None]  # a key that nobody sees, a query that sees none
    torch.testing.assert_close(ours(q, k, v, blind), dense(q, k, v, blind)[0], rtol=1e-5, atol=1e-5)
    low = torch.zeros(B, 1, 1, L).masked_fill(~KEYS, 0.75 * torch.finfo(torch.float32).min)  # rounded on its way
    torch.testing.assert_close(ours(q, k, v, low), dense(q, k, v, KEYS)[0], rtol=1e-5, atol=1e-5)
    alike = (KEYS & CAUSAL).expand(B, H, L, L).clone()  # for each head, but the same, so that heads may share keys
    out = ours(q, k[:, :2], v[:, :2], alike, enable_gqa=True)
    torch.testing.assert_close(out, dense(q, k[:, :2], v[:, :2], KEYS & CAUSAL)[0], rtol=1e-5, atol=1e-5)
    q, k, v = (torch.randn(2, 3, H, n, D) for n in (7, 9, 9))
    mask = torch.arange(9) < torch.tensor([9, 2, 5])[:, None, None, None].expand(3, 1, 7, 1)
    expected = F.scaled_dot_product_attention(q, k, v, mask[None])
    torch.testing.assert_close(ours(q, k, v, mask[None]), expected, rtol=1e-5, atol=1e-5)


def test_more_refusals():
    q, k, v = heads("projection")
    with pytest.raises(NotImplementedError, match=r"scale is 0\.0, taken are positive ones"):
        ours(q, k, v, KEYS, scale=0.0)
    with pytest.raises(ValueError, match=r"query, key and value are torch\.float32, torch\.bfloat16 and"):
        ours(q, k.bfloat16(), v, KEYS)
    with pytest.raises(ValueError, match="key has 0 heads, expected a divisor of query's 4"):
        ours(q, k[:, :0], v[:, :0], KEYS, enable_gqa=True)
    with pytest.raises(ValueError, match="lengths: queries have 37 places and keys 36, expected key_lengths too"):
        ours(q, k[:, :, 1:], v[:, :, 1:], lengths=LENGTHS)
    with pytest.raises(RuntimeError):  # torch's own: heads that share keys are asked for
        ours(q, k[:, :2], v[:, :2])
    doubles = (t.double() for t in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotImplementedError, match=r"query is torch\.float64"):
        ours(*doubles, KEYS)


def test_options_reach_attention(monkeypatch):
    seen, real = [], padded.attention
    monkeypatch.setattr(padded, "attention", lambda *t, **o: seen.append(o) or real(*t, **o))
    ours(*heads("projection"), KEYS, scale=0.3, dropout_p=0.1, deterministic=True, impl="torch")
    ours(*heads("projection"), KEYS)
    names = ("scale", "dropout_p", "deterministic", "impl")
    assert [tuple(o[n] for n in names) for o in seen] == [(0.3, 0.1, True, "torch"), (None, 0.0, None, "auto")]


def device_intervals(lengths, key_lengths, by_head=False):
    """As on a GPU, with tensors that happen to be on the CPU."""
    shape = plans.Shape(2, 3, 3, 9, 9)
    seen = plans.Seen(False, (-1, -1), False, lengths, key_lengths, None)
    mask = plans._device_plan(seen, lengths, key_lengths, shape, torch.device("cpu"), by_head).mask
    return mask.intervals.lo, mask.intervals.hi


def test_device_lengths_of_queries_and_of_keys_do_not_take_one_anothers_plans():
    given = torch.tensor([4, 9])
    for _ in range(2):
        lo, hi = device_intervals(given, given)
        assert (lo == hi).tolist() == [i >= 4 for i in range(9)] + [False] * 9
        lo, hi = device_intervals(None, given)
        assert not (lo == hi).any()


def test_device_lengths_by_head_are_those_of_each_sample():
    _, hi = device_intervals(None, torch.tensor([4, 7]), by_head=True)
    assert hi.view(6, 9)[:, 0].tolist() == [4, 4, 4, 7, 7, 7]


def test_device_lengths_without_a_version_are_planned_every_time():
    own = torch.tensor([4, 9])
    with torch.inference_mode():
        keys = torch.tensor([9, 5])
        assert device_intervals(own, keys)[1].view(2, 9)[:, 0].tolist() == [9, 5]
        keys[1] = 7
        assert device_intervals(own, keys)[1].view(2, 9)[:, 0].tolist() == [9, 7]


def test_the_fallback_runs_inside_a_compiled_region():
    """There no mask is read, so that it is not known whether ours could take it."""
    q, k, v = heads("projection")
    mask = torch.randn(L, L)
    run = torch.compile(lambda *t: ours(*t, fallback="torch"), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    assert torch_sdpa._refused(q, v, mask, 0.0, None, True, None) is None


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_padding_holds_reaches_no_further_than_in_torch(name, impl):
    """NaN in padding rows: where torch's result and gradients of real rows are finite under the mask, so are ours."""

    def finite(attend):
        torch.manual_seed(0)
        tensors = dict(zip("qkv", heads("projection"), strict=True))
        hole = torch.where(REAL[:, None, :, None], tensors[name], torch.nan)
        leaves = [t.clone().requires_grad_() for t in (tensors | {name: hole}).values()]
        out = attend(*leaves)
        out.backward(torch.zeros_like(out).masked_fill(REAL[:, None, :, None], 1.0))
        return [bool(t.transpose(1, 2)[REAL].isfinite().all()) for t in (out, *(leaf.grad for leaf in leaves))]

    torchs = finite(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, KEYS))
    for options in ({"attn_mask": KEYS}, {"lengths": LENGTHS}, {"key_lengths": LENGTHS}):
        assert all(
            a or not b for a, b in zip(finite(lambda *t, o=options: ours(*t, **o, impl=impl)), torchs, strict=True)
        )
