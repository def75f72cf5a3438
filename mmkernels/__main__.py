"""`python -m mmkernels` prints what would run on this machine, and why not something faster."""

import argparse

from mmkernels import __version__
from mmkernels.dispatch import explain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mmkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mmkernels {__version__}")
    parser.parse_args()
    print(explain())
