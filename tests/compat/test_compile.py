"""The drop-ins under torch.compile(fullgraph=True): one graph for all lengths, masks read when the graph runs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmkernels import AttentionMask, PackedLayout, prepare_attention
from mmkernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as ours
from mmkernels.compat.torch_varlen import varlen_attn
from mmkernels.modules import MultiheadAttention

B, H, L, D = 3, 2, 12, 16


def same(function, *arguments):
    """Eager and compiled, forward and backward."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        out = run(*arguments)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def qkv():
    return torch.randn(B, L, 3, H, D, requires_grad=True)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_lengths_as_tensors_are_one_graph():
    def layer(x, lengths):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ours(q, k, v, lengths=lengths) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([12, 3, 7], [1, 2, 3], [12, 12, 12], [0, 5, 12]):
        x, n = qkv(), torch.tensor(lengths)
        for eager, found in zip(*(_with_gradient(f, x, n) for f in (layer, compiled)), strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_sizes_that_change_are_one_graph_too():
    def layer(x, lengths):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ours(q, k, v, lengths=lengths, is_causal=True)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, longest in ((4, 12), (6, 7), (5, 30)):  # not 3: it would be taken for the 3 of q, k, v
        x = torch.randn(batch, longest, 3, H, D, requires_grad=True)
        n = torch.randint(1, longest, (batch,))
        for eager, found in zip(*(_with_gradient(f, x, n) for f in (layer, compiled)), strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _with_gradient(function, x, *rest):
    out = function(x, *rest)
    return out, *torch.autograd.grad(out.square().sum(), [x])


@pytest.mark.parametrize("which", ["sdpa", "our sdpa", "flash_attn", "flash_attn_varlen"])
def test_two_checkpointed_blocks_are_one_graph(which):
    """A default that is a float is a symbol in the first block, of which the second knows nothing."""
    layout = PackedLayout.from_counts([[L]] * B)
    prepare_attention(layout, mask=AttentionMask(), dtype=torch.float32, head_dim=D)

    def block(x):
        q, k, v = x.unbind(2)
        if which == "flash_attn":
            out = flash_attn_func(q, k, v)
        elif which == "flash_attn_varlen":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            out = flash_attn_varlen_func(q, k, v, layout, layout, L, L).unflatten(0, (B, L))
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = ours(q, k, v, impl="torch" if which == "our sdpa" else "auto").transpose(1, 2)
        return out[:, :, None] + x

    def model(x):
        return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)

    x = qkv()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for eager, found in zip(*(_with_gradient(f, x) for f in (model, compiled)), strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)


def test_masks_on_the_cpu():
    def layer(x, mask):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ours(q, k, v, mask, scale=0.3)

    same(layer, qkv(), torch.ones(L, L, dtype=torch.bool).tril(2))


def test_what_is_left_to_torch_and_what_is_refused():
    def plain(x):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ours(q, k, v, is_causal=True)

    def handed_over(x, mask):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ours(q, k, v, mask, fallback="torch")

    same(plain, qkv())
    same(handed_over, qkv(), torch.randn(L, L))
    bad = torch.compile(
        lambda x, m: ours(*(t.transpose(1, 2) for t in x.unbind(2)), m), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(NotImplementedError, match="attn_mask has values other than 0"):
        bad(qkv(), torch.randn(L, L))
    module, x = MultiheadAttention(32, 2, batch_first=True), torch.randn(B, L, 32)
    layer = torch.compile(lambda m: module(x, x, x, attn_mask=m, need_weights=False)[0], backend="aot_eager")
    with pytest.raises(NotImplementedError, match=r"^MultiheadAttention: attn_mask has values other than 0"):
        layer(torch.randn(L, L))


def test_dropout_repeats_in_backward():
    def layer(x, n):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return ours(q, k, v, lengths=n, dropout_p=0.5)

    x, n = qkv(), torch.tensor([12, 3, 7])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        torch.manual_seed(5)
        out = run(x, n)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x])))
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)


def test_flash_attn():
    same(lambda x: flash_attn_func(*x.unbind(2), causal=True, window_size=(4, 0)), qkv())

    def packed(x, bounds):
        return flash_attn_varlen_func(*x.unbind(1), bounds, bounds, 6, 6)

    x, bounds = torch.randn(9, 3, H, D), torch.tensor([0, 3, 9], dtype=torch.int32)
    with pytest.raises(Exception, match=r"inside torch\.compile bounds cannot be planned"):
        torch.compile(packed, fullgraph=True, backend="aot_eager")(x, bounds)


@pytest.mark.parametrize("used", [False, True])
def test_bounds_break_the_graph_and_are_planned_outside(recwarn, used):
    """Without fullgraph.  Traced, the planning recompiled, and warned of functions that nobody had called."""

    def layer(x, bounds, seqused):
        q, k, v = (x * 2).unbind(1)
        return varlen_attn(q, k, v, bounds, bounds, 9, 9, window_size=(-1, 0), seqused_k=seqused) + 1

    compiled = torch.compile(layer, backend="aot_eager")
    for lengths in ([3, 4], [5], [1, 1, 6], [2, 2, 2, 9]):
        x, bounds = torch.randn(sum(lengths), 3, H, D), torch.tensor([0, *lengths]).cumsum(0).int()
        seqused = torch.tensor(lengths).int() if used else None
        torch.testing.assert_close(compiled(x, bounds, seqused), layer(x, bounds, seqused), rtol=1e-6, atol=1e-6)
    assert not [w for w in recwarn if "does not know how to trace" in str(w.message)]


@pytest.mark.parametrize("masks", ["padding", "causal", "both"])
def test_multihead_attention(masks):
    module = MultiheadAttention(32, 2, batch_first=True)
    padding = torch.arange(L) >= torch.tensor([12, 3, 7])[:, None] if masks != "causal" else None
    attn = torch.ones(L, L, dtype=torch.bool).triu(1) if masks != "padding" else None

    def layer(x, padding, attn):
        return module(x, x, x, key_padding_mask=padding, attn_mask=attn, need_weights=False)[0]

    same(layer, torch.randn(B, L, 32, requires_grad=True), padding, attn)


def test_opcheck():
    """The operator itself: schema, fakes, autograd, tracing."""
    q, k, v = (torch.randn(B * L, H, D, requires_grad=True) for _ in range(3))
    rest = (None, B, True, -1, -1, False, torch.tensor([12, 3, 7]), None, None, 0.25, 0.0, True, False, "auto", "f")
    torch.library.opcheck(torch.ops.mm.padded_attention_fwd, (q, k, v, *rest))
    meta = tuple(t.to("meta") for t in (q, k, v))
    assert torch.ops.mm.padded_attention_fwd(*meta, *rest)[0].shape == q.shape  # lengths may lie on the host
    with pytest.raises(ValueError, match="mm::padded_attention_fwd: lengths is on meta, q on cpu"):
        torch.ops.mm.padded_attention_fwd(q, k, v, *rest[:6], rest[6].to("meta"), *rest[7:])


@pytest.mark.extended  # compiles C++ for half a minute
def test_inductor_runs_it():
    def layer(x, n):
        q, k, v = (t.transpose(1, 2) for t in (x * 2).unbind(2))
        return F.gelu(ours(q, k, v, lengths=n))

    x, n = qkv().detach(), torch.tensor([12, 3, 7])
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x, n), layer(x, n), rtol=1e-4, atol=1e-4)
