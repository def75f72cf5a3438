"""Hugging Face's masks as intervals, against the dense masks that transformers builds for sdpa, pair by pair.

The functions are put together as transformers puts them together; padding stands right, left, within, everywhere.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as mu  # noqa: E402

from mmkernels.compat import huggingface  # noqa: E402
from mmkernels.compat.huggingface_masks import PaddedMask  # noqa: E402
from mmkernels.compat.padded import plan_device_bounds  # noqa: E402
from mmkernels.masks import MaskPlan  # noqa: E402

B, L = 4, 12
IMAGES = torch.full((B, L), -1)
IMAGES[:, 2:5], IMAGES[:, 5:7], IMAGES[1, 9:] = 0, 1, 2  # two blocks side by side
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2]]).expand(B, L)  # sequences of 5, 3, 1 and 3


def packed(function, blocks=None):
    """As transformers put it together before 5.24 where there are no blocks, and from then on where there are."""
    own = mu.packed_sequence_mask_function(mu.find_packed_sequence_indices(POSITIONS))
    by_position = mu.remap_positions_for_packed_sequence(function, POSITIONS)
    if blocks is None:
        return mu.and_masks(own, by_position)
    return mu.and_masks(mu.or_masks(by_position, mu.blockwise_overlay(blocks)), own)


FUNCTIONS = {
    "encoder": mu.bidirectional_mask_function,
    "causal": mu.causal_mask_function,
    "window": mu.sliding_window_causal_mask_function(4),
    "window of one": mu.sliding_window_causal_mask_function(1),
    "window on both sides": mu.sliding_window_bidirectional_mask_function(3),
    "window of itself": mu.sliding_window_bidirectional_mask_function(0),
    "chunks": mu.chunked_causal_mask_function(5, torch.tensor([0, 0, 4, 0])),
    "images": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(IMAGES)),
    "images beyond the window": mu.or_masks(mu.sliding_window_causal_mask_function(3), mu.blockwise_overlay(IMAGES)),
    "images within the window": mu.and_masks(
        mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(IMAGES)), mu.sliding_window_overlay(3)
    ),
    "packed": packed(mu.causal_mask_function),
    "packed, window": packed(mu.sliding_window_causal_mask_function(3)),
    "packed, images": mu.or_masks(packed(mu.causal_mask_function), mu.blockwise_overlay(IMAGES)),
    "packed, images cut": packed(mu.causal_mask_function, IMAGES),
    "packed, encoder": packed(mu.bidirectional_mask_function),
}


def padding(kind: str) -> torch.Tensor | None:
    mask = torch.ones(B, L, dtype=torch.bool)
    if kind == "right":
        mask[1, 7:], mask[2, 1:] = False, False
    elif kind == "left":
        mask[1, :3], mask[2, :11] = False, False
    elif kind == "anywhere":
        mask[0, 4], mask[1, :2], mask[1, 5:8], mask[2] = False, False, False, False
    return None if kind == "none" else mask


def pairs(mask: PaddedMask, *, skip: bool, queries: int = L) -> torch.Tensor:
    """bool [B, Lq, Lk] of what the plan lets through."""
    plan = mask.plan(queries, torch.device("cpu"), skip=skip, by_head=0)
    return pairs_of(plan, queries, mask.keys)


def pairs_of(plan, queries: int, keys: int) -> torch.Tensor:
    lowered = MaskPlan.lower(plan.layout, plan.mask, plan.k_layout)
    place = torch.arange(lowered.k_table.shape[1])
    seen = (place >= lowered.kv_lo.unsqueeze(1)) & (place < lowered.kv_hi.unsqueeze(1))
    if lowered.has_visible:
        seen &= (lowered.q_bits.unsqueeze(1) & lowered.k_bits) != 0
    samples = seen.view(-1, queries, seen.shape[1] // keys, keys)
    own = torch.arange(samples.shape[0])
    assert int(seen.sum()) == int(samples[own, :, own].sum())  # nobody sees another sample
    return samples[own, :, own]


@pytest.mark.parametrize("pads", ["none", "right", "left", "anywhere"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_visible_pairs_equal_the_dense_mask(name, pads):
    function, pad = FUNCTIONS[name], padding(pads)
    dense = mu.sdpa_mask(B, L, L, 0, 0, function, pad, allow_is_causal_skip=False)[:, 0]
    mask = huggingface.attention_mask(B, L, L, 0, 0, function, pad, allow_is_bidirectional_skip=True)
    assert isinstance(mask, PaddedMask)
    assert torch.equal(pairs(mask, skip=False), dense)
    seen = pairs(mask, skip=True)
    real = torch.ones(B, L, dtype=torch.bool) if pad is None else pad
    assert torch.equal(seen[real], dense[real])
    first, last = real.int().argmax(1), L - real.flip(1).int().argmax(1)
    place = torch.arange(L)
    outside = (place < first.unsqueeze(1)) | (place >= last.unsqueeze(1)) | ~real.any(1, keepdim=True)
    assert not seen[outside].any()  # rows of padding at the ends cost nothing
    assert (mask.hidden is None) == (pads != "anywhere")  # and bounds do without a modality for them


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_read_on_the_host_whatever_the_default_device(name):
    pad = padding("anywhere")
    asked = (B, L, L, 0, 0, FUNCTIONS[name], pad)
    expected = pairs(huggingface.attention_mask(*asked, allow_is_bidirectional_skip=True), skip=True)
    with torch.device("meta"):
        mask = huggingface.attention_mask(*asked, allow_is_bidirectional_skip=True)
        mask.plan(L, torch.device("cpu"), skip=True, by_head=0)
    assert torch.equal(pairs(mask, skip=True), expected)


@pytest.mark.parametrize("pads", ["right", "left", "anywhere"])
def test_bounds_on_a_device_give_the_same_pairs(pads):
    """What runs where padding is on a GPU: tensors that are never read, lowered there.  Here they lie on the CPU."""
    pad = padding(pads)
    for name in ("encoder", "window", "images beyond the window"):
        mask = huggingface.attention_mask(B, L, L, 0, 0, FUNCTIONS[name], pad, allow_is_bidirectional_skip=True)
        lo, hi = (torch.minimum(torch.maximum(t, mask.first[:, None]), mask.stop[:, None]) for t in (mask.lo, mask.hi))
        place = torch.arange(L)
        hidden = ~pad & (place >= mask.first[:, None]) & (place < mask.stop[:, None])
        plan = plan_device_bounds(lo, hi, B, hidden.shape[1], False, hidden)
        assert plan.layout.host is None
        assert torch.equal(pairs_of(plan, L, L), pairs(mask, skip=False)), name
        by_head = plan_device_bounds(lo, hi, 3 * B, hidden.shape[1], True, hidden)
        assert torch.equal(pairs_of(by_head, L, L), pairs(mask, skip=False).repeat_interleave(3, 0)), name


def test_queries_that_continue_a_cache():
    """Five more queries after seven tokens, the first two of which were padding."""
    pad = torch.ones(B, L, dtype=torch.bool)
    pad[0, :2] = False
    for name in ("causal", "window"):
        dense = mu.sdpa_mask(B, 5, L, 7, 0, FUNCTIONS[name], pad, allow_is_causal_skip=False)[:, 0]
        mask = huggingface.attention_mask(B, 5, L, torch.tensor(7), 0, FUNCTIONS[name], pad)
        assert torch.equal(pairs(mask, skip=True, queries=5), dense)
    # A cache that slid away: keys from 4 on.
    pad[1, 10:] = False
    dense = mu.sdpa_mask(B, 5, 8, 7, 4, FUNCTIONS["window"], pad, allow_is_causal_skip=False)[:, 0]
    mask = huggingface.attention_mask(B, 5, 8, 7, 4, FUNCTIONS["window"], pad)
    assert torch.equal(pairs(mask, skip=False, queries=5), dense)
    assert torch.equal(pairs(mask, skip=True, queries=5), dense & pad[:, 7:, None])


def test_a_query_that_is_none_of_the_keys_is_no_padding():
    """As of a head that pools: no row is skipped, though the first keys are padding."""
    dense = mu.sdpa_mask(B, 1, L, 0, 0, FUNCTIONS["encoder"], padding("left"))[:, 0]
    mask = huggingface.attention_mask(
        B, 1, L, 0, 0, FUNCTIONS["encoder"], padding("left"), allow_is_bidirectional_skip=True
    )
    assert torch.equal(pairs(mask, skip=True, queries=1), dense)


def test_unknown_functions_become_dense_masks():
    """A user's own function is evaluated as for sdpa; what is no interval is refused when attention reads it back."""
    mask = huggingface.attention_mask(B, L, L, mask_function=lambda b, h, q, kv: kv <= q + 2)
    assert mask.shape == (B, 1, L, L)
    q = torch.randn(B, 2, L, 16)
    out, _ = huggingface.attention_forward(torch.nn.Module(), q, q, q, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2))
    every_second = huggingface.attention_mask(B, L, L, mask_function=lambda b, h, q, kv: (q + kv) % 2 == 0)
    with pytest.raises(NotImplementedError, match=r"^mmkernels: attn_mask lets .*; use attn_implementation='eager'$"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, every_second)


