"""`python -m mmkernels` prints what would run on this machine, and why not something faster."""

import argparse

from mmkernels.dispatch import explain

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m mmkernels", description=__doc__).parse_args()
    print(explain())
