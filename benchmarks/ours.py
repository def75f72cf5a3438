"""Our own implementations of an operator, as rows of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

from torch import Tensor

from benchmarks.harness import PREFIX, Implementation, Missing
from mmkernels import dispatch

Build = Callable[[str, str, dict], Implementation]


def our_rows(
    op: str, like: Tensor, build: Build, *, without: Container[str] = ()
) -> Iterator[Implementation | Missing]:
    """build(row name, impl, extra) of each implementation meant for like's device, fastest first; Missing where one
    cannot run.  extra marks the one that impl="auto" takes, which tables and reports name first.

    The reference is the oracle, not a product: it is not timed.
    """
    auto = dispatch.resolve(op, "auto", device=like.device, dtype=like.dtype)
    for impl in dispatch.TABLE[op].get(like.device.type, ()):
        if impl == "reference" or impl in without:
            continue
        reason = dispatch.missing(op, impl, device=like.device, dtype=like.dtype)
        name, extra = PREFIX + impl, {"auto": True} if impl == auto else {}
        yield Missing(name, reason) if reason else build(name, impl, extra)
