"""packing by the C++ extension (csrc/bindings/packing.cpp): multithreaded copies and sums on CPU.

The raw operators take any strides, write contiguous outputs, and check everything, since an error there would be a
crash.
"""

from __future__ import annotations

from mmkernels import native
from mmkernels.ops.packing import schemas

native.load_cpu_ops()  # before the schemas, which a second try could not define again; it implements them
schemas.define("mm_cpp")
KERNELS = schemas.native_kernels("mm_cpp")
