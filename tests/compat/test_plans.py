"""Plans of padded batches: made once per content, never another's, and kept no longer than what they are of."""

import itertools
import sys
import threading

import torch
import torch.nn.functional as F
from dense import attention as dense
from padded_batch import KEYS, B, D, H, L, heads

from mmkernels import PackedLayout
from mmkernels.compat import kept, mask_reading, plans, torch_sdpa
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as ours
from mmkernels.compat.torch_varlen import varlen_attn


def test_a_mask_is_read_once_per_version(monkeypatch):
    reads = []
    real = mask_reading.read
    monkeypatch.setattr(mask_reading, "read", lambda *a: reads.append(1) or real(*a))
    q, k, v = heads("projection")
    mask = KEYS.clone()
    for _ in range(3):  # layers; the second way is how models cut their masks to the keys at hand
        ours(q, k, v, mask)
        ours(q, k, v, mask[:, :, :, :L])
    assert len(reads) == 1
    mask[1, :, :, 5] = True
    out = ours(q, k, v, mask)
    assert len(reads) == 2
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_plans_are_made_on_the_host_whatever_the_default_device():
    """With set_default_device("cuda") a plan's bounds were made there, and numpy could not read them."""
    q, k, v = heads("projection", 3, 2, 11)
    real = torch.arange(11) < torch.tensor([11, 3, 7])[:, None]
    masks = {name: m[:, None, None] for name, m in (("right", real), ("amid", real | (torch.arange(11) > 8)))}
    packed = torch.randn(11, 2, D)
    bounds, used = torch.tensor([0, 4, 11]), torch.tensor([2, 5])
    calls = [
        lambda: ours(q, k, v, lengths=[11, 3, 6]),
        lambda: ours(q, k, v, window=(2, 1)),
        *(lambda m=m: ours(q, k, v, m) for m in masks.values()),
        lambda: varlen_attn(packed, packed, packed, bounds.clone(), bounds.clone(), 7, 7, seqused_k=used.clone()),
    ]
    expected = [call() for call in calls]
    kept.plans._kept.clear()
    masks = {name: m.clone() for name, m in masks.items()}
    calls[2:4] = [lambda m=m: ours(q, k, v, m) for m in masks.values()]
    with torch.device("meta"):
        assert all(torch.equal(call(), wanted) for call, wanted in zip(calls, expected, strict=True))


def test_masks_of_like_sizes_do_not_take_one_anothers_plans():
    """B = H = Lq = Lk, so that bounds per sample, per head and per query have equally many numbers, and often equal."""
    n = 4
    q, k, v = heads("projection", n, n, n)
    place = torch.arange(n)
    rows = torch.cartesian_prod(*[torch.arange(n + 1)] * 2)  # first and end of a stretch
    rising = [torch.ones(n, n).tril(d).bool() for d in range(-2, 3)] + [torch.eye(n).bool()]
    kinds = []
    for lengths in (place + 1, torch.tensor([4, 1, 2, 2]), torch.tensor([0, 4, 4, 1])):
        real = place < lengths[:, None]
        for one in (real, real.flip(-1), ~real):
            kinds += [one[:, None, None], one[None, None, :1], one[:, None, :, None], one[None, :, None]]
            kinds += [one[:, None, None] & one[:, None, :, None]]
            kinds += [one[:, None, None] & m for m in rising]
    kinds += [(place >= lo) & (place < hi) for lo, hi in rows] + rising
    kinds = [m.expand(m.shape if m.ndim == 4 else (1, 1, n, n)).clone() for m in kinds]
    expected = [dense(q, k, v, m.expand(n, n, n, n))[0] for m in kinds]
    torch.manual_seed(0)
    for order in (range(len(kinds)), reversed(range(len(kinds))), *(torch.randperm(len(kinds)) for _ in range(3))):
        for i in order:
            for options in ({"attn_mask": kinds[i].clone()}, {"attn_mask": kinds[i]}):
                torch.testing.assert_close(ours(q, k, v, **options), expected[i], rtol=1e-5, atol=1e-5)


def test_lengths_and_places_of_like_sizes_do_not_take_one_anothers_plans():
    n = 3
    q, k, v = heads("projection", n, H, n)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    every = [torch.tensor(t) for t in itertools.product(range(n + 1), repeat=n)]
    generator = torch.Generator().manual_seed(0)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    for _ in range(400):
        lengths, keys, causal = pick([None, *every]), pick([None, *every]), pick([False, True])
        left, right = pick([-1, 0, 1]), pick([-1, 0, 1])
        align = pick(["top_left", "bottom_right"])
        own = torch.full((n,), n) if lengths is None else lengths
        ends = own if keys is None else keys
        places = i + (ends - own)[:, None, None] if align == "bottom_right" else i.expand(n, n, 1)
        seen = (j < ends[:, None, None]) & (i < own[:, None, None])
        seen &= (places - j <= left) | (left < 0)
        seen &= (j - places <= right) | (right < 0)
        seen = seen & (j <= places) if causal else seen
        options = {"lengths": pick([lengths, None if lengths is None else lengths.tolist()]), "key_lengths": keys}
        out = ours(q, k, v, **options, is_causal=causal, window=(left, right), align=align)
        torch.testing.assert_close(out, dense(q, k, v, seen[:, None])[0], rtol=1e-5, atol=1e-5)