def causal_mask_function(batch, head, query, key):
    """A user's, by the name of transformers' own."""
    return key <= query + 2


PIECES = torch.tensor([[0, 0, -1, 0, 0, -1, -1, 1, 1, 1, -1, -1]]).expand(B, L)
OWN = mu.packed_sequence_mask_function(mu.find_packed_sequence_indices(POSITIONS))
CAUSAL_BY_POSITION = mu.remap_positions_for_packed_sequence(mu.causal_mask_function, POSITIONS)
NO_INTERVALS = {
    "a user's": causal_mask_function,
    "sequences in several pieces": mu.packed_sequence_mask_function(torch.arange(L).remainder(3).expand(B, L)),
    "images in several pieces": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(PIECES)),
    "positions alone": CAUSAL_BY_POSITION,
    "positions, or a sequence": mu.or_masks(OWN, CAUSAL_BY_POSITION),
    "images by position": packed(mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(IMAGES))),
    "window of none, or images": mu.or_masks(mu.sliding_window_causal_mask_function(0), mu.blockwise_overlay(IMAGES)),
    "window of less than none, or images": mu.or_masks(
        mu.sliding_window_bidirectional_mask_function(-1), mu.blockwise_overlay(IMAGES)
    ),
}


@pytest.mark.parametrize("name", NO_INTERVALS)
def test_functions_that_give_no_intervals_become_dense_masks(name):
    dense = mu.sdpa_mask(B, L, L, 0, 0, NO_INTERVALS[name], allow_is_causal_skip=False)
    mask = huggingface.attention_mask(B, L, L, mask_function=NO_INTERVALS[name])
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, dense)


