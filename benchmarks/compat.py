"""The SDPA face on padded batches against torch's own call with the same mask.   B samples, L longest, H heads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention
from benchmarks.attention_cases import Case
from benchmarks.harness import PREFIX, Implementation, Missing
from benchmarks.limits import DTYPES
from benchmarks.peers import dense_masks, packed
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention
from mmkernels.layout import PackedLayout

DTYPES_USED = {"cpu": ["fp32"], "cuda": ["bf16"]}
SECONDS = {"quick": 60, "full": 120}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)  # of a batch that is padding
# The batches of `benchmarks attention` that padded SDPA can do with no more than a padding mask or is_causal.
CASES = (Case("stamps", 32), Case("repeats", 32), Case("longtail", 4, "causal"), Case("uniform", 4, length=512))


@dataclass
class CompatProblem(attention.AttentionProblem):
    """An attention problem on padded [B, H, L, D] tensors in the memory of projections, [B, L, H, D].

    Rows: sdpa, torch's call with a boolean padding mask, or is_causal; mm.sdpa, the same call of the face (where
    is_causal is all there is, with lengths too); mm.sdpa_lengths, the face with lengths in place of the mask.
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


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[CompatProblem]:
    for case in CASES:
        yield _compat(attention.from_case(replace(case, dtype=_dtype(device)), device, seed))
    for share in SHARES:
        yield padded(share, 16, 256, 4, 64, device, seed)
    if shapes == "full":
        for share in SHARES:
            yield padded(share, 8, 512, 12, 64, device, seed)


def padded(share: float, samples: int, longest: int, heads: int, width: int, device: torch.device, seed: int):
    """A batch of which `share` is padding, lengths spread evenly about their mean, the longest whole."""
    mean = longest * (1 - share)
    spread = min(longest - mean, mean - 1)
    lengths = np.linspace(mean + spread, mean - spread, samples).round().astype(int)
    lengths[0] = longest
    layout = PackedLayout.from_counts(lengths[:, None]).to(device)
    generator = torch.Generator().manual_seed(seed)
    dtype = _dtype(device)
    tensors = [
        torch.randn(layout.total_tokens, heads, width, generator=generator).to(device, DTYPES[dtype]) for _ in range(4)
    ]
    for leaf in tensors[:3]:
        leaf.requires_grad_()
    name = f"{samples}x{longest} full T{layout.total_tokens} H{heads} D{width}"
    return _compat(attention.AttentionProblem(name, dtype, layout, None, *tensors))


def _compat(problem: attention.AttentionProblem) -> CompatProblem:
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    empty = problem.layout.host.cu_seqlens.diff()
    share = 1 - problem.layout.total_tokens / (int((empty > 0).sum()) * problem.layout.max_seqlen)
    return CompatProblem(**(values | {"op": "compat", "case": f"{problem.case}, {share:.0%} padding"}))


def _dtype(device: torch.device) -> str:
    return DTYPES_USED[device.type][0]
