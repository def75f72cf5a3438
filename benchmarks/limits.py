"""What this machine can do, measured in the run that quotes it: copy bandwidth and matrix-product rate."""

from __future__ import annotations

import time
from collections.abc import Container

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Large enough to leave every cache; CPU sizes keep the whole measurement near a second.
COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


def measure(device: torch.device, dtypes: list[str], seconds: float = 0.4, known: Container[str] = ()) -> dict:
    """{"copy": GB/s read plus written, "gemm_<dtype>": TFLOP/s}: the best of repeated trials, on random data.

    Without those that are known already.  Products of a dtype may be taken in fp32, to which it widens without loss:
    on a CPU without instructions for bf16 torch.mm of it is a hundred times as slow.
    """
    limits = {} if "copy" in known else {"copy": {"value": _copy(device, seconds), "unit": "GB/s"}}
    wanted = [name for name in dtypes if f"gemm_{name}" not in known]
    rates = {name: _gemm(device, DTYPES[name], seconds) for name in dict.fromkeys(("fp32", *wanted) if wanted else ())}
    for name in wanted:
        limits[f"gemm_{name}"] = {"value": max(rates["fp32"], rates[name]), "unit": "TFLOP/s"}
    return limits


def add_after(limits: dict, device: torch.device, seconds: float = 0.2) -> None:
    """Each limit's "after": its value once more, when a run ends.  Below the first, the machine slowed down meanwhile,
    by its heat or by its neighbours, and the run's own figures scatter as much."""
    dtypes = [name.removeprefix("gemm_") for name in limits if name != "copy"]
    for name, again in measure(device, dtypes, seconds).items():
        if name in limits:
            limits[name]["after"] = again["value"]


def _copy(device: torch.device, seconds: float) -> float:
    source = torch.empty(COPY_BYTES[device.type] // 4, device=device).uniform_()
    target = torch.zeros_like(source)  # written once, so that page faults are not in the figure
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds) / 1e9


def _gemm(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    n = GEMM_SIZE[device.type]
    a, b = (torch.empty(n, n, device=device).uniform_(-1, 1).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds) / 1e12


def _best(call, device: torch.device, seconds: float) -> float:
    """Shortest time of one call.  A limit is what was reached at best; medians are for what is compared with it."""
    call()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        best = min(best, _once(call, device))
    return best


def _once(call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e-3
