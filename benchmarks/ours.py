"""Our own implementations of an operator, as rows of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import PREFIX, Missing
from mmkernels import dispatch


def our_impls(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str | Missing]]:
    """(row name, impl) of each implementation meant for this device, fastest first; Missing where one cannot run.

    The reference is the oracle, not a product: it is not timed.
    """
    for impl in dispatch.TABLE[op].get(device.type, ()):
        if impl == "reference":
            continue
        reason = dispatch.missing(op, impl, device=device, dtype=dtype)
        yield PREFIX + impl, Missing(PREFIX + impl, reason) if reason else impl


def auto_mark(impl: str, auto: str) -> dict[str, bool]:
    """Of the row whose implementation impl="auto" takes: tables and reports name it first."""
    return {"auto": True} if impl == auto else {}
