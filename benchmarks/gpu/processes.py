"""A stage in a process of its own: what it breaks on the device, or hangs in, ends with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import files


def run(stage: Callable[..., dict], arguments: tuple, path: Path, seconds: float) -> dict:
    """The record that stage(*arguments) wrote to path; where the process died or was ended, one that says so."""
    before = path.stat().st_mtime_ns if path.exists() else None
    start = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=_alone, args=(stage, arguments))
    process.start()
    try:
        process.join(seconds)
    finally:  # also where this one is stopped: its Ctrl-C does not reach the other's group
        if hung := process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has not come as far as to lead a group
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(10)  # not for ever: a process that waits for a broken driver cannot be killed
    record = files.read(path)
    written = record and path.stat().st_mtime_ns != before
    if process.exitcode == 0 and written:
        return record
    # What was there (checks that passed in an earlier run, rows so far) stays.
    error = f"ended after {seconds:.0f} s" if hung else f"its process ended with code {process.exitcode}"
    record |= {"stage": path.stem, "ok": False, "error": error, "seconds": time.perf_counter() - start}
    if "environment" in record:
        files.write(record, path)
    print(f"  {path.stem}: {error}", flush=True)
    return record


def _alone(stage: Callable[..., dict], arguments: tuple) -> None:
    os.setsid()  # with its own processes in one group, which can be ended together
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    stage(*arguments)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Who was killed ends nothing: a stage would go on, and disturb the timing of a second run."""
    parent.join()  # at once, where it was killed before this process had imported torch
    os.killpg(os.getpgrp(), signal.SIGKILL)
