"""`python -m mmkernels.build`: builds the native modules in place, in a checkout, and prints what was built.

The same as `pip install --no-build-isolation -e .` does on the way; for machines that got a compiler later.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from mmkernels.native import MODULES, PACKAGE, needless, path_of

ROOT = PACKAGE.parent


def main() -> int:
    """Exit code 0 when every module that this machine is meant to have is there afterwards, 1 otherwise."""
    argparse.ArgumentParser(prog="python -m mmkernels.build", description=__doc__).parse_args()
    if not (ROOT / "setup.py").exists() or not (ROOT / "csrc").is_dir():
        print(f"mmkernels.build: {ROOT} holds no setup.py and csrc/; run it in a checkout (pip install -e .)")
        return 1
    before = {name: _stamp(name) for name in MODULES}
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT).returncode
    seconds = time.perf_counter() - start
    missing = [name for name in MODULES if path_of(name) is None and not needless(name)]
    for name, purpose in MODULES.items():
        state = "missing" if path_of(name) is None else "up to date" if _stamp(name) == before[name] else "built"
        reason = needless(name)
        print(f"mmkernels.{name:<9} {state:<11} {purpose}" + (f" (not for this machine: {reason})" if reason else ""))
    print(f"{seconds:.1f} s")
    return 1 if code or missing else 0


def _stamp(name: str) -> int | None:
    path = path_of(name)
    return None if path is None else path.stat().st_mtime_ns


if __name__ == "__main__":
    sys.exit(main())
