"""MultiheadAttention against nn.MultiheadAttention: every constructor and forward argument; and the swap in models."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from file_map import ROOT
from torch import nn

from mmkernels import dispatch
from mmkernels.modules import MultiheadAttention, replace_attention
from mmkernels.testing import assert_error_rule

B, L, S, E, H = 3, 10, 7, 32, 4
LENGTHS = torch.tensor([7, 3, 5])
CONSTRUCTORS = [
    dict(zip(("batch_first", "bias", "add_bias_kv", "add_zero_attn", "widths"), flags, strict=True))
    for flags in itertools.product((True, False), (True, False), (True, False), (True, False), ("same", "kv", "all"))
]


def pair(batch_first=True, bias=True, add_bias_kv=False, add_zero_attn=False, widths="same", **options):
    """The original and ours, with equal parameters."""
    sizes = {"same": {}, "kv": {"kdim": 24, "vdim": 24}, "all": {"kdim": 24, "vdim": 20}}[widths]
    flags = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "batch_first": batch_first}
    theirs, ours = (cls(E, H, **flags, **sizes, **options) for cls in (nn.MultiheadAttention, MultiheadAttention))
    for parameter in theirs.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequences(module, self_attention, batched=True):
    lengths = (L, L, L) if self_attention else (L, S, S)
    widths = (E, module.kdim, module.vdim)
    shapes = [(n, B, w) if batched else (n, w) for n, w in zip(lengths, widths, strict=True)]
    q, k, v = (torch.randn(s) for s in shapes)
    if batched and module.batch_first:
        q, k, v = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    if widths[1] == widths[2]:
        v = k
    return (q, q, q) if self_attention and widths == (E, E, E) else (q, k, v)


def masks(keys, batched=True):
    """key_padding_mask, attn_mask, is_causal of every kind."""
    padding = torch.arange(keys) >= LENGTHS[:, None]
    padding = padding if batched else padding[1]
    causal = torch.ones(L, keys, dtype=torch.bool).triu(1)
    as_float = torch.zeros(L, keys).masked_fill(causal, -torch.inf)
    yield from [(None, None, False), (padding, None, False), (None, causal, False), (padding, causal, False)]
    yield torch.zeros(padding.shape).masked_fill(padding, -torch.inf), as_float, False
    yield padding, as_float, False
    yield None, causal.expand(B * H if batched else H, L, keys), False
    yield from [(None, causal, True), (padding, causal, True)]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_forward_and_backward_equal_the_original(options):
    theirs, ours = pair(**options)
    pool = [], [], []  # of ours, in float64, of the original
    for self_attention in (True, False) if options["widths"] == "same" else (False,):
        q, k, v = sequences(ours, self_attention)
        for padding, attn, causal in masks(k.shape[1] if ours.batch_first else k.shape[0]):
            if causal and (ours.bias_k is not None or ours.add_zero_attn):
                continue  # the original then drops the extra keys, which attn_mask lets everybody see
            arguments = {"key_padding_mask": padding, "attn_mask": attn, "is_causal": causal, "need_weights": False}
            results = []
            for module, dtype in (
                (ours, torch.float32),
                (copy.deepcopy(theirs).double(), torch.float64),
                (theirs, torch.float32),
            ):
                leaves = {id(t): t.to(dtype).detach().requires_grad_() for t in (q, k, v)}
                given = dict(arguments)
                for name in ("key_padding_mask", "attn_mask"):
                    if given[name] is not None and given[name].is_floating_point():
                        given[name] = given[name].to(dtype)
                out, weights = module(*(leaves[id(t)] for t in (q, k, v)), **given)
                assert weights is None
                wanted = [*leaves.values(), *module.parameters()]
                torch.manual_seed(0)
                gradients = torch.autograd.grad(out, wanted, torch.randn(out.shape).to(dtype))
                results.append([out, *gradients])
            for found, ref, peer in zip(*results, strict=True):
                size = ref.abs().max()
                if size > 1e-12:  # not 0 by mathematics, as the gradient of the keys' bias is
                    torch.testing.assert_close(found / size, (ref / size).float(), rtol=0, atol=1e-5)
                    for kept, part in zip(pool, (found, ref, peer), strict=True):
                        kept.append((part.detach() / size.to(part.dtype)).flatten())
    # All together: by itself each is small enough for chance to decide.
    assert_error_rule("all outputs and gradients", *(torch.cat(part) for part in pool))


def test_attn_mask_and_padding_of_like_sizes_do_not_take_one_anothers_plans():
    theirs, ours = pair()
    n = 6
    x = torch.randn(n, n, E)
    causal = torch.ones(n, n, dtype=torch.bool).triu(1)
    padding = torch.arange(n) > torch.arange(n)[:, None]
    calls = [{"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding}]
    for order in itertools.permutations(calls):
        for masks in order:
            given = {name: mask.clone() for name, mask in masks.items()}
            out = ours(x, x, x, need_weights=False, **given)[0]
            torch.testing.assert_close(out, theirs(x, x, x, need_weights=False, **given)[0], rtol=1e-4, atol=1e-5)


def test_an_inference_attn_mask_is_read_at_every_call():
    """It has no version, so a change in place would not be seen."""
    theirs, ours = pair()
    x, padding = torch.randn(B, L, E), torch.arange(L) >= torch.tensor([[10], [4], [7]])
    with torch.inference_mode():
        attn = torch.ones(L, L, dtype=torch.bool).triu(1)
    for _ in range(2):
        given = {"key_padding_mask": padding, "attn_mask": attn, "need_weights": False}
        torch.testing.assert_close(ours(x, x, x, **given)[0], theirs(x, x, x, **given)[0], rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            attn[:] = False


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_are_the_originals(batch_first, average):
    theirs, ours = pair(batch_first=batch_first)
    q, k, v = sequences(ours, False)
    padding = torch.arange(S) >= LENGTHS[:, None]
    for mode in (True, False):
        results = [
            m.train(mode)(q, k, v, key_padding_mask=padding, average_attn_weights=average) for m in (theirs, ours)
        ]
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input(batch_first):
    theirs, ours = pair(batch_first=batch_first)
    for self_attention in (True, False):
        q, k, v = sequences(ours, self_attention, batched=False)
        for padding, attn, causal in masks(len(k), batched=False):
            if padding is not None and attn is not None and padding.dtype != attn.dtype:
                continue
            arguments = {"key_padding_mask": padding, "attn_mask": attn, "is_causal": causal, "need_weights": False}
            expected, found = (m(q, k, v, **arguments)[0] for m in (theirs, ours))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_output_may_be_viewed_like_the_originals():
    theirs, ours = pair(batch_first=False)
    q, k, v = sequences(ours, False)
    assert ours(q, k, v, need_weights=False)[0].stride() == theirs(q, k, v, need_weights=False)[0].stride()


def test_dropout_is_for_training():
    _, ours = pair(dropout=0.5)
    q = torch.randn(B, L, E)
    padding = torch.arange(L) >= torch.tensor([10, 4, 8])[:, None]
    call = lambda: ours(q, q, q, key_padding_mask=padding, need_weights=False)[0]  # noqa: E731
    assert not torch.equal(call(), call())
    ours.eval()
    assert torch.equal(call(), call())


def test_what_masks_cannot_say_is_refused_or_handed_over():
    theirs, ours = pair()
    q = torch.randn(B, L, E)
    bias = torch.randn(L, L)
    with pytest.raises(NotImplementedError, match=r"^MultiheadAttention: attn_mask has values other than 0 and -inf"):
        ours(q, q, q, attn_mask=bias, need_weights=False)
    ours.fallback = "torch"
    expected = theirs(q, q, q, attn_mask=bias, need_weights=False)[0]
    torch.testing.assert_close(ours(q, q, q, attn_mask=bias, need_weights=False)[0], expected, rtol=1e-5, atol=1e-6)
    assert "MultiheadAttention -> torch: attn_mask has values" in dispatch.explain()
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        ours(q, q, q, is_causal=True, need_weights=False)
    for masks in ({"attn_mask": torch.ones(1, L, dtype=torch.bool)}, {"key_padding_mask": torch.ones(B, 1).bool()}):
        with pytest.raises(ValueError, match=next(iter(masks))):
            ours(q, q, q, need_weights=False, **masks)
    with pytest.raises(ValueError, match=r"query is .*30"):
        ours(q[..., :30], q, q, need_weights=False)


def test_weights_that_are_wanted_are_torchs_and_told():
    """need_weights is True where nothing is said: a model that calls so gains nothing, and its user should see why."""
    theirs, ours = pair()
    q = torch.randn(B, L, E)
    dispatch._NOTES.clear()
    for own, expected in zip(ours(q, q, q), theirs(q, q, q), strict=True):
        torch.testing.assert_close(own, expected)
    assert "MultiheadAttention -> torch: need_weights is True  (1 call)" in dispatch.explain()


@pytest.mark.parametrize("options", [{"fallback": "x"}, {"impl": "x"}])
def test_choices_that_there_are_not_are_refused_at_once(options):
    """Not only where a mask needs them; and the model stays as it was."""
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    with pytest.raises(ValueError, match=f"replace_attention: {next(iter(options))} is 'x', expected one of"):
        replace_attention(model, **options)
    assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=f"MultiheadAttention: {next(iter(options))} is 'x', expected one of"):
        MultiheadAttention(E, H, **options)


def test_self_attention_is_views_of_one_projection(monkeypatch):
    from mmkernels.compat import padded

    _, ours = pair()
    pointers = []
    real = padded.attention
    monkeypatch.setattr(padded, "attention", lambda *t, **o: pointers.extend(t) or real(*t, **o))
    x = torch.randn(B, L, E)
    ours(x, x, x, key_padding_mask=torch.arange(L) >= torch.tensor([10, 4, 8])[:, None], need_weights=False)
    q, k, v = pointers
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.stride() == (3 * E, E // H, 1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "functional_call", "autocast"])
def test_module_machinery(how):
    theirs, ours = pair(add_bias_kv=True)
    q, k, v = sequences(ours, False)
    padding = torch.arange(S) >= LENGTHS[:, None]
    ours.fallback = "torch"
    expected = ours(q, k, v, key_padding_mask=padding, need_weights=False)[0]
    arguments = {"key_padding_mask": padding, "need_weights": False}
    if how == "functional_call":
        fresh = MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)
        found = torch.func.functional_call(fresh, dict(ours.named_parameters()), (q, k, v), arguments)[0]
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (m(q, k, v, **arguments)[0] for m in (ours, theirs))
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        return
    else:
        if how == "deepcopy":
            other = copy.deepcopy(ours)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(ours))
        else:
            buffer = io.BytesIO()
            torch.save(ours, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        assert other.fallback == "torch"
        found = other(q, k, v, **arguments)[0]
    assert torch.equal(found, expected)


def test_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        theirs, ours = pair()
        q, k, v = sequences(ours, False)
        padding = torch.arange(S) >= LENGTHS[:, None]
        for module in (theirs, ours):
            wrapped = nn.parallel.DistributedDataParallel(module)
            wrapped(q, k, v, key_padding_mask=padding, need_weights=False)[0].square().sum().backward()
            wrapped.reducer = wrapped.logger = None  # as mmmodel/distributed.py says
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-3)
    finally:
        dist.destroy_process_group()


def encoder(norm_first=False, batch_first=True):
    layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, norm_first=norm_first, batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first, norm_first, fast_path):
    """Train and eval, with gradients and without: eval without them is the nested-tensor path where torch has it."""
    theirs = encoder(norm_first, batch_first)
    ours = copy.deepcopy(theirs)
    before = list(ours.state_dict())
    report = replace_attention(ours)
    assert report.swapped == ["layers.0.self_attn", "layers.1.self_attn"]
    assert list(report.notes) == ["layers.0", "layers.1"]
    assert list(ours.state_dict()) == before
    x = torch.randn(B, L, E) if batch_first else torch.randn(L, B, E)
    padding = torch.arange(L) >= torch.tensor([10, 4, 8])[:, None]
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        for training, grad, causal in itertools.product((True, False), (True, False), (True, False)):
            with torch.set_grad_enabled(grad):
                options = {"src_key_padding_mask": padding}
                if causal:
                    options["mask"] = nn.Transformer.generate_square_subsequent_mask(L)
                expected, found = (m.train(training)(x, **options) for m in (theirs, ours))
            real = ~padding if batch_first else ~padding.T
            torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
            if grad:
                for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
                    grads = [
                        torch.autograd.grad(o[real].square().sum(), p, retain_graph=True)[0]
                        for o, p in ((expected, a), (found, b))
                    ]
                    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_transformer_decoder_and_whole_transformer():
    theirs = nn.Transformer(E, H, 1, 1, 48, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    assert len(replace_attention(ours).swapped) == 3
    source, target = torch.randn(B, S, E), torch.randn(B, L, E)
    padding = torch.arange(S) >= LENGTHS[:, None]
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    expected, found = (m(source, target, **options) for m in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("add_bias_kv", [False, True])
def test_masks_are_not_kept_alive(add_bias_kv):
    """A fresh mask in every step must not pile up, whichever of the two it is and whatever its dtype."""
    from mmkernels.compat import kept

    module = MultiheadAttention(E, H, batch_first=True, add_bias_kv=add_bias_kv)
    x, before = torch.randn(B, L, E), len(kept._by_tensor)
    for n in range(3):
        causal, padding = torch.ones(L, L, dtype=torch.bool).triu(1 + n), torch.arange(L) >= LENGTHS[:, None] + n
        for attn, keys in itertools.product((None, causal, causal.expand(B * H, L, L).clone()), (None, padding)):
            for dtype in (torch.bool, torch.float32):
                masks = [
                    m if m is None or dtype == torch.bool else torch.zeros(m.shape).masked_fill(m, -torch.inf)
                    for m in (attn, keys)
                ]
                module(x, x, x, attn_mask=masks[0], key_padding_mask=masks[1], need_weights=False)
    del causal, padding, attn, keys, masks
    assert len(kept._by_tensor) == before


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("wrong", ["keys", "samples", "width"])
def test_key_and_value_that_do_not_fit_are_named(wrong, batch_first):
    """Fewer values than keys went to torch's kernel, which read past their end; one sample was for all."""
    ours = MultiheadAttention(E, H, batch_first=batch_first)
    q, k, v = torch.randn(B, L, E), torch.randn(B, S, E), torch.randn(B, S, E)
    name, k, v = {
        "keys": ("value", k, v[:, :2]),
        "samples": ("key", k[:1], v[:1]),
        "width": ("key", k[..., :8], v),
    }[wrong]
    given = (q, k, v) if batch_first else (t.transpose(0, 1) for t in (q, k, v))
    with pytest.raises(ValueError, match=rf"MultiheadAttention: {name} is \(.*\[batch, tokens, width\], expected"):
        ours(*given, need_weights=False)


