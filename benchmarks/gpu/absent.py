"""A driver that tells Triton of a GPU that is not there: real calls compile their kernels, and launch nothing.

For a process of its own: nothing else should meet results that nobody computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mmkernels import dispatch
from mmkernels.inspect import ARCHS
from mmkernels.ops.attention import triton_kernels

SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes of shared memory that a block may have


class Driver:
    """What Triton asks of a driver.

    launched: is told the kernel's name and what its launcher was given; compiled: Triton's source and metadata of each
    """

    utils = property(lambda self: self)

    def __init__(self, launched: Callable[..., None], compiled: Callable[[Any, Any], None], arch: str) -> None:
        self._launched, self._compiled, self._arch = launched, compiled, arch

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return name, hash(kernel), 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self._arch]}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHS[self._arch], 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._compiled(source, metadata)
        return lambda *args: self._launched(metadata.name, *args)


def install(
    launched: Callable[..., None] = lambda *args: None,
    compiled: Callable[[Any, Any], None] = lambda *args: None,
    arch: str = "sm_90",
) -> None:
    """From here on, in this process, impl="triton" takes CPU tensors for those of such a GPU."""
    driver.set_active(Driver(launched, compiled, arch))
    dispatch._triton_missing = lambda *inputs: None
    triton_kernels._arch = lambda device: arch
