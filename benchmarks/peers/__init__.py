"""One file per peer: NAME, missing(problem) -> reason or None, build(problem) -> Implementation, or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.harness import Implementation, Missing, in_a_line


def peer_rows(problem, peers: Iterable) -> Iterator[Implementation | Missing]:
    """What each of the peers makes of the problem."""
    for peer in peers:
        try:
            reason = peer.missing(problem)
            built = Missing(peer.NAME, reason) if reason else peer.build(problem)
            rows = [built] if isinstance(built, Implementation | Missing) else list(built)
        except Exception as error:  # a package for another torch, no memory for a dense mask: the others go on
            rows = [Missing(peer.NAME, f"failed: {in_a_line(error)}")]
        yield from rows
