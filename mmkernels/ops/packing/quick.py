"""Packing for plain calls on the CPU: past the dispatcher, which on a short batch costs more than the copy.

pack, unpack, pad, unpad, gather_rows and segment_mean of csrc/bindings/packing_python.cpp; their last argument is `out`
or None.  Each checks all of its arguments, and returns None where it cannot or may not serve (a gradient, a tracer, a
subclass, a wrong shape, no extension): the caller goes on with the checks that have words for it, and the dispatcher.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

from mmkernels import dispatch, native

_NAMES = ("pack", "unpack", "pad", "unpad", "gather_rows", "segment_mean")

# Who may be looking on, and what says that nobody is: dispatch modes, torch.func, forward mode, torch.jit.trace, the
# profiler.  Functions of C all: Python's would take as long as the rest.
_WATCHES = (
    (torch._C._len_torch_dispatch_stack, 0),
    (dispatch.before_autograd, False),
    (torch._C._are_functorch_transforms_active, False),
    (functools.partial(getattr, forward_ad, "_current_level"), -1),
    (torch._C._get_tracing_state, None),
    (torch.autograd._profiler_enabled, False),
)


def __getattr__(name: str) -> Any:
    """The first use of a function loads the extension; later ones find it in this module."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module = native.cpu_functions() if dispatch.cpp_missing() is None else None
    serves = module is not None and module.connect(torch, torch._C._increment_version, _WATCHES)
    globals().update({each: getattr(module, each) if serves else _refuse for each in _NAMES})
    return globals()[name]


def _refuse(*args: Any) -> None:
    return None
