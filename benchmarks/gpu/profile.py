"""Where the time of a call goes: kernels by their own time and kind, the GPU's idle time, and what the host does."""

from __future__ import annotations

import cProfile
import pstats
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

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
WAITS = r"(Stream|Event)Synchronize"  # calls of CUDA in which the host waits until the GPU has come so far


def of(call: Callable, device: torch.device) -> dict:
    """wall_ms, busy_ms, launches, kinds {kind: percent}, top [{"name", "calls", "ms", "percent"}], longest first; host.

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
    spent = _spent(profile, kind, field)
    busy = sum(ms for ms, _ in spent.values()) or 1e-9
    kinds: Counter[str] = Counter()
    for name, (ms, _) in spent.items():
        kinds[kind_of(name)] += 100 * ms / busy
    return {
        "wall_ms": round(wall, 3),
        "busy_ms": round(busy, 3),
        "launches": sum(count for _, count in spent.values()),
        "kinds": {name: round(percent, 1) for name, percent in kinds.most_common()},
        "top": _rows(spent),
        "host": host(call, device),
    }


def host(call: Callable, device: torch.device) -> dict:
    """What the host's threads do in a call: operators, calls of CUDA (waits: those that wait for the GPU), Python.

    operators are by their own time, of all threads, backward's among them; own_ms says how much of it there is, a
    profiler that slows each of them down included.  python: the functions of the main thread with the most time of
    their own and with those that they call, in which backward is one call.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        _timed(call, device)
    spent = _spent(profile, DeviceType.CPU, "self_cpu_time_total")
    waits = [(ms, count) for name, (ms, count) in spent.items() if re.search(WAITS, name)]
    python = cProfile.Profile()
    python.runcall(_timed, call, device)
    return {
        "own_ms": round(sum(ms for ms, _ in spent.values()), 3),
        "waits": {"calls": sum(count for _, count in waits), "ms": round(sum(ms for ms, _ in waits), 3)},
        "operators": _rows(spent),
        "python": _functions(pstats.Stats(python)),
    }


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _spent(profile: torch.profiler.profile, kind: DeviceType, field: str) -> dict[str, tuple[float, int]]:
    """Milliseconds of its own and number of calls, by name."""
    events = [
        e for e in profile.key_averages() if e.device_type == kind and not getattr(e, "is_user_annotation", False)
    ]
    return {event.key: (getattr(event, field) / 1e3, event.count) for event in events}


def _rows(spent: dict[str, tuple[float, int]]) -> list[dict]:
    total = sum(ms for ms, _ in spent.values()) or 1e-9
    rows = [
        {"name": name, "calls": count, "ms": round(ms, 4), "percent": round(100 * ms / total, 1)}
        for name, (ms, count) in spent.items()
        if ms > 0
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:TOP]


def _functions(stats: pstats.Stats) -> list[dict]:
    rows = [
        {"name": _place(*place), "calls": calls, "own_ms": round(1e3 * own, 3), "ms": round(1e3 * total, 3)}
        for place, (_, calls, own, total, _) in stats.stats.items()
    ]
    kept = {id(row) for key in ("own_ms", "ms") for row in sorted(rows, key=lambda row: -row[key])[:TOP]}
    return sorted((row for row in rows if id(row) in kept), key=lambda row: -row["ms"])


def _place(path: str, line: int, function: str) -> str:
    """Without the folders of this machine; what is built in has no file."""
    return function if path == "~" else f"{'/'.join(Path(path).parts[-2:])}:{line} {function}"


def _timed(call: Callable, device: torch.device) -> float:
    """Milliseconds until the device is done."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
