"""Drop-ins for SDPA and Hugging Face on padded batches, against the originals.   B samples, L longest, H heads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention
from benchmarks.attention_cases import Case
from benchmarks.compat_huggingface import LAYERS, BertProblem, HuggingFaceProblem
from benchmarks.harness import PREFIX, Implementation, Missing, Problem
from benchmarks.limits import DTYPES
from benchmarks.peers import dense_masks, packed
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask

DTYPES_USED = {"cpu": ["fp32"], "cuda": ["bf16"]}
SECONDS = {"quick": 90, "full": 240}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)  # of a batch that is padding
# The batches of `benchmarks attention` that padded SDPA can do with no more than a padding mask or is_causal.
CASES = (Case("stamps", 32), Case("repeats", 32), Case("longtail", 4, "causal"), Case("uniform", 4, length=512))


@dataclass
class CompatProblem(attention.AttentionProblem):
    """An attention problem on padded [B, H, L, D] tensors in the memory of projections, [B, L, H, D].

    Rows: sdpa, torch's call with a boolean padding mask, or is_causal; mm.sdpa, the same call of ours (where
    is_causal is all there is, with lengths too); mm.sdpa_lengths, ours with lengths in place of the mask.
    """

    op: str = "compat"

    def implementations(self) -> Iterator[Implementation | Missing]:
        pad, unpad, slots = dense_masks.padding(self.plan)
        samples = dense_masks.bounds(self.plan)
        lengths = [stop - start for start, stop in samples]

        def in_memory(x: Tensor) -> Tensor:
            return pad(x).transpose(1, 2).contiguous().transpose(1, 2)

        q, k, v = (in_memory(x).requires_grad_() for x in (self.q, self.k, self.v))
        if packed.plain_mask(self) == "causal":
            given = {"is_causal": True}
        else:
            given = {"attn_mask": dense_masks.key_padding(self.plan)}
        by_lengths = {"lengths": lengths, "is_causal": given.get("is_causal", False)}
        same = given if "attn_mask" in given else by_lengths
        extra = {"padding": 1 - sum(lengths) / slots}
        rows = (
            ("sdpa", F.scaled_dot_product_attention, given),
            (PREFIX + "sdpa", scaled_dot_product_attention, same),
            (PREFIX + "sdpa_lengths", scaled_dot_product_attention, by_lengths),
        )
        for name, function, options in rows:
            call = functools.partial(function, q, k, v, **options)
            yield Implementation(name, call, (q, k, v), in_memory(self.grad_output), unpad, extra)


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[Problem]:
    for case in CASES:
        problem = attention.from_case(replace(case, dtype=_dtype(device)), device, seed, kind=CompatProblem)
        yield replace(problem, case=f"{problem.case}, {_padding(problem.layout):.0%} padding")
    sizes = [(16, 256, 4, 64), *([(8, 512, 12, 64)] if shapes == "full" else [])]
    for size in sizes:
        for share in SHARES:
            yield padded(CompatProblem, "", share, None, *size, device, seed)
    for size in sizes:
        for share in SHARES:
            yield padded(HuggingFaceProblem, f"encoder x{LAYERS} ", share, None, *size, device, seed)
        for share in SHARES if shapes == "full" else (0.0, 0.3):
            causal = AttentionMask(causal=True)
            yield padded(HuggingFaceProblem, f"decoder x{LAYERS} ", share, causal, *size, device, seed)
    if device.type == "cpu":
        for share in SHARES if shapes == "full" else (0.0, 0.3):
            layout = ragged(share, 8, 128)
            yield BertProblem(f"BERT x{LAYERS} 8x128, {_padding(layout):.0%} padding", layout, seed)


def padded(kind: type, name: str, share: float, mask, samples: int, longest: int, heads: int, width: int, device, seed):
    """A problem of one kind on a batch of which `share` is padding."""
    layout = ragged(share, samples, longest).to(device)
    generator = torch.Generator().manual_seed(seed)
    shape = layout.total_tokens, heads, width
    dtype = _dtype(device)
    q, k, v, grad_output = (torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(4))
    seen = "causal" if mask else "full"
    name += f"{samples}x{longest} {seen} T{layout.total_tokens} H{heads} D{width}, {_padding(layout):.0%} padding"
    return kind(name, dtype, layout, mask, q, k, v, grad_output)


def ragged(share: float, samples: int, longest: int) -> PackedLayout:
    """Samples whose lengths spread evenly about their mean, the longest whole, so that `share` is padding."""
    mean = longest * (1 - share)
    spread = min(longest - mean, mean - 1)
    lengths = np.linspace(mean + spread, mean - spread, samples).round().astype(int)
    lengths[0] = longest
    return PackedLayout.from_counts(lengths[:, None])


def _padding(layout: PackedLayout) -> float:
    lengths = layout.host.cu_seqlens.diff()
    return 1 - layout.total_tokens / (int((lengths > 0).sum()) * layout.max_seqlen)


def _dtype(device: torch.device) -> str:
    return DTYPES_USED[device.type][0]
