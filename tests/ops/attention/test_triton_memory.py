"""Nothing of size T x T or L x L is allocated on the GPU path: all that the launchers make is linear in tokens.

The kernels are left out, so that 64k tokens take no time; what they are handed is allocated as on a GPU.  Nor are they
handed what their offsets, int32 within a tile, do not reach.
"""

from types import SimpleNamespace

import pytest
import torch
from largest_tensor import LargestTensor

from mmkernels import AttentionMask, PackedLayout, attention

pytestmark = pytest.mark.interpreter

HEADS, WIDTH = 2, 16


class _NoKernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def _no_kernels(monkeypatch):
    from mmkernels.ops.attention import triton_kernels, triton_launch_backward

    left_out = 0
    for module in (triton_kernels, triton_launch_backward):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _NoKernel())
                left_out += 1
    assert left_out >= 4  # forward, dQ, dK/dV, fused ...


def _largest(length, samples, mask, deterministic, cross):
    layout = PackedLayout.from_segments([[(0, length // 4), (1, length - length // 4)]] * samples, num_modalities=2)
    k_layout = PackedLayout.from_counts([[length, 0]] * samples) if cross else None
    T = layout.total_tokens
    q, k, v = (torch.randn(T, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    bias = torch.randn(HEADS, 2, 2, requires_grad=True)
    with LargestTensor() as seen:
        out, lse, _ = attention(
            q, k, v, layout=layout, k_layout=k_layout, mask=mask, pair_bias=bias, dropout_p=0.1, return_lse=True,
            return_modality_mass=True, deterministic=deterministic, impl="triton",
        )  # fmt: skip
        torch.autograd.grad((out, lse), (q, k, v, bias), (torch.ones_like(out), torch.ones_like(lse)))
    return seen.elements, T


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["document", "causal", "window", "visible"])
@pytest.mark.usefixtures("_no_kernels")
def test_nothing_grows_with_the_square_of_tokens(kind, deterministic, cross):
    mask = {
        "document": None,
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=(5, 0)),
        "visible": AttentionMask(causal=True, visible=[[True, False], [True, True]]),
    }[kind]
    # One long sample, and many short ones.
    for length, samples in ((65_536, 1), (64, 1024)):
        elements, T = _largest(length, samples, mask, deterministic, cross)
        assert elements <= T * HEADS * WIDTH, (length, elements / T)


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_far_apart_are_brought_together(monkeypatch, fused):
    """As x[:, 0] of activations [B, L, E]: of 128 tokens L E apart the last is 2**31 elements away, where L E is 2**24.

    The interpreter ends with a segmentation fault there.  On "meta" nothing is allocated.
    """
    from mmkernels.ops.attention import triton_kernels, triton_launch_backward
    from mmkernels.ops.attention.configs import Config, Configs

    tokens, far, handed = 130, 2**24 + 16, {}
    store = torch.empty(tokens * far, dtype=torch.float16, device="meta")
    apart = store.as_strided((tokens, HEADS, WIDTH), (far, WIDTH, 1))
    near = torch.empty(tokens, HEADS, WIDTH, dtype=torch.float16, device="meta")
    lse = torch.empty(HEADS, tokens, device="meta")
    tile = Config(128, 64, 4, 2)
    lowered = SimpleNamespace(config=Configs(tile, tile, tile, fused).flat(), scale=1.0)
    for module in (triton_kernels, triton_launch_backward):
        monkeypatch.setattr(module, "launch", lambda name, own, make, kept: handed.update({name: own}))
    triton_kernels.attention_fwd(apart, apart, near, None, None, near, lse, None, lowered)
    triton_kernels.attention_bwd(
        apart, None, apart, apart, apart, None, None, near, lse, near, near, near, None, lowered
    )
    assert set(handed) == ({"fwd", "delta", "fused"} if fused else {"fwd", "dq", "dkdv"})
    for own in handed.values():
        for name, t in own.items():
            assert 255 * t.stride(0) < 2**31, name
    assert handed["fwd"]["v_ptr"] is near


def test_the_check_sees_a_square():
    with LargestTensor() as seen:
        q = torch.randn(1000, 16)
        q @ q.T
    assert seen.elements == 1000**2
