"""C++ operators for plain calls on the CPU: past the dispatcher, which on a short batch costs more than they do.

Functions of csrc/bindings/*_python.cpp.  Each checks all of its arguments, and returns None where it cannot or may not
serve (a tracer, a subclass, a wrong shape; in packing, a gradient): the caller goes the long way then, which does it or
says what is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from mmkernels import dispatch, native, tracing

# Who may be looking on, and what says that nobody is: dispatch modes, torch.func, forward mode, torch.jit.trace, the
# profiler.  Functions of C all: Python's would take as long as the rest.
_WATCHES = (
    (torch._C._len_torch_dispatch_stack, 0),
    (tracing.before_autograd, False),
    (torch._C._are_functorch_transforms_active, False),
    (functools.partial(getattr, forward_ad, "_current_level"), -1),
    (torch._C._get_tracing_state, None),
    (torch.autograd._profiler_enabled, False),
)


def function(name: str) -> Callable[..., Any]:
    """The function of this name; without it one that always returns None."""
    return getattr(_module(), name, _refuse)


@functools.cache
def _module() -> ModuleType | None:
    module = native.cpu_functions() if dispatch.cpp_missing() is None else None
    serves = module is not None and module.connect(torch, torch._C._increment_version, _WATCHES)
    return module if serves else None


def _refuse(*args: Any) -> None:
    return None