@pytest.mark.parametrize("name", ["chunks", "images"])
def test_bounds_of_packs_do_not_take_the_place_of_chunks_or_blocks(name):
    mask = huggingface.attention_mask(B, L, L, mask_function=FUNCTIONS[name])
    q, bounds = torch.randn(B, 2, L, 16), torch.tensor([0, L * B], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q with a padding, block or dense attention_mask"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, mask, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)


def test_masks_that_a_model_wants_as_tensors_stay_tensors():
    """allow_*_skip=False on a plain mask means that the model goes on to compute with it."""
    for function in (mu.causal_mask_function, mu.bidirectional_mask_function):
        mask = huggingface.attention_mask(B, L, L, mask_function=function, allow_is_causal_skip=False)
        assert mask.dtype == torch.bool
    # But for one query, which sees all keys.
    assert isinstance(huggingface.attention_mask(B, 1, L, L - 1, allow_is_causal_skip=False), PaddedMask)


@pytest.mark.parametrize(
    "argument", ["softcap", "s_aux", "position_bias", "indices", "cache", "head_mask", "output_attentions"]
)
def test_what_is_not_computed_is_refused_by_name(argument):
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(NotImplementedError, match=argument):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, None, is_causal=False, **{argument: torch.ones(1)})
    for off in (None, False):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, None, is_causal=False, **{argument: off})


