"""pytest benchmarks: the cases of `python -m benchmarks` as pytest-benchmark suites.   --device, --shapes, --op"""

from __future__ import annotations

import pytest
import torch

from benchmarks import run


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of mmkernels")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the operators run; default cpu")
    group.addoption("--shapes", choices=["quick", "full"], default="quick", help="default quick")
    group.addoption("--op", choices=run.OPS, action="append", help="only this operator, repeatable; default all")


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no GPU (a CPU build, or no driver)")


def pytest_generate_tests(metafunc):
    """One test per case and direction, named after them."""
    device, shapes, ops = (metafunc.config.getoption(name) for name in ("--device", "--shapes", "--op"))
    parameters, names = [], []
    for op in ops or run.OPS:
        where = torch.device("cpu" if op in run.HOST_OPS else device)
        try:
            for index, problem in enumerate(run.load(op).problems(shapes, where, 0)):
                parameters += [(op, where, shapes, index, direction) for direction in problem.directions]
                names += [f"{op}-{problem.case}-{problem.dtype}-{direction}" for direction in problem.directions]
        except ImportError as error:
            reason = f"needs a package that is not installed: {error}"
            parameters.append(pytest.param(op, where, shapes, 0, "fwd", marks=pytest.mark.skip(reason=reason)))
            names.append(f"{op}-all")
    metafunc.parametrize(("op", "device", "shapes", "index", "direction"), parameters, ids=names)
