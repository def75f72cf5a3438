"""varlen_attn and flash_attn's functions against dense attention per sample, their arguments against the originals'."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen as original
import torch.nn.functional as F
from dense import attention as dense
from dense import check

from mmkernels import AttentionMask, PackedLayout, dispatch
from mmkernels.compat import kept, packed
from mmkernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    pad_input,
    unpad_input,
)
from mmkernels.compat.torch_varlen import varlen_attn
from mmkernels.masks import KeyIntervals

D = 16
Q_LENGTHS, K_LENGTHS = [9, 0, 4, 17], [9, 5, 12, 3]  # equal, no queries, more keys, fewer (queries that see nothing)
WINDOWS = [(-1, -1), (-1, 0), (3, 0), (2, 1), (0, -1)]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def seen(queries, keys, causal, window):
    """flash-attention's rule: the last query stands at the last key."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    inside = (window[0] < 0) | (key >= place - window[0])
    inside = inside & ((window[1] < 0) | (key <= place + window[1])) & torch.ones(queries, 1, dtype=torch.bool)
    return inside & (key <= place) if causal else inside


def by_sample(q, k, v, causal, window, attend, used=None):
    """Dense attention sample by sample, packed again."""
    outs = []
    q_parts, k_parts, v_parts = q.split(Q_LENGTHS), k.split(K_LENGTHS), v.split(K_LENGTHS)
    for index, parts in enumerate(zip(q_parts, k_parts, v_parts, strict=True)):
        n = len(parts[1]) if used is None else used[index]
        qi, ki, vi = (t.transpose(0, 1).unsqueeze(0) for t in (parts[0], parts[1][:n], parts[2][:n]))
        mask = seen(qi.shape[2], n, causal, window)
        outs.append(attend(qi, ki, vi, mask)[0].transpose(0, 1))
    return torch.cat(outs)


def torch_dense(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def exact(q, k, v, mask):
    return dense(q, k, v, mask)[0]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(causal, window, kv_heads):
    inputs = torch.randn(30, 4, D), torch.randn(29, kv_heads, D), torch.randn(29, kv_heads, D)
    cu_q, cu_k = bounds(Q_LENGTHS), bounds(K_LENGTHS)
    both = (
        lambda q, k, v: by_sample(q, k, v, causal, window, torch_dense),
        lambda q, k, v: by_sample(q, k, v, causal, window, exact),
        inputs,
    )
    check(lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, cu_k, 17, 12, 0.0, None, causal, window), *both)
    check(
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 17, 12, causal=causal, window_size=window),
        lambda q, kv: both[0](q, *kv.unbind(1)),
        lambda q, kv: both[1](q, *kv.unbind(1)),
        (inputs[0], torch.stack(inputs[1:], 1)),
    )
    if not causal:
        check(lambda q, k, v: varlen_attn(q, k, v, cu_q, cu_k, 17, 12, window_size=window, enable_gqa=True), *both)


@pytest.mark.parametrize("window", WINDOWS)
def test_seqused_k(window):
    q, k, v = torch.randn(30, 4, D), torch.randn(29, 4, D), torch.randn(29, 4, D)
    used = torch.tensor([4, 5, 7, 0])
    out = varlen_attn(q, k, v, bounds(Q_LENGTHS), bounds(K_LENGTHS), 17, 12, window_size=window, seqused_k=used)
    expected = by_sample(q, k, v, False, window, exact, used.tolist())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_lse_of_varlen_is_that_of_the_rows():
    q = torch.randn(30, 4, D)
    _, lse = varlen_attn(q, q, q, bounds([13, 17]), bounds([13, 17]), 17, 17, return_aux=original.AuxRequest(lse=True))
    for rows in (slice(0, 13), slice(13, 30)):
        part = q[rows].transpose(0, 1)[None]
        torch.testing.assert_close(lse[:, rows], dense(part, part, part, torch.ones(1, 1, dtype=torch.bool))[1][0])


