"""What a figure was measured on: hardware, clocks, versions, commit, seed."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("mmkernels", "mmmodel", "csrc", "benchmarks"), (".py", ".cpp", ".cu", ".h", ".cuh", ".hpp")
GPU_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
)


def describe(device: torch.device, seed: int) -> dict:
    """Facts about this machine and these sources.  Names no path and no host."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": _cpu_mhz(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "commit": commit(),
        "sources": sources(),
        "seed": seed,
    }
    if device.type == "cuda":
        facts["gpu"] = _gpu(device)
    return facts


def commit() -> str:
    """Commit of the sources, with "+changes" when the tree differs from it; "unknown" outside a git checkout."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


@functools.cache
def sources() -> str:
    """Digest of the sources that a figure depends on: tells uncommitted changes apart, and is there without git."""
    folders, suffixes = SOURCES
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "name": properties.name,
        "sm": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
    }
    # By its own name: nvidia-smi counts all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES shows it.  Of a
    # part of one (MIG) it knows no such name; the driver is the same for all.
    query = _nvidia_smi(GPU_FIELDS, f"GPU-{properties.uuid}") or _nvidia_smi(GPU_FIELDS[:1], "0")
    return facts | dict(zip(GPU_FIELDS, query, strict=False))


def _nvidia_smi(fields: tuple[str, ...], gpu: str) -> list[str]:
    found = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", gpu)
    return [part.strip() for part in found.split(",")] if found else []


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_mhz() -> float | None:
    """Mean clock of the cores at this moment, where the kernel tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    clocks = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(clocks) / len(clocks)) if clocks else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """Standard output of command, or "" where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
