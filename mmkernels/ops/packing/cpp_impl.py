"""packing by the C++ extension (csrc/bindings/packing.cpp): multithreaded copies and sums on CPU.

The raw operators take any strides, write contiguous outputs, and check everything, since an error there would be a
crash.
"""

from __future__ import annotations

from mmkernels import native
from mmkernels.ops.packing import schemas

schemas.define("mm_cpp")
native.load_cpu_ops()
KERNELS = schemas.native_kernels("mm_cpp")
