"""The one place of mmmodel that reads environment variables."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    cache: Path  # MMMODEL_CACHE, else $XDG_CACHE_HOME/mmmodel, else ~/.cache/mmmodel: prepared data and downloads


def current() -> Settings:
    """Read the environment now; nothing is remembered between calls, so tests may set variables."""
    if own := os.environ.get("MMMODEL_CACHE"):
        return Settings(cache=Path(own).expanduser())
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Settings(cache=Path(xdg).expanduser() / "mmmodel")
    return Settings(cache=Path.home() / ".cache" / "mmmodel")


def calm_threads() -> None:
    """Let OpenMP threads that wait for one another sleep after a microsecond; to be called before torch is imported.

    libgomp spins for milliseconds by default. On two cores that are shared with anything else the spinning thread holds
    the core that the other one waits for: ten times slower was measured. Idle machines lose a few percent.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
