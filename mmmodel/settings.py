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
