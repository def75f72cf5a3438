"""Which tests run.  Interpreter tests take a process of their own: TRITON_INTERPRET=1 pytest.

Tests marked `extended` are the same checks on many more cases: pytest --extended, `make test-extended`.
"""

import pytest
import torch

from mmkernels import settings


def pytest_addoption(parser):
    parser.addoption("--extended", action="store_true", help="run the tests marked extended, and only these")


def pytest_collection_modifyitems(config, items):
    """Triton decides at import between compiling and interpreting, so the two kinds never share a process."""
    interpret, extended = settings.current().triton_interpret, config.getoption("extended")

    def marked(item, name):
        return item.get_closest_marker(name) is not None

    kept, left = [], []
    for item in items:
        runs = marked(item, "interpreter") == interpret and marked(item, "extended") == extended
        (kept if runs else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
