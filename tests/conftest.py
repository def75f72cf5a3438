"""Shared fixtures.  Interpreter tests run in their own process: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch

from mmkernels import settings


def pytest_collection_modifyitems(config, items):
    """Triton decides at import between compiling and interpreting, so the two kinds never share a process."""
    interpret = settings.current().triton_interpret
    kept = [item for item in items if (item.get_closest_marker("interpreter") is not None) == interpret]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
