"""Runs the tests of the CPU operators on modules that use no wider vectors than AVX2, then the baseline's.

    PYTHON tests/vector_widths.py [LEVEL ...]      levels of x86-64: 3 is AVX2, 1 the baseline; both if none is named

`make test-vector-widths` does this: what a CPU without AVX-512 runs is tested on one that has it.
"""

import sys

from native_copy import built, run, run_tests

LANES = {3: 8, 1: 4}  # floats of a vector, by level
CHECK = """
from mmkernels.ops.attention import cpp_impl
assert cpp_impl.vector_floats() == {}, f"vectors of {{cpp_impl.vector_floats()}} floats"
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
