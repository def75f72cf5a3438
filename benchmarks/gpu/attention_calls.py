"""Calls of attention to check, and what they give: by ours, by the float64 reference and by torch.

On a CPU, `auto` stands in for Triton.   T tokens, H heads, G key/value heads, D head width, M modalities.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.limits import DTYPES
from mmkernels import testing
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.ops.attention import configs
from mmkernels.ops.attention.api import attention
from mmkernels.ops.attention.reference import dropout_keep, seen_pairs

M = 3


@dataclass(frozen=True)
class Feature:
    """What a call asks for, beside dtype and width."""

    mask: str = "full"
    heads: int = 4
    kv_heads: int = 4
    cross: bool = False
    pair_bias: bool = False
    dropout_p: float = 0.0
    mass: bool = False
    lse_gradient: bool = False
    strided: bool = False  # q, k and v as views of one projection


MASKS: dict[str, Callable[[PackedLayout], AttentionMask | None]] = {
    "full": lambda layout: None,
    "causal": lambda layout: AttentionMask(causal=True),
    "window": lambda layout: AttentionMask(causal=True, window=(37, -1)),
    "scope": lambda layout: AttentionMask(causal=True, bidirectional=(0, 2), window=(6, -1), window_scope="causal"),
    "prefix": lambda layout: AttentionMask(causal=True, prefix=(5,) * layout.num_samples),
    "bidirectional": lambda layout: AttentionMask(causal=True, bidirectional=(1,), visible=_one_way()),
    "isolated": lambda layout: AttentionMask.isolated(M),
    "blind": lambda layout: AttentionMask(visible=((False,) * M, (True, True, False), (True, True, True))),
    "top_left": lambda layout: AttentionMask(causal=True, align="top_left"),
}
EVERYTHING = Feature("bidirectional", 4, 2, pair_bias=True, dropout_p=0.2, mass=True, lse_gradient=True, strided=True)
FEATURES: dict[str, Feature] = {
    **{mask: Feature(mask) for mask in MASKS if mask != "top_left"},
    "grouped": Feature("causal", 4, 1),
    "strided": Feature("bidirectional", strided=True),
    "cross": Feature("causal", 4, 2, cross=True),
    "cross top_left": Feature("top_left", cross=True),
    "pair bias": Feature("bidirectional", pair_bias=True),
    "dropout": Feature("causal", dropout_p=0.3),
    "mass": Feature("isolated", mass=True),
    "lse gradient": Feature("blind", lse_gradient=True),
    "everything": EVERYTHING,
    "everything cross": replace(EVERYTHING, mask="blind", cross=True, strided=False),
}


@dataclass(frozen=True)
class Mode:
    """One way through the kernels: what configs.override takes, and whether gradients must repeat."""

    name: str
    deterministic: bool
    schedule: str | None = None
    kernels: tuple[tuple[str, configs.Config], ...] = ()

    @property
    def fused(self) -> bool:
        return any(kernel == "fused" for kernel, _ in self.kernels)

    def enter(self):
        if self.schedule is None and not self.kernels:
            return contextlib.nullcontext()
        return configs.override(schedule=self.schedule, **dict(self.kernels))


def modes(device: torch.device, dtype: str, width: int, impl: str) -> list[Mode]:
    """Both schedules, both backward passes, both ways to sum dQ, and the other way to load whole blocks."""
    if impl != "triton":
        return [Mode("deterministic", True), Mode("fast", False)]
    from mmkernels.ops.attention import triton_kernels

    arch = triton_kernels._arch(device)  # on a CPU the interpreter's, which has no TMA
    found = configs.select(arch, dtype, width)
    fused = replace((found.fused or found.dkdv)[0], late=False)
    ways = [
        Mode("sample tiles", True, "sample"),
        Mode("token tiles", True, "token"),
        Mode("fused, atomic dQ", False, "sample", (("fused", replace(fused, tma=False)),)),
        Mode("fused, token tiles", False, "token", (("fused", replace(fused, tma=False)),)),
    ]
    if int(arch.removeprefix("sm_")) >= 90:
        other, pair = replace(found.fwd[0], tma=not found.fwd[0].tma), {"dq": found.dq[0], "dkdv": found.dkdv[0]}
        ways += [
            Mode("fused, TMA dQ", False, "sample", (("fused", replace(fused, tma=True)),)),
            Mode("forward by " + ("descriptors" if other.tma else "pointers"), True, "sample", (("fwd", other),)),
            Mode("backward by descriptors", True, "sample", tuple((k, replace(c, tma=True)) for k, c in pair.items())),
        ]
    return ways


@dataclass
class Call:
    """One call of attention.  leaves: q, k, v and perhaps the pair bias, each in memory of its own or of one tensor."""

    feature: Feature
    layout: PackedLayout
    k_layout: PackedLayout | None
    leaves: list[Tensor]
    do: Tensor
    dlse: Tensor
    seed: int

    @property
    def mask(self) -> AttentionMask | None:
        return MASKS[self.feature.mask](self.layout)

    def inputs(self, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        f, bias = self.feature, None
        if f.pair_bias:
            *leaves, bias = leaves
        if f.strided:
            q, k, v = leaves[0].split((f.heads, f.kv_heads, f.kv_heads), 1)
        else:
            q, k, v = leaves
        return q, k, v, bias


def make(device: torch.device, dtype: str, width: int, feature: Feature, seed: int, longest: int) -> Call:
    """Ragged and interleaved, with empty and one-token samples."""
    layout = testing.random_layout(seed, num_samples=6, max_length=longest)
    keys = testing.random_layout(seed + 100, num_samples=6, max_length=longest) if feature.cross else None
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

    f, T, Tk = feature, layout.total_tokens, (keys or layout).total_tokens
    shapes = [(T, f.heads, width), (Tk, f.kv_heads, width), (Tk, f.kv_heads, width)]
    if f.strided:
        shapes = [(T, f.heads + 2 * f.kv_heads, width)]
    leaves = [draw(*shape) for shape in shapes]
    if f.pair_bias:
        leaves.append(draw(f.heads, M, M).float())
    do, dlse = draw(T, f.heads, width), draw(f.heads, T).float()
    return Call(f, layout.to(device), None if keys is None else keys.to(device), leaves, do, dlse, seed)


def solve(call: Call, leaves: list[Tensor], mode: Mode | None, impl: str) -> dict[str, Tensor]:
    """Every output and gradient, by name.  mode None: as it comes, for the reference."""
    f = call.feature
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    q, k, v, bias = call.inputs(leaves)
    torch.manual_seed(call.seed)  # of the dropout mask
    with contextlib.nullcontext() if mode is None else mode.enter():
        out, lse, *mass = attention(
            q, k, v, layout=fresh(call.layout), k_layout=fresh(call.k_layout), mask=call.mask, pair_bias=bias,
            dropout_p=f.dropout_p, deterministic=mode is None or mode.deterministic, return_lse=True,
            return_modality_mass=f.mass, impl=impl,
        )  # fmt: skip
        outputs, gradients = [out], [call.do.to(out.dtype)]
        if f.lse_gradient:
            outputs.append(lse)
            gradients.append(torch.where(lse.detach().isinf(), 0, call.dlse.to(lse.dtype)))
        found = torch.autograd.grad(outputs, leaves, gradients)
    results = {"out": out.detach(), "lse": lse.detach()} | ({"mass": mass[0]} if mass else {})
    return results | {f"gradient {name}": g for name, g in zip(_names(call), found, strict=True)}


def torch_way(call: Call) -> dict[str, Tensor]:
    """The same by torch, dense: scores and softmax in fp32, probabilities rounded to the dtype of the inputs.

    On a GPU the 16-bit scores come of its tensor cores, whose fp32 sums round less exactly than others: lse shows it.
    """
    f = call.feature
    leaves = [leaf.detach().requires_grad_() for leaf in call.leaves]
    q, k, v, bias = call.inputs(leaves)
    plan = MaskPlan.lower(fresh(call.layout), call.mask, fresh(call.k_layout))
    seen = seen_pairs(plan.q_table, plan.k_table)
    wide_k, wide_v = (t.float().repeat_interleave(f.heads // f.kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), wide_k)
    if q.is_cuda and q.dtype != torch.float32:
        of_cores = torch.bmm(
            q.detach().transpose(0, 1), wide_k.detach().to(k.dtype).permute(1, 2, 0), out_dtype=torch.float32
        )
        scores = scores + (of_cores - scores).detach()  # their values, with the gradient of the product
    scores = scores / math.sqrt(q.shape[2])
    if bias is not None:
        scores = scores + bias[:, plan.q_modality.long()][:, :, plan.k_modality.long()]
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, 2)
    p = torch.where(seen, torch.exp(scores - torch.where(lse.isinf(), 0, lse).unsqueeze(2)), 0)
    mass = torch.einsum("hqk,km->qhm", p, F.one_hot(plan.k_modality.long(), M).float())
    kept = p
    if f.dropout_p:
        torch.manual_seed(call.seed)
        rng = torch.randint(2**63 - 1, (2,), device=q.device)
        axes = torch.meshgrid(*(torch.arange(n, device=q.device) for n in p.shape), indexing="ij")
        kept = p * dropout_keep(rng, *axes, f.dropout_p) / (1 - f.dropout_p)
    out = torch.einsum("hqk,khd->qhd", kept.to(q.dtype).float(), wide_v).to(q.dtype)
    loss = (out.float() * call.do.float()).sum()
    if f.lse_gradient:
        loss = loss + (torch.where(lse.isinf(), 0, lse) * torch.where(lse.isinf(), 0, call.dlse)).sum()
    found = torch.autograd.grad(loss, leaves)
    results = {"out": out.detach(), "lse": lse.detach()} | ({"mass": mass.detach()} if f.mass else {})
    return results | {f"gradient {name}": g for name, g in zip(_names(call), found, strict=True)}


def fresh(layout: PackedLayout | None) -> PackedLayout | None:
    """The same layout, with nothing lowered on it yet: modes must not meet one another's tiles."""
    return None if layout is None else copy.copy(layout.host).to(layout.device)


def _names(call: Call) -> list[str]:
    names = ["qkv"] if call.feature.strided else ["q", "k", "v"]
    return [*names, "pair_bias"] if call.feature.pair_bias else names


def _one_way() -> tuple[tuple[bool, ...], ...]:
    """Modality m sees itself and those before it: rows with few visible keys, tiles with mixed bits."""
    return tuple(tuple(key <= query for key in range(M)) for query in range(M))
