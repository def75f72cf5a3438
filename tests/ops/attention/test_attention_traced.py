"""attention under whoever records operators: torch.jit.trace, make_fx, fake tensors."""

import io

import pytest
import torch
from attention_oracle import CPU_IMPLS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mmkernels import AttentionMask, PackedLayout, attention, attention_qkvpacked

CAUSAL = AttentionMask(causal=True)


class _Block(torch.nn.Module):
    def __init__(self, layout, impl):
        super().__init__()
        self.project = torch.nn.Linear(8, 96)
        self.layout, self.impl = layout, impl

    def forward(self, x):
        qkv = self.project(x).unflatten(1, (3, 2, 16))
        return attention_qkvpacked(qkv, layout=self.layout, mask=CAUSAL, impl=self.impl).flatten(1)


@pytest.mark.filterwarnings("ignore")  # of TorchScript itself, and that sizes are constants of the trace
@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_jit_trace_of_a_module_that_learns(impl, met):
    """It knows no autograd.Function ("unordered_map::at"); the operator it does."""
    block, x = _Block(PackedLayout.from_counts([[5], [3]]), impl), torch.randn(8, 8)
    if met:
        block(x)
    traced = torch.jit.trace(block, (torch.randn(8, 8),), check_trace=False)
    kept = io.BytesIO()
    torch.jit.save(traced, kept)
    kept.seek(0)
    expected = block(x)
    wanted = torch.autograd.grad(expected.square().sum(), block.project.parameters())
    assert torch.equal(torch.jit.load(kept)(x), expected)
    found = torch.autograd.grad(traced(x).square().sum(), block.project.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(RuntimeError, match="q and k have"):
        traced(torch.randn(11, 8))


@pytest.mark.parametrize("rows", [3, 11])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_trace_refuses_tensors_of_other_sizes(impl, rows):
    """The layout is a constant of the trace: rows beyond it stayed as the memory was."""
    layout, q = PackedLayout.from_counts([[5], [3]]), torch.randn(8, 2, 16)
    program = make_fx(lambda q: attention(q, q, q, layout=layout, impl=impl))(q)
    assert torch.equal(program(q), attention(q, q, q, layout=layout, impl=impl))
    with pytest.raises(ValueError, match=rf"q and k have \({rows}, {rows}\) tokens, expected \(8, 8\)"):
        program(torch.randn(rows, 2, 16))


def test_fake_tensors_of_a_mode_without_real_ones_are_named():
    layout = PackedLayout.from_counts([[5], [3]])
    with FakeTensorMode():
        q = torch.randn(8, 2, 16)
        with pytest.raises(ValueError, match=r"q is a fake tensor .*allow_non_fake_inputs=True"):
            attention(q, q, q, layout=layout)
    real = torch.randn(8, 2, 16)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"attention: v is a fake tensor"):
        attention(real, real, mode.from_tensor(real), layout=layout)