def test_padding_of_a_batch_of_no_samples():
    x, padding = torch.randn(0, L, E), torch.zeros(0, L, dtype=torch.bool)
    out, _ = MultiheadAttention(E, H, batch_first=True)(x, x, x, key_padding_mask=padding, need_weights=False)
    assert out.shape == x.shape


def test_no_keys_but_the_learned_and_the_zero_one():
    theirs, ours = pair(add_bias_kv=True, add_zero_attn=True)
    q, k = torch.randn(B, L, E), torch.randn(B, 0, E)
    expected, found = (m(q, k, k, need_weights=False)[0] for m in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_said_when_the_interpreter_ends():
    """Masks that live longer than the modules of the package."""
    code = (
        "import torch; from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as f\n"
        "masks = [torch.arange(9).expand(9, 9) < n for n in range(1, 9)]; q = torch.randn(1, 1, 9, 8)\n"
        "for mask in masks: f(q, q, q, mask)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_swap_keeps_identity_parameters_and_hooks():
    model = nn.Sequential(encoder())
    attention, calls = model[0].layers[0].self_attn, []
    attention.register_forward_hook(lambda *_: calls.append(1))
    parameters = {n: p.data_ptr() for n, p in model.named_parameters()}
    replace_attention(model)
    assert model[0].layers[0].self_attn is attention
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == parameters
    model(torch.randn(B, L, E))
    assert calls == [1]


def test_swap_reports_what_it_leaves():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(E, H),
            "narrow": nn.MultiheadAttention(8, 4),
            "exact": nn.MultiheadAttention(E, H, dtype=torch.float64),
            "ours": MultiheadAttention(E, H),
            "wrapped": nn.MultiheadAttention(E, H),
            "plain": nn.MultiheadAttention(E, H),
        }
    )
    model["wrapped"].out_proj = nn.Sequential(model["wrapped"].out_proj)
    report = replace_attention(model, fallback="torch")
    assert report.swapped == ["plain"]
    assert model["plain"].fallback == "torch"
    assert list(report.left) == ["own", "narrow", "exact", "ours", "wrapped"]
    assert report.left["wrapped"] == "has an out_proj of its own, a Sequential"
    assert "heads of width 2" in report.left["narrow"]
    assert "left     own: is a Own" in str(report)
    assert str(replace_attention(nn.Linear(2, 2))) == "no torch.nn.MultiheadAttention found"
    bare = nn.MultiheadAttention(E, H)
    assert replace_attention(bare).swapped == ["(model)"]
    assert type(bare) is MultiheadAttention
