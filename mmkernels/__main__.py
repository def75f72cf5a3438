"""`python -m mmkernels` prints what would run on this machine, and why not something faster."""

from mmkernels.dispatch import explain

if __name__ == "__main__":
    print(explain())
