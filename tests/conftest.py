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


@pytest.fixture(autouse=True, scope="session")
def _products_of_the_interpreter():
    """Summed in fp64 and rounded once.

    numpy sums in an order that its BLAS chooses by the CPU: with AVX2 fp32 gradients at D 256, which hold differences
    of products, broke the error rule, with AVX-512 they held it.
    """
    if not settings.current().triton_interpret:
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *precision):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
