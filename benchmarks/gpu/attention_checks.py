"""Checks of attention on this device, feature by feature, under each schedule and each way to sum dQ.

The oracle is the float64 reference; the measure is the error rule against the same computation in torch, whose scores
and softmax are fp32 and whose probabilities are rounded to the inputs' dtype.  On a CPU, `auto` stands in for Triton.

T tokens, H heads, G key/value heads, D head width, M modalities.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
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
POISON = {"fp16": 6e4}  # finite, and far beyond what a sum could hide
BIG = 1e30
ORDER = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of the largest dq: what an order may change
# Of lse, beside torch's error, which on a GPU is one rounding's: the hardware's exp2 and log2 are good to 2 units.
LSE_ROUNDING = 2.0**-24
FEW, FEW_RATIO = 500, 4.0  # of so few numbers (a pair bias' gradient) torch's errors may all be lucky
GRAPH_LAYOUTS, GRAPH_TOKENS, GRAPH_SAMPLES = 5, 192, 6
LONG = 16384  # of the memory check: a [T, T] of one byte is 256 MiB


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


PLAIN = ("full", "blind", "grouped", "strided")  # of these, calls that were met before take a shorter way


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
    """Both schedules, both backward passes, both ways to sum dQ, and forward by the loads that are not the default."""
    if impl != "triton":
        return [Mode("deterministic", True), Mode("fast", False)]
    from mmkernels.ops.attention import triton_kernels

    arch = triton_kernels._arch(device)  # on a CPU the interpreter's, which has no TMA
    found = configs.select(arch, dtype, width)
    fused = (found.fused or found.dkdv)[0]
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


def all_checks(
    device: torch.device, dtypes: tuple[str, ...], widths: tuple[int, ...], longest: int, repeats: int, impl: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) in order of worth.  The first dtype at the first width is tried in every mode and feature, other
    widths and dtypes in those modes and features that compile other code."""
    for index, (width, dtype) in enumerate((w, t) for w in widths for t in dtypes if t == dtypes[0] or w in widths[:2]):
        ways = modes(device, dtype, width, impl)
        for number, (feature_name, feature) in enumerate(FEATURES.items()):
            if index and feature_name not in ("full", "blind", "everything", "everything cross"):
                continue
            call = functools.partial(make, device, dtype, width, feature, number, longest)
            for mode in ways:
                if mode.fused and (feature.pair_bias or feature.dropout_p or feature.mass):
                    continue  # never fused: the pair would be tried again
                name = f"attention {dtype} D{width} {feature_name}, {mode.name}"
                yield f"{name}: error rule", lambda c=call, m=mode: check_error_rule(c(), m, impl)
                if feature_name in PLAIN and index < len(dtypes):
                    yield f"{name}: met before", lambda c=call, m=mode: check_met_before(c(), m, impl)
                if feature_name == "everything" and not index:
                    yield f"{name}: no sync", lambda c=call, m=mode: check_no_sync(c(), m, impl)
                    yield f"{name}: repeats", lambda c=call, m=mode: check_repeats(c(), m, impl, repeats)
                if feature_name in ("full", "bidirectional", "dropout") and index < len(dtypes):
                    poison = POISON.get(dtype, BIG)
                    yield f"{name}: isolation", lambda c=call, m=mode, p=poison: check_isolation(c(), m, impl, p)
                    if mode.schedule != "token":
                        yield f"{name}: isolation, NaN", lambda c=call, m=mode: check_isolation(c(), m, impl, math.nan)
        if index < 2:
            name = f"attention {dtype} D{width}"
            yield f"{name}: graph", lambda t=dtype, w=width: check_graph(device, t, w, impl)
    yield "attention: memory", lambda: check_memory(device, impl)


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
            q, k, v, layout=_fresh(call.layout), k_layout=_fresh(call.k_layout), mask=call.mask, pair_bias=bias,
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


