"""Locks that a forked process, a data worker's say, can take although a thread held them when it was made."""

from __future__ import annotations

import os
import threading


def across_forks() -> threading.RLock:
    """A reentrant lock that lives as long as the process.  A fork waits until nobody else holds it.

    The thread that holds a lock is not in the child, where it would be held for ever.  Of two such locks that one
    thread takes, the one that is taken first must be made last: a fork takes the latest first.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
