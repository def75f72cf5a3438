"""Runs the tests of the planner and the CPU operators on modules built with ASan and UBSan; any finding ends it.

    PYTHON tests/sanitize.py [TEST ...]

`make sanitize` does this.  The modules are built in a copy of the checkout.  Python itself is not instrumented, so the
sanitizer's library is loaded ahead of it; leaks are not looked for (Python and torch keep what they allocate).
"""

import os
import subprocess
import sys
from pathlib import Path

from native_copy import built, run, run_tests


def main() -> None:
    compiler = os.environ.get("CXX", "g++")
    libraries = [library_of(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    with built(MMKERNELS_SANITIZE="1") as tree:
        reports = tree / "reports"
        reports.mkdir()
        to_file = f"log_path={reports}/report"  # pytest keeps what a process writes until the test ends: this one dies
        preload = {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=0:exitcode=99:{to_file}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:{to_file}",
            "OMP_NUM_THREADS": "2",
        }
        if not run(tree, "-c", OVERRUN, **preload) or not list(reports.iterdir()):
            sys.exit("the sanitizer does not see a read past the end: it is not at work")
        for report in reports.iterdir():
            report.unlink()
        two = ("-n", "2", "--dist", "loadfile", "--max-worker-restart", "0")
        code = run_tests(tree, *two, tests=sys.argv[1:], **preload)
        for report in sorted(reports.iterdir()):
            print(report.read_text(), file=sys.stderr)
        sys.exit(code)


# One byte past the end of a block: the sanitizer's own memmove must end this process.
OVERRUN = """
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
start = c.malloc(64)
c.memmove(start, start + 1, 64)
"""


def library_of(compiler: str, name: str) -> str:
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    if not Path(path.strip()).is_absolute():
        sys.exit(f"{compiler} has no {name}: install the sanitizer libraries of your compiler")
    return path.strip()


if __name__ == "__main__":
    main()
