"""torch SDPA by one backend at a time (flash, cuDNN, efficient), where a batch needs neither padding nor a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks, packed


@dataclass(frozen=True)
class Backend:
    NAME: str
    backend: SDPBackend

    def missing(self, problem) -> str | None:
        if problem.q.device.type != "cuda":
            return "runs on CUDA devices only"
        if self.backend != SDPBackend.EFFICIENT_ATTENTION and problem.q.dtype not in packed.HALF:
            return "takes bfloat16, float16"
        if packed.plain_mask(problem) is None:
            return "knows no such mask"
        lengths = {stop - start for start, stop in dense_masks.bounds(problem.plan)}
        if len(lengths) != 1:
            return "samples of different lengths would need padding: sdpa_padded"
        if self.backend == SDPBackend.EFFICIENT_ATTENTION and problem.q.shape[1] != problem.k.shape[1]:
            return "knows no grouped heads"
        return None

    def build(self, problem) -> Implementation:
        pad, unpad, _ = dense_masks.padding(problem.plan)
        q, k, v = (pad(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
        causal, grouped = packed.plain_mask(problem) == "causal", q.shape[1] != k.shape[1]

        def forward():
            with sdpa_kernel(self.backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return Implementation(self.NAME, forward, (q, k, v), pad(problem.grad_output), unpad)


FLASH = Backend("sdpa_flash", SDPBackend.FLASH_ATTENTION)
CUDNN = Backend("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)
EFFICIENT = Backend("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION)
