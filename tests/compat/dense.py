"""What a drop-in must equal: dense attention in float64, and the same-dtype dense computation it is measured by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.testing import assert_error_rule


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [B, H, Lq, D], k and v [B, G, Lk, D] and bool seen [B or 1, H or 1, Lq, Lk]; blind: 0, -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = (q @ k.mT) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    blind = ~seen.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~seen & ~blind, -torch.inf), -1).masked_fill(~seen, 0)
    return weights @ v, lse


def results(function, inputs, grad_output) -> list[Tensor]:
    """Output and gradients of function(*inputs) for fresh leaves."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_output.to(out.dtype))]


def check(ours, torch_same, exact, inputs, name: str = "") -> None:
    """ours, torch_same in the inputs' dtype and exact in float64, forward and backward, under the error rule.

    inputs  leaves in the memory layout under test
    """
    grad_output = torch.randn(torch_same(*inputs).shape)
    found, peer = (results(f, inputs, grad_output) for f in (ours, torch_same))
    expected = results(exact, [t.double() for t in inputs], grad_output)
    for what, o, e, p in zip(("out", "dq", "dk", "dv"), found, expected, peer, strict=False):
        assert_error_rule(f"{name} {what}", o, e, p)
