"""Checks of attention on this device, call by call of attention_calls, under each schedule and each way to sum dQ.

The oracle is the float64 reference; the measure is the error rule against the same computation in torch, whose scores
and softmax are fp32 and whose probabilities are rounded to the inputs' dtype.  On a CPU, `auto` stands in for Triton.

T tokens, H heads, G key/value heads, D head width, M modalities.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.attention_calls import FEATURES, MASKS, Call, M, Mode, fresh, make, modes, solve, torch_way
from benchmarks.limits import DTYPES
from mmkernels import testing
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention
from mmkernels.compat.torch_varlen import varlen_attn
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.ops.attention.api import attention, attention_qkvpacked

POISON = {"fp16": 6e4}  # finite, and far beyond what a sum could hide
BIG = 1e30
ORDER = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of the largest dq: what an order may change
# Of lse, beside torch's error, which on a GPU is one rounding's: the hardware's exp2 and log2 are good to 2 units.
LSE_ROUNDING = 2.0**-24
FEW, FEW_RATIO = 500, 4.0  # of so few numbers (a pair bias' gradient) torch's errors may all be lucky
GRAPH_LAYOUTS, GRAPH_TOKENS, GRAPH_SAMPLES = 5, 192, 6
LONG = 16384  # of the memory check: a [T, T] of one byte is 256 MiB


PLAIN = ("full", "blind", "grouped", "strided")  # of these, calls that were met before take a shorter way


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
            yield f"{name}: drop-in graph", lambda t=dtype, w=width: check_drop_in_graph(device, t, w, impl)
    yield "attention: memory", lambda: check_memory(device, impl)


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

    All but dq where the order of its additions differs between runs.  With as many key heads, so do q, k and v as one
    tensor, whose gradient is one.
    """
    layout = fresh(call.layout)
    others = [leaf.flip(0) for leaf in call.leaves]

    def run(leaves: list[Tensor], layout: PackedLayout) -> dict[str, Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        q, k, v, _ = call.inputs(leaves)
        options = {"layout": layout, "mask": call.mask, "deterministic": mode.deterministic, "impl": impl}
        with mode.enter():
            out = attention(q, k, v, **options)
            found = {"out": out.detach()}
            found |= {f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(out, leaves, call.do))}
            with torch.no_grad():
                found["without gradients"] = attention(q, k, v, **options)
            if q.shape == k.shape:
                qkv = torch.stack([q, k, v], 1).detach().requires_grad_()
                out = attention_qkvpacked(qkv, **options)
                (gradient,) = torch.autograd.grad(out, [qkv], call.do)
                found |= {"packed": out.detach(), "packed dq": gradient[:, 0], "packed dk, dv": gradient[:, 1:]}
        return found

    first = {id(leaves): run(leaves, fresh(call.layout)) for leaves in (call.leaves, others)}
    for repeat in range(4):
        for leaves in (call.leaves, others):
            expected, found = first[id(leaves)], run(leaves, layout)
            for name, value in found.items():
                unordered = mode.fused and name in ("gradient 0", "packed dq")
                same = _near(value, expected[name]) if unordered else torch.equal(value, expected[name])
                assert same, f"call {repeat}: {name} differs from that of a first call"
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

    run(fresh(call.layout), fresh(call.k_layout))  # compiles
    layouts = fresh(call.layout), fresh(call.k_layout)
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


def check_drop_in_graph(device: torch.device, dtype: str, width: int, impl: str) -> None:
    """One captured graph of the drop-ins for varlen_attn and padded SDPA serves bounds and lengths on the device."""
    cases = [_bounds_of_equal_length(seed)[0] for seed in range(GRAPH_LAYOUTS)]
    longest = max(int(bounds.diff().max()) for bounds in cases)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(4)]

    *packed, packed_do = draw(GRAPH_TOKENS, 2, width)
    *padded, padded_do = draw(GRAPH_SAMPLES, 2, longest, width)
    leaves = [t.requires_grad_() for t in (*packed, *padded)]
    options = {"deterministic": True, "impl": impl}

    def step(bounds: Tensor, lengths: Tensor) -> list[Tensor]:
        ragged = varlen_attn(*packed, bounds, bounds, longest, longest, window_size=(-1, 0), **options)
        square = scaled_dot_product_attention(*padded, is_causal=True, lengths=lengths, **options)
        found = torch.autograd.grad([ragged, square], leaves, [packed_do, padded_do])
        return [ragged.detach(), square.detach(), *found]

    bounds, lengths = cases[0].to(device), cases[0].diff().to(device)
    replay = captured(lambda: step(bounds, lengths), device)
    for case in cases:
        bounds.copy_(case)
        lengths.copy_(case.diff())
        eager = step(case.to(device), case.diff().to(device))
        for index, (a, b) in enumerate(zip(replay(), eager, strict=True)):
            assert torch.equal(a, b), f"result {index} of a replay differs from the same lengths run eagerly"


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
