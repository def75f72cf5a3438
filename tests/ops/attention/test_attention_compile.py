"""torch.compile(fullgraph=True, dynamic=True) on CPU: one function, twenty layouts, at most two graphs."""

import numpy as np
import pytest
import torch
from attention_oracle import CPU_IMPLS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmkernels import AttentionMask, PackedLayout, attention, attention_qkvpacked, pack, pad, prepare_attention, unpad

ISOLATED = AttentionMask.isolated(3)
CAUSAL = AttentionMask(causal=True)


def _layout(seed, num_modalities=3, num_samples=None):
    """1 to 8 samples with a modality missing in some batches, single samples and segments that nobody else has."""
    rng = np.random.default_rng(seed)
    num_samples = num_samples or int(rng.integers(1, 9))
    counts = rng.integers(0, 20, (num_samples, num_modalities))
    if seed % 2:
        counts[:, seed % num_modalities] = 0
    counts[0, (seed + 1) % num_modalities] += 2  # a batch of one token is another graph, as for any tensor of one row
    return PackedLayout.from_counts(counts)


def _plain(impl, seed):
    layout = _layout(seed)

    def block(qkv, layout):
        return attention(*qkv.unbind(1), layout=layout, mask=ISOLATED, impl=impl) * 2

    return block, (torch.randn(layout.total_tokens, 3, 2, 16, requires_grad=True), layout)


def _extras(impl, seed):
    layout = _layout(seed)

    def block(qkv, bias, layout):
        options = {"pair_bias": bias, "dropout_p": 0.1, "return_lse": True, "return_modality_mass": True}
        out, lse, mass = attention(*qkv.unbind(1), layout=layout, mask=CAUSAL, impl=impl, **options)
        return out * 2 + mass.sum() + lse.sum()

    qkv = torch.randn(layout.total_tokens, 3, 2, 16, requires_grad=True)
    return block, (qkv, torch.randn(2, 3, 3, requires_grad=True), layout)


def _cross(impl, seed):
    layout = _layout(seed)
    others = [_layout(seed + n, 2, layout.num_samples) for n in (100, 200)]

    def block(q, first, second, layout, first_layout, second_layout):  # text reads images, then audio
        for kv, k_layout in ((first, first_layout), (second, second_layout)):
            q = q + attention(q, *kv.unbind(1), layout=layout, k_layout=k_layout, mask=CAUSAL, impl=impl)
        return q

    q = torch.randn(layout.total_tokens, 2, 16, requires_grad=True)
    return block, (q, *(torch.randn(o.total_tokens, 2, 2, 16, requires_grad=True) for o in others), layout, *others)


@pytest.mark.parametrize("make", [_plain, _extras, _cross])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_twenty_layouts_are_at_most_two_graphs(impl, make):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(make(impl, 0)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in range(20):
        block, arguments = make(impl, seed)
        leaves = [a for a in arguments if isinstance(a, torch.Tensor)]
        results = []
        for function in (block, compiled):  # the first lowers the mask: a compiled region cannot
            torch.manual_seed(seed)
            out = function(*arguments)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_an_unprepared_layout_is_named_and_a_prepared_one_runs():
    layout = PackedLayout.from_counts([[6]])
    qkv = torch.randn(6, 3, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(*x.unbind(1), layout=layout), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call\s+mmkernels.prepare_attention"):
        compiled(qkv)
    prepare_attention(layout, dtype=torch.float32, head_dim=16, needs_backward=False)
    assert torch.equal(compiled(qkv), attention(*qkv.unbind(1), layout=layout))


class _OnOneLayout(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, qkv):
        return attention(*qkv.unbind(1), layout=self.layout, mask=CAUSAL)


def test_a_layout_that_is_new_to_torch_export_is_lowered_with_its_numbers(tmp_path):
    """What is kept on the layout is no stand-in of the tracer's: eager calls go on with it."""
    layout, qkv = _layout(3), torch.randn(_layout(3).total_tokens, 3, 2, 16)
    expected = attention(*qkv.unbind(1), layout=_layout(3), mask=CAUSAL)
    torch.export.save(torch.export.export(_OnOneLayout(layout), (qkv,)), tmp_path / "program.pt2")
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(qkv), expected)
    assert torch.equal(attention(*qkv.unbind(1), layout=layout, mask=CAUSAL), expected)


def test_a_layout_that_is_new_to_fake_tensors_is_lowered_with_its_numbers():
    layout, qkv = _layout(3), torch.randn(_layout(3).total_tokens, 3, 2, 16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        built = _layout(3)
        for each in (layout, built):
            fake = attention(*mode.from_tensor(qkv).unbind(1), layout=each, mask=CAUSAL)
            assert fake.shape == (layout.total_tokens, 2, 16)
    expected = attention(*qkv.unbind(1), layout=_layout(3), mask=CAUSAL)
    for each in (layout, built):
        assert torch.equal(attention(*qkv.unbind(1), layout=each, mask=CAUSAL), expected)


def test_a_call_of_another_kind_is_named_and_runs_once_prepared():
    """A pair bias is an extra: the error says which argument of prepare_attention it wants."""
    layout, bias = PackedLayout.from_counts([[6]]), torch.randn(2, 1, 1)
    qkv = torch.randn(6, 3, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: attention(*x.unbind(1), layout=layout, pair_bias=bias), backend="aot_eager", fullgraph=True
    )
    prepare_attention(layout, dtype=torch.float32, head_dim=16, needs_backward=False)
    with pytest.raises(Exception, match=r"extras: pair_bias, dropout or modality\s+mass"):
        compiled(qkv)
    prepare_attention(layout, dtype=torch.float32, head_dim=16, needs_backward=False, extras=True)
    assert torch.equal(compiled(qkv), attention(*qkv.unbind(1), layout=layout, pair_bias=bias))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_new_layout_breaks_the_graph_where_it_may_break():
    """torch.compile as most people call it: host code runs outside, and the results are those of eager calls.

    Without a warning of Dynamo's, which looks into what wraps that code.
    """
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, layout, mask: attention(*x.unbind(1), layout=layout, mask=mask) * 2, backend="aot_eager"
    )
    packing = torch.compile(lambda streams, layout: pack(streams, layout) + 1, backend="aot_eager")
    building = torch.compile(
        lambda x: attention(*x.unbind(1), layout=PackedLayout.from_counts([[4], [2]])), backend="aot_eager"
    )
    for counts in ([[5, 12], [3, 0]], [[1, 2]], [[0, 3], [4, 4], [1, 0]]):
        layout, fresh = PackedLayout.from_counts(counts), PackedLayout.from_counts(counts)
        qkv = torch.randn(layout.total_tokens, 3, 2, 16)
        for mask in (None, CAUSAL):
            assert torch.equal(compiled(qkv, fresh, mask), attention(*qkv.unbind(1), layout=layout, mask=mask) * 2)
        streams = [torch.randn(rows, 3) for rows in layout.stream_lengths]
        assert torch.equal(packing(streams, fresh), pack(streams, layout) + 1)
    qkv = torch.randn(6, 3, 2, 16)
    assert torch.equal(building(qkv), attention(*qkv.unbind(1), layout=PackedLayout.from_counts([[4], [2]])))


@pytest.mark.parametrize("how", ["an argument", "an attribute", "of the shape"])
def test_a_scale_may_be_a_symbol(how):
    class Block(torch.nn.Module):
        scale = 0.25

        def forward(self, qkv, layout, scale):
            scale = {"an argument": scale, "an attribute": self.scale, "of the shape": 1 / qkv.shape[-1] ** 0.5}[how]
            return attention(*qkv.unbind(1), layout=layout, scale=scale)

    torch._dynamo.reset()
    layout = PackedLayout.from_counts([[4], [2]])
    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True, dynamic=True)
    qkv = torch.randn(6, 3, 2, 16)
    for scale in (0.3, 0.4, 0.5):
        expected = Block()(qkv, layout, scale)
        assert torch.equal(compiled(qkv, layout, scale), expected)


