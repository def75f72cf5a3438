"""One launch of a Triton kernel, and the same launch made again with other tensors.

`fn[grid](...)` looks at each of some fifty arguments to find the kernel that was compiled for such ones, which takes
longer than a short kernel runs.  Where shapes, strides, dtypes and alignment are those of an earlier launch the answer
is the same: that kernel is launched as JITFunction.run does it last, with new pointers and descriptors.  That is
Triton 3.6's own interface, so any other version takes the long way, as do launches that a hook watches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels import dispatch

KNOWN_TRITON = (3, 6)  # whose CompiledKernel.run takes what Replay gives it


class Launch(NamedTuple):
    """fn[(programs,)](*args, **constants, **options): args up to the first constexpr."""

    fn: Any
    programs: int
    args: tuple
    constants: dict[str, Any]
    options: dict[str, int]


def launch(name: str, tensors: dict[str, Tensor], make: Callable[[], Launch | None], kept: dict | None) -> None:
    """Make the launch that `make` describes, or the one of this name that is kept.

    tensors  what every call brings anew, by the kernel's name for it; a descriptor's name stands for its base
    make     None where there is nothing to launch
    kept     of calls whose `tensors` are alike in dtype, shape, strides, device and alignment to 16 bytes, and whose
             other arguments are the same; None: keep nothing
    """
    if kept is not None and _watched():
        kept = None
    if kept is not None and (replay := kept.get(name)) is not None:
        replay(tensors)
        return
    made = make()
    if made is None:
        return
    kernel = made.fn[(made.programs,)](*made.args, **made.constants, **made.options)
    if kept is not None and kernel is not None:  # None: the interpreter
        kept[name] = Replay(made, kernel, tensors)


class Replay:
    """A launch without its own tensors: what it keeps must not keep activations alive.

    Pointers go as numbers, which the launcher takes as they are; of a tensor it asks the driver each time.
    """

    __slots__ = ("args", "descriptors", "kernel", "pointers", "programs")

    def __init__(self, made: Launch, kernel: Any, tensors: dict[str, Tensor]) -> None:
        names = made.fn.arg_names
        args = [*made.args, *(made.constants[name] for name in names[len(made.args) :])]
        own = [(name, names.index(name)) for name in tensors]
        self.descriptors = [
            (name, at, {**vars(args[at]), "base": None}) for name, at in own if isinstance(args[at], TensorDescriptor)
        ]
        self.pointers = [(name, at) for name, at in own if isinstance(args[at], Tensor)]
        for _, at in own:
            args[at] = None  # descriptors that the strides rule out are None, and stay it
        self.args = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        self.kernel, self.programs = kernel, made.programs

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        args = self.args.copy()
        for name, at in self.pointers:
            args[at] = tensors[name].data_ptr()
        for name, at, fields in self.descriptors:
            args[at] = descriptor = object.__new__(TensorDescriptor)  # the fields were checked when they were new
            descriptor.__dict__ = {**fields, "base": tensors[name]}
        active, kernel = driver.active, self.kernel
        stream = active.get_current_stream(active.get_current_device())
        kernel.run(
            self.programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *args
        )  # None: no metadata, no hooks


def can_replay() -> bool:
    return dispatch.triton_version() == KNOWN_TRITON and not knobs.runtime.interpret


def _watched() -> bool:
    """Whether a profiler or a debugger wants to see launches.   A hook: a chain of them, a function or None"""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or runtime.debug)