def test_capture_and_compiled_regions_on_a_gpu_refuse_by_name(monkeypatch):
    """Without one: what is asked before anything is read."""
    for asked in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, asked, lambda: True)
    shape, gpu = plans.Shape(B, H, H, L, L), torch.device("cuda")
    for lengths, mask, reason in (
        (None, KEYS.clone(), "attn_mask cannot be read"),
        ([1, 2, 3], None, "lengths on the"),
    ):
        refused = plans.plan(plans.Seen(False, (-1, -1), False, lengths, None, mask), shape, gpu)
        assert refused.reason.startswith(reason)
    q = torch.empty(B, H, L, D, device="meta")
    assert torch_sdpa._refused(q, q, KEYS, 0.0, None, True, None).startswith("attn_mask cannot be read inside")
    assert torch_sdpa._refused(q, q, None, 0.0, None, True, None) is None


def test_a_graph_that_is_captured_plans_lengths_on_a_device_itself(monkeypatch):
    """Its replays meet other lengths in the same tensor.  With tensors that happen to be on the CPU."""
    shape, cpu = plans.Shape(2, H, H, 9, 9), torch.device("cpu")
    lengths = torch.tensor([3, 9])

    def plan(key_lengths=lengths, shape=shape):
        seen = plans.Seen(False, (-1, -1), False, lengths, key_lengths, None)
        return plans._device_plan(seen, lengths, key_lengths, shape, cpu, False)

    before = plan()
    assert plan() is before
    monkeypatch.setattr(kept, "captures", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    monkeypatch.setattr(PackedLayout, "to", None)  # nor does it copy from the host
    captured = plan()
    assert captured is not before
    assert plan() is not captured
    assert plan(shape=shape._replace(keys=12)).k_layout.total_tokens == 24
    assert plan((3, 9)).reason.startswith("lengths on the host cannot go to the device")
    monkeypatch.undo()
    assert plan() is before


def test_kept_plans_do_not_keep_masks_alive_nor_grow():
    q, k, v = heads("projection")
    before = len(kept._by_tensor)
    for n in range(3 * kept.MAX_PLANS):
        ours(q, k, v, lengths=[L, n % L, (7 * n) % L])
        ours(q, k, v, torch.arange(L).expand(L, L) < 1 + n % 30)
    assert len(kept.plans._kept) <= kept.MAX_PLANS
    assert len(kept._by_tensor) <= before + 1


def test_threads_may_share_a_mask_of_which_each_call_takes_another_part():
    rows, failed, interval = torch.ones(400, 4, dtype=torch.bool), [], sys.getswitchinterval()

    def take():
        try:
            for i in torch.randint(400, (4000,)).tolist():
                assert kept.once(rows[i], "row", lambda i=i: i + 1) == i + 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert len(kept._by_tensor[id(rows)][2]) == kept.MAX_RESULTS


def test_plans_of_lengths_on_a_device_do_not_keep_them_alive():
    """As on a GPU, with tensors that happen to be on the CPU: the same tensors are planned once, changed ones anew."""
    before, shape, cpu = len(kept._by_tensor), plans.Shape(2, H, H, 9, 9), torch.device("cpu")

    def bounds(lengths, key_lengths):
        seen = plans.Seen(False, (-1, -1), False, lengths, key_lengths, None)
        return plans._device_plan(seen, lengths, key_lengths, shape, cpu, False).mask.intervals.hi.tolist()

    for n in range(1, 5):
        lengths, keys = torch.tensor([n, 9]), torch.tensor([9, n])
        for given in ((lengths, keys), (lengths, lengths), (None, keys), ((n, 9), keys), (lengths, (9, n))):
            first = bounds(*given)
            assert bounds(*given) == first
            assert first[0] == int(given[1][0])
        keys[0] = 8
        assert bounds(lengths, keys)[0] == 8
    del lengths, keys, given
    assert len(kept._by_tensor) == before
    one = torch.tensor([9])  # of one sample, whose bounds are its own length
    plans._device_plan(
        plans.Seen(False, (-1, -1), False, None, one, None), None, one, shape._replace(batch=1), cpu, False
    )
    assert len(kept._by_tensor) == before + 1
    del one
    assert len(kept._by_tensor) == before