def test_two_checkpointed_blocks_are_one_graph():
    """Dynamo makes a symbol of a default that is a float, and cannot hand it to the second block."""
    layout = _layout(3)
    prepare_attention(layout, mask=CAUSAL, dtype=torch.float32, head_dim=16)

    def block(x):
        return attention_qkvpacked(x, layout=layout, mask=CAUSAL)[:, None] + x

    def model(x):
        return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(layout.total_tokens, 3, 2, 16, requires_grad=True)
    for eager, ours in zip(*(torch.autograd.grad(f(x).square().sum(), [x]) for f in (model, compiled)), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_what_one_graph_cannot_hold_is_named():
    torch._dynamo.reset()
    streams = [torch.randn(2, 3)]
    compiled = torch.compile(lambda s, layout: pack(s, layout), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="in one graph the layout must have met one of them before"):
        compiled(streams, PackedLayout.from_counts([[2]]))
    reading = torch.compile(lambda s, layout: s[0] * layout.stream_lengths[0], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="stream_lengths: in one graph it must have been read before, outside"):
        reading(streams, PackedLayout.from_counts([[2]]))
    built = torch.compile(lambda s: pack(s, PackedLayout.from_counts([[2]])), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="a layout is built on the host, outside of a graph"):
        built(streams)


def test_an_error_of_a_dynamic_graph_keeps_its_text():
    """Dynamo puts no symbol into an f-string: it stopped there, and the message was lost."""
    layout = PackedLayout.from_counts([[4], [2]])
    whole = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)  # before, Dynamo leaves some as a template
    template = r"\{\}: (\{\}|packed|padded) has"
    for name, call in {
        "attention: q has": lambda q, layout: attention(q, q, q, layout=layout),
        "pad: packed has": lambda q, layout: pad(q[:, 0], layout),
        "unpad: padded has": lambda q, layout: unpad(q[None, :, 0], layout),
    }.items():
        torch._dynamo.reset()
        told = name if whole else f"({name}|{template})"
        with pytest.raises(Exception, match=f"raised exception ValueError.*{told}"):
            torch.compile(call, fullgraph=True, dynamic=True, backend="eager")(torch.randn(5, 2, 16), layout)


def test_another_k_layout_is_not_taken_for_the_prepared_one():
    layout, prepared, other = (PackedLayout.from_counts([[n], [n]]) for n in (4, 3, 3))
    q, kv = torch.randn(8, 2, 16), torch.randn(6, 2, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, kv, keys: attention(q, *kv.unbind(1), layout=layout, k_layout=keys),
        backend="aot_eager",
        fullgraph=True,
    )
    prepare_attention(layout, k_layout=prepared, dtype=torch.float32, head_dim=16, needs_backward=False)
    compiled(q, kv, prepared)
    with pytest.raises(Exception, match=r"call\s+mmkernels.prepare_attention"):
        compiled(q, kv, other)
