"""Where the time of a call goes: operators and kernels by their own time, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

TOP = 30


def hot_spots(call: Callable, device: torch.device) -> list[dict]:
    """[{"name", "calls", "ms", "percent"}], longest first: kernels on a GPU, operators on a CPU."""
    for _ in range(2):  # compiles, fills the allocator
        call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: (getattr(event, field), event.count) for event in profile.key_averages()}
    total = sum(us for us, _ in spent.values()) or 1.0
    rows = [
        {"name": name, "calls": count, "ms": round(us / 1e3, 4), "percent": round(100 * us / total, 1)}
        for name, (us, count) in spent.items()
        if us > 0
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:TOP]