def test_masks_on_top_of_varlen():
    """What the original does not have: modalities, prefixes, dropout."""
    layout = PackedLayout.from_counts([[5, 4], [3, 6]])
    x = torch.randn(18, 3, 4, D)
    mask = AttentionMask.isolated(2)
    out = varlen_attn(*x.unbind(1), layout, layout, 9, 9, mask=mask)
    q, k, v = (t.transpose(0, 1)[None] for t in x.unbind(1))
    sample, modality = torch.arange(18) // 9, layout.modality_ids
    same = (sample[:, None] == sample) & (modality[:, None] == modality)
    torch.testing.assert_close(out, dense(q, k, v, same)[0][0].transpose(0, 1), rtol=1e-5, atol=1e-6)
    assert varlen_attn(*x.unbind(1), layout, layout, 9, 9, mask=mask, dropout_p=0.5).shape == out.shape
    with pytest.raises(ValueError, match="expected one of them"):
        varlen_attn(*x.unbind(1), layout, layout, 9, 9, mask=AttentionMask(window=(1, 1)), window_size=(2, 0))


@pytest.mark.parametrize("lengths", [(11, 11), (6, 13), (13, 6)])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_padded(causal, window, lengths):
    queries, keys = lengths
    mask = seen(queries, keys, causal, window)
    inputs = torch.randn(3, queries, 4, D), torch.randn(3, keys, 2, D), torch.randn(3, keys, 2, D)

    def by(attend):
        return lambda q, k, v: attend(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)

    check(
        lambda q, k, v: flash_attn_func(q, k, v, causal=causal, window_size=window), by(torch_dense), by(exact), inputs
    )
    check(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=causal, window_size=window),
        lambda q, kv: by(torch_dense)(q, *kv.unbind(2)),
        lambda q, kv: by(exact)(q, *kv.unbind(2)),
        (inputs[0], torch.stack(inputs[1:], 2)),
    )
    out, lse, probabilities = flash_attn_func(*inputs, causal=causal, window_size=window, return_attn_probs=True)
    expected = dense(*(t.double().transpose(1, 2) for t in inputs), mask)[1]
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)
    assert out.shape == inputs[0].shape
    assert probabilities is None


def test_qkvpacked_forms_and_scale():
    x = torch.randn(2, 9, 3, 4, D)
    expected = flash_attn_func(*x.unbind(2), softmax_scale=0.3, causal=True)
    assert torch.equal(flash_attn_qkvpacked_func(x, softmax_scale=0.3, causal=True), expected)
    packed_x, cu = x.flatten(0, 1), bounds([9, 9])
    out = flash_attn_varlen_qkvpacked_func(packed_x, cu, 9, softmax_scale=0.3, causal=True)
    assert torch.equal(out, expected.flatten(0, 1))


@pytest.mark.skipif(dispatch.cpp_missing() is not None, reason="the shortest way through attention is C++'s")
@pytest.mark.parametrize("causal", [False, True])
def test_qkvpacked_forms_have_one_gradient(causal):
    """From the second call on, as mmkernels.attention_qkvpacked: not three that autograd joins by a copy."""
    x, cu = torch.randn(2, 9, 3, 4, D, requires_grad=True), bounds([9, 9])
    for call in (lambda: flash_attn_qkvpacked_func(x, causal=causal),
                 lambda: flash_attn_varlen_qkvpacked_func(x.flatten(0, 1), cu, 9, causal=causal)):  # fmt: skip
        expected = flash_attn_func(*x.unbind(2), causal=causal).flatten(0, 1)
        g = torch.randn_like(expected)
        (wanted,) = torch.autograd.grad(expected, x, g)
        for _ in range(2):
            out = call()
            last = out.grad_fn
            while "View" in last.name() or "Unflatten" in last.name():
                last = last.next_functions[0][0]
            torch.testing.assert_close(torch.autograd.grad(out, x, g.view(out.shape))[0], wanted, rtol=0, atol=0)
        assert "PackedAttention" in last.name()


