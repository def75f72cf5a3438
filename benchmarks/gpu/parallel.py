"""Checks in several processes: compiling is what takes the time, and one broken CUDA context must not end them all."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

ROUNDS = 8  # of pools: what broken processes left undone goes to fresh ones
HUNG = 30.0  # seconds after the deadline, at which no check is begun, until those under way are ended: kernels may hang


def run(
    work: Callable[[list[str]], list[dict]], groups: list[list[str]], workers: int, deadline: float = math.inf
) -> list[dict]:
    """Records of all groups, by work(names); what a broken process did not get to is tried in a new one.

    deadline: of time.time; processes still at work HUNG seconds later are killed, and their groups have no records.
    """
    records: dict[str, dict] = {}
    for _ in range(ROUNDS):
        done, killed = _round(work, groups, workers, deadline + HUNG)
        records |= {record["name"]: record for record in done}
        groups = [rest for group in groups if (rest := [name for name in group if name not in records])]
        if not groups or not (done or killed) or time.time() > deadline:  # nothing left, or no time
            break
    return list(records.values())


def broken(device: torch.device) -> bool:
    """Whether this process can still use the device: after an illegal access nothing on it works any more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _round(work, groups: list[list[str]], workers: int, until: float) -> tuple[list[dict], bool]:
    """One pool's records, and whether a process was killed: it takes with it whatever the pool has not finished."""
    records: list[dict] = []
    killed = False
    context = multiprocessing.get_context("spawn")  # a fork would share a CUDA context
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(work, group) for group in groups]
        left = None if until == math.inf else max(until - time.time(), 0.0)
        try:
            for future in as_completed(futures, left):
                try:
                    records += future.result()
                except BrokenProcessPool:  # a process was killed: a crash in a driver, or no memory
                    killed = True
        except TimeoutError:
            print(f"  killed what was still running {HUNG:.0f} s after the deadline", flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
    return records, killed
