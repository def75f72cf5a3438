"""Where a call's time goes: names are told apart by what they are for, and shares are of the whole."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.gpu import profile


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attention_bwd_dkdv_kernel", "attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(Flash_fwd_params)", "attention"),
        ("modality_embed_bwd_rows_kernel", "modality_embed"),
        ("void mm::cuda::(anonymous namespace)::move_streams<16, true>(StreamMove, Lanes)", "packing"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>()", "optimizer"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),  # a product too: the first kind counts
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix product"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>()", "other"),
    ],
)
def test_kinds(name, kind):
    assert profile.kind_of(name) == kind


def test_a_call_on_the_cpu():
    x = torch.randn(64, 64)
    found = profile.of(lambda: (x @ x).sum(), torch.device("cpu"))
    assert found["wall_ms"] > 0
    assert found["busy_ms"] > 0
    assert found["launches"] >= len(found["top"])
    assert sum(found["kinds"].values()) == pytest.approx(100, abs=1)
    assert {"aten::mm", "aten::sum"} <= {row["name"] for row in found["top"]}


def test_the_host_of_a_call():
    """Operators of every thread, and Python functions by the time with those that they call."""
    x = torch.randn(64, 64, requires_grad=True)

    def call():
        (x @ x).sum().backward()

    found = profile.host(call, torch.device("cpu"))
    assert {"aten::mm", "aten::expand"} <= {row["name"] for row in found["operators"]}
    assert found["own_ms"] >= sum(row["ms"] for row in found["operators"]) - 0.01  # as both are rounded
    assert found["waits"] == {"calls": 0, "ms": 0}  # there is no GPU to wait for
    functions = {row["name"].split(" ", 1)[-1]: row for row in found["python"]}
    assert functions["call"]["ms"] >= functions["backward"]["ms"] >= functions["backward"]["own_ms"]
    assert not any(row["name"].startswith("/") for row in found["python"])
    assert found["python"][0]["name"].endswith(" _timed")


@pytest.mark.parametrize(
    ("name", "waits"),
    [("cudaStreamSynchronize", True), ("cudaEventSynchronize", True), ("cudaDeviceSynchronize", False)],
)
def test_waits_are_told_from_the_end_of_the_call(name, waits):
    """The last is what the profile itself asks for when the call is over."""
    assert bool(re.search(profile.WAITS, name)) == waits
