"""SIGTERM and Ctrl-C in a training: the step in progress is finished and saved first."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # exit status after a SIGTERM that was obeyed


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list of which SIGTERM and SIGINT came: whoever has it looks there after each step."""
    stop: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, lambda received, frame: stop.append(received))
    except ValueError:  # not in the main thread: signals are the caller's
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def message(step: int, steps: int) -> str:
    return f"stopped after step {step} of {steps}; the same command goes on from there"


def end(stop: Sequence[int], said: str) -> NoReturn:
    """Raises what a command ends with after these signals: KeyboardInterrupt, or SystemExit with a line in the log."""
    if signal.SIGINT in stop:
        raise KeyboardInterrupt(said)
    logger.info("%s", said)
    raise SystemExit(STOPPED)
