"""Runs the tests of the CPU operators on modules that use less than this CPU may have.

    PYTHON tests/vector_widths.py [LEVEL ...]      levels of x86-64: 4 is AVX-512 without products of bf16, 3 is AVX2,
                                                   1 the baseline; all of them if none is named

`make test-vector-widths` does this: what a CPU without AVX-512 runs is tested on one that has it.
"""

import sys

from native_copy import built, run, run_tests

LANES = {4: 16, 3: 8, 1: 4}  # floats of a vector, by level; bf16 is widened to them
CHECK = """
import torch
from mmkernels.ops.attention import cpp_impl
for dtype in (torch.float32, torch.bfloat16):
    assert cpp_impl.vector_terms(dtype) == {}, f"{{dtype}}: vectors of {{cpp_impl.vector_terms(dtype)}}"
"""


def main() -> None:
    for level in [int(level) for level in sys.argv[1:]] or LANES:
        with built(MMKERNELS_X86_LEVEL=str(level)) as tree:
            print(f"x86-64-v{level}: vectors of {LANES[level]} floats", flush=True)
            if run(tree, "-c", CHECK.format(LANES[level])):
                sys.exit("the modules use other vectors than asked for")
            code = run_tests(tree, "-n", "2", "--dist", "loadfile", OMP_NUM_THREADS="1")
            if code:
                sys.exit(code)


if __name__ == "__main__":
    main()