def test_what_is_no_flag_is_named():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="is_causal is 'False', expected a bool"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, None, is_causal="False")


def test_calls_without_a_mask():
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 9, 16)
    out, weights = huggingface.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False, scaling=0.3)
    assert weights is None
    expected = F.scaled_dot_product_attention(q, k, k, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
    out, _ = huggingface.attention_forward(torch.nn.Module(), q, q, q, None)  # as for sdpa: causal unless a module says
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2))
    out, _ = huggingface.attention_forward(torch.nn.Module(), q, q, q, None, is_causal=False, sliding_window=6)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q).transpose(1, 2))  # no key is beyond it
    last = q[:, :, -1:]  # one query sees all keys, causal or not
    out, _ = huggingface.attention_forward(torch.nn.Module(), last, k, k, None, is_causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(last, k, k, enable_gqa=True).transpose(1, 2))
    for name, kwargs in (("is_causal", {"is_causal": True}), ("sliding_window", {"is_causal": False})):
        with pytest.raises(NotImplementedError, match=name):
            huggingface.attention_forward(torch.nn.Module(), q, k, k, None, sliding_window=3, **kwargs)
    with pytest.raises(NotImplementedError, match="value has width 8"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q[..., :8], None, is_causal=False)
    other = huggingface.attention_mask(2, 5, 5, mask_function=mu.causal_mask_function)
    with pytest.raises(ValueError, match="attention_mask is for"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, other)


class Recorder(TorchDispatchMode):
    """The operators that run, and the largest tensor that any of them makes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


def test_no_dense_mask_and_no_copies():
    """A decoder's padded batch: with sdpa a tensor of B L L is made, with intervals none; q, k, v stay views."""
    length = 128
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    huggingface.register()
    model = transformers.LlamaModel._from_config(config, attn_implementation="mmkernels").eval()
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 40:] = 0
    ids = torch.zeros(2, length, dtype=torch.long)
    largest = {}
    for name in ("mmkernels", "sdpa"):
        model.set_attn_implementation(name)
        with Recorder() as seen, torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        largest[name] = seen.largest
    assert largest["sdpa"] >= 2 * length * length > largest["mmkernels"]

    q, k, v = (torch.randn(2, length, 2, 16).transpose(1, 2) for _ in range(3))
    padded = huggingface.attention_mask(
        2, length, length, mask_function=mu.causal_mask_function, attention_mask=mask > 0
    )
    huggingface.attention_forward(torch.nn.Module(), q, k, v, padded)
    with Recorder() as seen:
        huggingface.attention_forward(torch.nn.Module(), q, k, v, padded)
    assert not {"clone", "copy_", "_to_copy", "index_select", "index"} & set(seen.names), seen.names


def test_plans_without_padding_are_kept_with_all_others_within_their_limit(monkeypatch):
    from mmkernels.compat import kept

    monkeypatch.setattr(kept, "MAX_PLANNED_TOKENS", 500)
    cpu = torch.device("cpu")

    def plan(n):
        place = torch.arange(n).unsqueeze(0)
        mask = PaddedMask(torch.zeros_like(place), place + 1, n, None, batch=2, offset=0, parts=set())
        return mask.plan(n, cpu, skip=True, by_head=4)

    assert plan(7) is plan(7)
    for n in range(20, 30):
        plan(n)
    assert sum(p.layout.total_tokens for p in kept.plans._kept.values()) <= 500


def test_scaling_and_dropout_are_numbers():
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match="mmkernels: scaling is a tensor, expected a number; multiply the queries"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, None, scaling=torch.tensor(0.3))
    with pytest.raises(ValueError, match="mmkernels: dropout is a tensor"):
        huggingface.attention_forward(torch.nn.Module(), q, q, q, None, dropout=torch.tensor(0.3))
