"""One file per peer: NAME, missing(problem) -> reason or None, build(problem) -> Implementation."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Implementation, Missing


def peer_rows(problem) -> Iterator[Implementation | Missing]:
    """What each of problem.peers makes of it."""
    for peer in problem.peers:
        reason = peer.missing(problem)
        yield Missing(peer.NAME, reason) if reason else peer.build(problem)
