"""python -m benchmarks.gpu.small_cases: a few checks of every kernel on tiny inputs, for compute-sanitizer."""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.gpu import correctness

SCOPE = correctness.Scope(dtypes=("bf16",), head_dims=(64,), widths=(100,), longest=40, repeats=2)
# Of the features, those that reach each kernel and each of its branches once; under a sanitizer a call takes seconds.
KEPT = ("full", "everything", "everything cross", "modality_embed", "packing")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_cases", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    device = torch.device(parser.parse_args(argv).device)
    failed = 0
    for name, check in correctness.all_checks(device, SCOPE):
        if not is_kept(name):
            continue
        try:
            check()
        except Exception as error:  # the others' memory errors are wanted too
            failed += 1
            print(f"FAILED {name}: {error}", flush=True)
        else:
            print(f"passed {name}", flush=True)
    return 1 if failed else 0


def is_kept(name: str) -> bool:
    call, _, kind = name.partition(": ")
    feature = call.split(",")[0].split(" ", 3)[-1] if call.startswith("attention ") else call.split()[0]
    return kind == "error rule" and feature in KEPT


if __name__ == "__main__":
    sys.exit(main())
