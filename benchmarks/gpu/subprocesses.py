"""Stages that need a process of their own: small cases under compute-sanitizer, and the tuner's dry run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from mmkernels.ops.attention import tuned as table

TOOL = "compute-sanitizer"
# Seconds that a process may take beyond its budget: the tuner looks at the clock between two candidates, and the
# sanitizer takes what it takes (33 s on an H100 with all kernels compiled), with nothing to show where it is ended.
BEYOND = 30
LEAST = 20.0  # seconds that a process gets at least
FOUND = 86  # its exit code for an error of memory, told from ours
CASES = (sys.executable, "-m", "benchmarks.gpu.small_cases")


def sanitized(device: torch.device, seconds: float, *, dry_run: bool) -> tuple[bool, dict]:
    """{"tool", "rc", "tail"}; "skipped" where there is a GPU and no sanitizer."""
    if dry_run:
        return _ran([*CASES, "--device", device.type], seconds, tool="none: a dry run")
    if shutil.which(TOOL) is None:
        return True, {"skipped": f"{TOOL} is not installed (it comes with the CUDA toolkit)"}
    # Without torch's caching allocator every tensor has bounds of its own, so that a byte beyond them is seen.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", TOOL, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    return _ran([*command, *CASES, "--device", device.type], seconds + BEYOND, tool=f"{TOOL} memcheck")


def tuned(path: Path, seconds: float, *, dry_run: bool) -> tuple[bool, dict]:
    """{"entries", "rc", "tail"}: what was found to be faster than the defaults.  A dry run is in the interpreter.

    What every candidate took is in tune-tried.json beside path.
    """
    command = [sys.executable, "-m", "benchmarks", "tune", "attention", "--out", str(path.resolve())]
    command += ["--budget-seconds", str(round(seconds)), "--json", str(path.resolve().with_name("tune-tried.json"))]
    if dry_run:
        command = ["env", "TRITON_INTERPRET=1", *command, "--dry-run"]
    ok, result = _ran(command, seconds + BEYOND, tool="the interpreter" if dry_run else "the GPU")
    return ok, result | {"entries": table.read(path) if path.exists() else []}


def _ran(command: list[str], seconds: float, *, tool: str) -> tuple[bool, dict]:
    """Runs command, and ends it with all that it started: what went on would disturb the timing of later stages."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, text=True, errors="replace", start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, LEAST))
            rc = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            rc, output = None, process.communicate()[0] + f"\nstopped after {seconds:.0f} s"
    tail = output[-4000:]
    print(tail[-600:], flush=True)
    return rc == 0, {"tool": tool, "rc": rc, "tail": tail}
