"""Where the time of a call goes, from torch's profiler: kernels by their own time and kind, and the GPU's idle time."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

TOP = 30
CALLS = 3  # timed without the profiler
# What a kernel is for: the first whose pattern is in its name.  Names of ours, cuBLAS, cuDNN, CUTLASS and torch.
KINDS = {
    "attention": r"attention_|flash|fmha",
    "modality_embed": r"modality_embed|vocabulary",
    "packing": r"mm::cuda",
    "optimizer": r"adam|multi_tensor|lpnorm",
    "convolution": r"conv|fprop|dgrad|wgrad|nchw|nhwc",
    "matrix product": r"gemm|nvjet|cutlass|xmma|splitk|cublas",
    "copy": r"memcpy|memset|copy",
    "norm": r"layer_?norm|gammabeta",
}


def of(call: Callable, device: torch.device) -> dict:
    """wall_ms, busy_ms, launches, kinds {kind: percent} and top [{"name", "calls", "ms", "percent"}], longest first.

    Kernels on a GPU, operators on a CPU.  wall_ms: of a call without the profiler, until the device is done; busy_ms:
    of all kernels, `launches` of them.  What lies between is the time in which the GPU waited for the host.
    """
    on_gpu = device.type == "cuda"
    for _ in range(2):  # compiles, fills the allocator
        _timed(call, device)
    wall = statistics.median(_timed(call, device) for _ in range(CALLS))
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profile:
        _timed(call, device)
    field, kind = ("self_device_time_total", DeviceType.CUDA) if on_gpu else ("self_cpu_time_total", DeviceType.CPU)
    events = [
        e for e in profile.key_averages() if e.device_type == kind and not getattr(e, "is_user_annotation", False)
    ]
    spent = {event.key: (getattr(event, field) / 1e3, event.count) for event in events}
    busy = sum(ms for ms, _ in spent.values()) or 1e-9
    kinds: Counter[str] = Counter()
    for name, (ms, _) in spent.items():
        kinds[kind_of(name)] += 100 * ms / busy
    rows = [
        {"name": name, "calls": count, "ms": round(ms, 4), "percent": round(100 * ms / busy, 1)}
        for name, (ms, count) in spent.items()
        if ms > 0
    ]
    return {
        "wall_ms": round(wall, 3),
        "busy_ms": round(busy, 3),
        "launches": sum(count for _, count in spent.values()),
        "kinds": {name: round(percent, 1) for name, percent in kinds.most_common()},
        "top": sorted(rows, key=lambda row: -row["ms"])[:TOP],
    }


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _timed(call: Callable, device: torch.device) -> float:
    """Milliseconds until the device is done."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