def test_dropout_and_determinism():
    x = torch.randn(2, 40, 3, 4, D, requires_grad=True)
    torch.manual_seed(1)
    first = flash_attn_qkvpacked_func(x, dropout_p=0.4, deterministic=True)
    torch.manual_seed(1)
    assert torch.equal(flash_attn_qkvpacked_func(x, dropout_p=0.4, deterministic=True), first)
    assert not torch.equal(flash_attn_qkvpacked_func(x, dropout_p=0.4), first)
    gradients = [torch.autograd.grad(flash_attn_qkvpacked_func(x, deterministic=True).sum(), x)[0] for _ in range(2)]
    assert torch.equal(*gradients)


def test_unpad_attend_pad():
    """The usual round trip of a padded model, which equals attention with a key padding mask on the real rows."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    x = torch.randn(3, 5, 3, 2, D, requires_grad=True)
    rows, indices, cu, longest, used = unpad_input(x, mask)
    assert (cu.tolist(), longest, used.tolist(), cu.dtype) == ([0, 3, 8, 10], 5, [3, 5, 2], torch.int32)
    out = pad_input(flash_attn_varlen_qkvpacked_func(rows, cu, longest), indices, 3, 5)
    q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
    expected = dense(q, k, v, mask.bool()[:, None, None])[0].transpose(1, 2) * mask[..., None, None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(o, x, g)[0] for o in (out, expected)), rtol=1e-5, atol=1e-5)
    kept, _, cu, *_ = unpad_input(x, mask, unused_mask=1 - mask)
    assert kept.shape[0] == 15
    assert cu.tolist() == [0, 5, 10, 15]


def test_flash_arguments_that_are_not_taken():
    x, cu = torch.randn(1, 6, 2, D), bounds([6])
    for taken in ({"softcap": 30.0}, {"alibi_slopes": torch.ones(2)}):
        with pytest.raises(NotImplementedError, match=next(iter(taken))):
            flash_attn_func(x, x, x, **taken)
    for taken in ({"softcap": 30.0}, {"alibi_slopes": torch.ones(2)}, {"block_table": torch.zeros(1, 1)}):
        with pytest.raises(NotImplementedError, match=next(iter(taken))):
            flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 6, 6, **taken)


def test_dropped_probabilities_are_not_returned():
    x = torch.randn(1, 6, 2, D)
    with pytest.raises(NotImplementedError, match="return_attn_probs with dropout_p"):
        flash_attn_func(x, x, x, dropout_p=0.1, return_attn_probs=True)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("block_table", torch.zeros(1, 1), NotImplementedError),
        ("num_splits", 4, NotImplementedError),
        ("cu_seq_k", None, NotImplementedError),
        ("seqused_k", torch.tensor([1, 2]), ValueError),
        ("seqused_k", torch.tensor([2.5]), ValueError),
        ("seqused_k", torch.tensor([True]), ValueError),
        ("seqused_k", [2], ValueError),
        ("seqused_k", np.array([2]), ValueError),
        ("seqused_k of sample 0 is -1, expected 0 to 6", {"seqused_k": torch.tensor([-1])}, ValueError),
        ("seqused_k of sample 0 is 7, expected 0 to 6", {"seqused_k": torch.tensor([7])}, ValueError),
        ("bounds of queries are list, expected an int32 tensor", {"cu_seq_q": [0, 6]}, ValueError),
        ("bounds of keys are ndarray, expected an int32 tensor", {"cu_seq_k": np.array([0, 6])}, ValueError),
        ("bounds of keys are torch.float32", {"cu_seq_k": torch.tensor([0.0, 5.9])}, ValueError),
        ("bounds of keys are torch.bool", {"cu_seq_k": torch.tensor([False, True])}, ValueError),
        (r"bounds of queries are torch.int64 \(1, 2\)", {"cu_seq_q": torch.tensor([[0, 6]])}, ValueError),
        ("bounds of queries are from 0 to 4294967298, ex", {"cu_seq_q": torch.tensor([0, 2**32 + 2, 6])}, ValueError),
        ("bounds of queries are from -1 to 6, expected 0 to the 6", {"cu_seq_q": torch.tensor([-1, 6])}, ValueError),
        ("scale is a tensor", {"scale": torch.tensor(0.3)}, ValueError),
        ("dropout_p is a tensor", {"dropout_p": torch.tensor(0.3)}, ValueError),
        ("scale is str, expected a number", {"scale": "0.3"}, ValueError),
        ("return_aux is bool, expected torch's AuxRequest", {"return_aux": True}, ValueError),
        ("window_size", None, ValueError),
        ("window_size", (1, 2, 3), ValueError),
    ],
    ids=str,
)
def test_varlen_arguments_that_are_not_taken(argument, value, error):
    q, k = torch.randn(6, 4, D), torch.randn(6, 2, D)
    call = {"cu_seq_q": bounds([6]), "cu_seq_k": bounds([6]), "max_q": 6, "max_k": 6, "enable_gqa": True}
    with pytest.raises(error, match=argument):
        varlen_attn(q, k, k, **(call | (value if isinstance(value, dict) else {argument: value})))


@pytest.mark.parametrize("window", [None, (1, 2, 3), (1.5, 0)])
def test_flash_windows_are_two_integers(window):
    x, cu = torch.randn(1, 6, 3, 2, D), bounds([6])
    for call in (lambda: flash_attn_qkvpacked_func(x, window_size=window),
                 lambda: flash_attn_varlen_qkvpacked_func(x[0], cu, 6, window_size=window)):  # fmt: skip
        with pytest.raises(ValueError, match=r"func: window_size is .*, expected \(left, right\) as integers"):
            call()


def test_flash_scales_are_numbers():
    x, cu, scale = torch.randn(1, 6, 3, 2, D), bounds([6]), torch.tensor(0.3, requires_grad=True)
    for call in (lambda: flash_attn_qkvpacked_func(x, softmax_scale=scale),
                 lambda: flash_attn_varlen_qkvpacked_func(x[0], cu, 6, softmax_scale=scale)):  # fmt: skip
        with pytest.raises(ValueError, match="softmax_scale is a tensor, expected a number; multiply the queries"):
            call()


@pytest.mark.parametrize("name", ["causal", "deterministic"])
@pytest.mark.parametrize("value", ["False", [0], None])
def test_flash_flags_are_bools(name, value):
    """The text "False" was taken for True, and a list could not be hashed."""
    x, cu = torch.randn(1, 6, 3, 2, D), bounds([6])
    for call in (
        lambda: flash_attn_qkvpacked_func(x, **{name: value}),
        lambda: flash_attn_func(*x.unbind(2), **{name: value}),
        lambda: flash_attn_varlen_func(*x[0].unbind(1), cu, cu, 6, 6, **{name: value}),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*, expected a bool"):
            call()


def test_a_graph_that_is_captured_lays_out_bounds_itself(monkeypatch):
    """Its replays meet other bounds in the same tensor."""
    q, cu, used = torch.randn(30, 4, D), bounds([13, 17]), torch.tensor([5, 9])
    masks = lambda layout: packed.seqused_mask("f", AttentionMask(), layout, layout, used)  # noqa: E731
    make = lambda: packed.layouts("f", q, q, cu, cu, 17, 17)[0]  # noqa: E731
    layout = make()
    mask = masks(layout)
    assert (make(), masks(layout)) == (layout, mask)
    monkeypatch.setattr(kept, "captures", lambda device: True)
    assert make() not in (layout, make())
    assert masks(layout) not in (mask, masks(layout))
    monkeypatch.undo()
    assert (make(), masks(layout)) == (layout, mask)


def test_what_is_not_planned_before_a_capture_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(kept, "captures", lambda device: True)
    x = torch.randn(1, 37, 3, 2, D)
    for call in (lambda: flash_attn_qkvpacked_func(x, window_size=(31, 0)),
                 lambda: flash_attn_func(*x.unbind(2), window_size=(31, 0))):  # fmt: skip
        with pytest.raises(NotImplementedError, match="func: lengths on the host, or none, cannot be planned"):
            call()


@pytest.mark.parametrize(
    ("last", "longest", "which"), [(49, 30, "runs from 0 to 49"), (50, 10, "a sample has 30 tokens")]
)
def test_bounds_that_do_not_fit_say_whose_they_are(last, longest, which):
    q, cu = torch.randn(50, 2, 16), torch.tensor([0, 20, 50], dtype=torch.int32)
    keys = torch.tensor([0, 20, last], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"varlen_attn: the bounds of keys: .*{which}"):
        varlen_attn(q, q, q, cu, keys, 30, longest)


def test_bounds_and_used_keys_on_a_device_are_checked_by_what_needs_no_reading():
    q = torch.randn(6, 4, D)
    with pytest.raises(ValueError, match=r"bounds of queries are torch.float32 \(2,\)"):
        varlen_attn(q, q, q, bounds([6]).float().to("meta"), bounds([6]), 6, 6)
    with pytest.raises(ValueError, match=r"seqused_k is torch.float32 \(1,\)"):
        varlen_attn(q, q, q, bounds([6]), bounds([6]), 6, 6, seqused_k=torch.ones(1, device="meta"))


def test_one_seqused_makes_one_mask_per_version():
    q, cu, used = torch.randn(30, 4, D), bounds([13, 17]), torch.tensor([5, 9])
    call = lambda window: varlen_attn(q, q, q, cu, cu, 17, 17, seqused_k=used, window_size=window)  # noqa: E731
    expected = [call(window) for window in WINDOWS]
    layout, _ = packed.layouts("test", q, q, cu, cu, 17, 17)
    lowered = len(layout.cache)
    for window, out in zip(WINDOWS, expected, strict=True):
        assert torch.equal(call(window), out)
    assert len(layout.cache) == lowered
    used[0] = 12
    assert not torch.equal(call((-1, -1)), expected[0])


def test_seqused_with_intervals_of_ones_own_is_refused():
    q, cu = torch.randn(6, 4, D), bounds([6])
    mask = AttentionMask(intervals=KeyIntervals(torch.zeros(6, dtype=torch.long), torch.arange(6)))
    with pytest.raises(NotImplementedError, match="seqused_k with a mask of its own place, causality or intervals"):
        varlen_attn(q, q, q, cu, cu, 6, 6, mask=mask, seqused_k=torch.tensor([3]))


def test_layouts_and_masks_do_not_keep_bounds_alive():
    """Also those of device bounds, which a layout holds."""
    before = len(kept._by_tensor)
    for device in ("cpu", "meta"):
        x, cu = torch.randn(18, 2, D, device=device), bounds([9, 9]).to(device)
        packed.layouts("test", x, x, cu, cu, 9, 9)
    x, cu, used = torch.randn(18, 2, D), bounds([9, 9]), torch.tensor([4, 5])
    varlen_attn(x, x, x, cu, cu, 9, 9, seqused_k=used)
    assert len(kept._by_tensor) == before + 2
    del x, cu, used
    assert len(kept._by_tensor) == before


def test_signature_of_varlen_attn_is_torchs():
    """Of whichever torch runs this, 2.11 to 2.13: each of its arguments, in order, and with its default."""
    originals = inspect.signature(original.varlen_attn).parameters
    mine = inspect.signature(varlen_attn).parameters
    for name, parameter in originals.items():
        assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default), name
    positional = [n for n, p in originals.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(positional)] == positional


def test_packed_views_are_not_copied(monkeypatch):
    seen_pointers = []
    real = packed.attention
    monkeypatch.setattr(
        packed, "attention", lambda *t, **o: seen_pointers.extend(x.data_ptr() for x in t) or real(*t, **o)
    )
    x = torch.randn(18, 3, 4, D)
    flash_attn_varlen_func(*x.unbind(1), bounds([9, 9]), bounds([9, 9]), 9, 9)
    assert seen_pointers == [t.data_ptr() for t in x.unbind(1)]


def test_bounds_make_one_layout_per_version():
    x, cu = torch.randn(18, 2, D), bounds([9, 9])
    first, _ = packed.layouts("test", x, x, cu, cu, 9, 9)
    assert packed.layouts("test", x, x, cu, cu, 9, 9)[0] is first
    cu[1] = 4
    assert packed.layouts("test", x, x, cu, cu, 14, 14)[0].cu_seqlens.tolist() == [0, 4, 18]