def check_error_rule(call: Call, mode: Mode, impl: str, max_ratio: float = testing.MAX_RATIO) -> None:
    """Values and gradients of one call, in memory that was NaN before."""
    with testing.poisoned_empty():
        ours = solve(call, call.leaves, mode, impl)
    expected = solve(call, [leaf.double() for leaf in call.leaves], None, "reference")
    same = torch_way(call)
    assert ours.keys() == expected.keys() == same.keys()
    for name, value in ours.items():
        if value.numel() < FEW:
            worst, torchs = (float((x.double() - expected[name]).abs().max()) for x in (value, same[name]))
            bound = FEW_RATIO * torchs + testing.error_floor(expected[name], value.dtype)
            assert worst <= bound, f"{name}: max error {worst:.3e} > {bound:.3e} (torch {torchs:.3e})"
        else:
            rounding = LSE_ROUNDING if name == "lse" else 0.0
            testing.assert_error_rule(name, value, expected[name], same[name], max_ratio=max_ratio, rounding=rounding)


def torch_way(call: Call) -> dict[str, Tensor]:
    """The same by torch, dense: scores and softmax in fp32, probabilities rounded to the dtype of the inputs.

    On a GPU the 16-bit scores come of its tensor cores, whose fp32 sums round less exactly than others: lse shows it.
    """
    f = call.feature
    leaves = [leaf.detach().requires_grad_() for leaf in call.leaves]
    q, k, v, bias = call.inputs(leaves)
    plan = MaskPlan.lower(_fresh(call.layout), call.mask, _fresh(call.k_layout))
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


def check_isolation(call: Call, mode: Mode, impl: str, poison: float) -> None:
    """Poison in all other samples leaves the first sample's results bit-equal.

    Where the order of dq's additions differs between runs, dq is as near as two runs are.
    """
    stop = int(call.layout.host.cu_seqlens[1])
    poisoned = [leaf.clone() for leaf in call.leaves]
    do = call.do.clone()
    for t in (*poisoned, do):
        t[stop:] = poison
    before = solve(call, call.leaves, mode, impl)
    after = solve(replace(call, do=do), poisoned, mode, impl)
    for name in before:
        a, b = ((t[:, :stop] if name == "lse" else t[:stop]) for t in (before[name], after[name]))
        same = _near(a, b) if mode.fused and name == "gradient q" else torch.equal(a, b)
        assert same, f"{name} of sample 0 changed when {poison} came into other samples"


def check_repeats(call: Call, mode: Mode, impl: str, repeats: int) -> None:
    """Bit-equal repeats: of everything where the mode promises it, else of what no two sums can differ in."""
    first = solve(call, call.leaves, mode, impl)
    names = [n for n in first if mode.deterministic or not n.startswith("gradient")]
    for repeat in range(repeats):
        now = solve(call, call.leaves, mode, impl)
        for name in names:
            assert torch.equal(first[name], now[name]), f"repeat {repeat}: {name} differs from the first"


def check_met_before(call: Call, mode: Mode, impl: str) -> None:
    """Plain calls that repeat earlier ones give what first calls give, bit for bit, on other tensors too.

    All but dq where the order of its additions differs between runs.
    """
    layout = _fresh(call.layout)
    others = [leaf.flip(0) for leaf in call.leaves]

    def run(leaves: list[Tensor], layout: PackedLayout) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        q, k, v, _ = call.inputs(leaves)
        options = {"layout": layout, "mask": call.mask, "deterministic": mode.deterministic, "impl": impl}
        with mode.enter():
            out = attention(q, k, v, **options)
            found = [out.detach(), *torch.autograd.grad(out, leaves, call.do)]
            with torch.no_grad():
                return [*found, attention(q, k, v, **options)]

    first = {id(leaves): run(leaves, _fresh(call.layout)) for leaves in (call.leaves, others)}
    for repeat in range(4):
        for leaves in (call.leaves, others):
            for index, (a, b) in enumerate(zip(run(leaves, layout), first[id(leaves)], strict=True)):
                same = _near(a, b) if mode.fused and index == 1 else torch.equal(a, b)
                assert same, f"call {repeat}: result {index} differs from that of a first call"
    if call.leaves[0].is_cuda:
        kept = [launches for known in layout.calls.values() for launches in known.launches()]
        assert kept, "no launch was kept: each of these calls was as a first one"


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0.0, atol=float(a.abs().max()) * ORDER[a.dtype])


def check_no_sync(call: Call, mode: Mode, impl: str) -> None:
    """Neither forward nor backward waits for the device, on a layout that has met nothing before."""
    leaves = [leaf.detach().requires_grad_() for leaf in call.leaves]
    f = call.feature

    def run(layout, k_layout):
        q, k, v, bias = call.inputs(leaves)
        with mode.enter():
            out = attention(
                q, k, v, layout=layout, k_layout=k_layout, mask=call.mask, pair_bias=bias, dropout_p=f.dropout_p,
                deterministic=mode.deterministic, impl=impl,
            )  # fmt: skip
            torch.autograd.grad(out, leaves, call.do)

    run(_fresh(call.layout), _fresh(call.k_layout))  # compiles
    layouts = _fresh(call.layout), _fresh(call.k_layout)
    with sync_is_error(call.do.device):
        run(*layouts)


def check_graph(device: torch.device, dtype: str, width: int, impl: str) -> None:
    """One captured graph of forward and backward serves five layouts of equal T, with bounds on the device."""
    layouts = [_bounds_of_equal_length(seed) for seed in range(GRAPH_LAYOUTS)]
    cu_seqlens, modality_ids = (torch.empty_like(t, device=device) for t in layouts[0])
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(GRAPH_TOKENS, 2, width, generator=generator) for _ in range(4))
    q, k, v, do = (t.to(device, DTYPES[dtype]) for t in (q, k, v, do))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = MASKS["bidirectional"](None)

    def step(cu_seqlens: Tensor, modality_ids: Tensor, impl: str) -> list[Tensor]:
        layout = PackedLayout.from_cu_seqlens(
            cu_seqlens, total_tokens=GRAPH_TOKENS, max_seqlen=GRAPH_TOKENS, modality_ids=modality_ids, num_modalities=M
        )
        out = attention(q, k, v, layout=layout, mask=mask, deterministic=True, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, do)]

    cu_seqlens.copy_(layouts[0][0])
    modality_ids.copy_(layouts[0][1])
    replay = captured(lambda: step(cu_seqlens, modality_ids, impl), device)
    for bounds, modalities in layouts:
        cu_seqlens.copy_(bounds)
        modality_ids.copy_(modalities)
        eager = step(bounds.to(device), modalities.to(device), impl)
        for name, a, b in zip("oqkv", replay(), eager, strict=True):
            assert torch.equal(a, b), f"{name} of a replay differs from the same layout run eagerly"


def check_memory(device: torch.device, impl: str) -> None:
    """Forward and backward of one long sample allocate less than one byte per query-key pair."""
    if device.type != "cuda":
        return  # only CUDA's allocator keeps this book
    q, k, v = (torch.randn(LONG, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    layout = PackedLayout.from_segments([[(0, LONG)]], num_modalities=1).to(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = attention(q, k, v, layout=layout, mask=AttentionMask(causal=True), impl=impl)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    used = torch.cuda.max_memory_allocated(device) - before
    assert used < LONG**2, f"{used / 2**20:.0f} MiB for {LONG} tokens: something grows with the square of the length"


@contextlib.contextmanager
def sync_is_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], list[Tensor]], device: torch.device) -> Callable[[], list[Tensor]]:
    """step as a CUDA graph, replayed at each call; on a CPU step itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and fills the allocator
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def _bounds_of_equal_length(seed: int) -> tuple[Tensor, Tensor]:
    """(cu_seqlens int32 [B + 1], modality_ids uint8 [T]) of GRAPH_TOKENS tokens; samples may be empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(GRAPH_TOKENS + 1, (GRAPH_SAMPLES - 1,), generator=generator).sort().values
    bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([GRAPH_TOKENS])]).int()
    return bounds, torch.randint(M, (GRAPH_TOKENS // 8,), generator=generator).repeat_interleave(8).to(torch.uint8)


def _fresh(layout: PackedLayout | None) -> PackedLayout | None:
    """The same layout, with nothing lowered on it yet: modes must not meet one another's tiles."""
    return None if layout is None else copy.copy(layout.host).to(layout.device)


def _names(call: Call) -> list[str]:
    names = ["qkv"] if call.feature.strided else ["q", "k", "v"]
    return [*names, "pair_bias"] if call.feature.pair_bias else names


def _one_way() -> tuple[tuple[bool, ...], ...]:
    """Modality m sees itself and those before it: rows with few visible keys, tiles with mixed bits."""
    return tuple(tuple(key <= query for key in range(M)) for query in range(M))
