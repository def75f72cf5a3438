"""python -m benchmarks: times every kernel against its peers on this machine.

python -m benchmarks all|attention|compat|modality_embed|packing|planner|data|train_step [--device cpu|cuda]
                     [--shapes quick|full] [--budget-seconds N] [--json PATH]
python -m benchmarks report FILE ... --out DIR [--docs]
python -m benchmarks compare BASELINE NEW
python -m benchmarks attention --host
python -m benchmarks tune attention [--out PATH] [--json PATH] [--case NAME] [--kernel NAME] [--dry-run]
python -m benchmarks gpu --out DIR [--stage NAME ...] [--budget-seconds N] [--dry-run]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import compare, files, run
from mmkernels.ops.attention.configs import KERNELS

INTERRUPTED = 130  # what a shell expects of a program that was stopped
WHAT = {  # how --help names an operator whose name does not tell
    "all": "every operator",
    "compat": "drop-in replacements on padded batches",
    "data": "reading tar shards",
    "train_step": "a whole pretraining step",
}


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    try:
        return _run(options)
    except OSError as error:  # a file in a folder's place, no right to write, a full disk
        reason = "a file, expected a folder" if isinstance(error, FileExistsError) else error.strerror
        what = f"{error.filename}: {reason}" if error.filename else error
        print(f"benchmarks: {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: stopped; the cases done by then, if any, are in the file that was named", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    if options.command == "gpu":
        from benchmarks.gpu import stages

        return stages.run_all(options.out, options.stage, options.budget_seconds, dry_run=options.dry_run)
    if options.command == "tune":
        from benchmarks import tune

        choice = {"named": options.case, "kernels": options.kernel, "tried": options.json, "dry_run": options.dry_run}
        return tune.run(options.out, options.budget_seconds, options.head_dim, **choice)
    if options.command == "report":
        from benchmarks.report import command

        return command.run(options.files, options.out, docs=options.docs)
    if options.command == "compare":
        return compare.run(options.baseline, options.new, options.threshold)
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda, but torch sees no GPU (a CPU build, or no driver)", file=sys.stderr)
        return 2
    save = None
    if options.json:
        files.refuse_unwritable(options.json)
        save = functools.partial(files.write, path=options.json)
    if options.command == "attention" and options.host:
        from benchmarks import attention_host

        found = attention_host.run(device, seed=options.seed)
        if save:
            save(found)
        return 0
    choice = {"shapes": options.shapes, "seconds": options.budget_seconds, "seed": options.seed, "save": save}
    try:
        if options.command == "all":
            run.run_all(device, **choice)
        else:
            run.run(options.command, device, **choice, case=options.case)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    for op in ("all", *run.OPS):
        command = commands.add_parser(op, help=f"{WHAT.get(op, op)} against its peers")
        device = "cpu" if op in run.HOST_OPS else default
        command.add_argument("--device", choices=["cpu", "cuda"], default=device, help=f"default here {device}")
        command.add_argument("--shapes", choices=["quick", "full"], default="quick", help="cases; default quick")
        command.add_argument("--json", type=Path, help="write there after each case; default: only print")
        command.add_argument("--budget-seconds", type=_amount, help=f"about how long to take; default {_budgets(op)}")
        command.add_argument("--seed", type=_seed, default=0, help="of the drawn batches; default 0")
        if op != "all":
            command.add_argument(
                "--case", default="", help="only cases with this in their name and dtype, such as bf16; default all"
            )
        if op == "attention":
            command.add_argument("--host", action="store_true", help="host time of one call, by part, and nothing else")
    report = commands.add_parser("report", help="result files to Markdown, plots and one HTML page")
    report.add_argument("files", type=Path, nargs="+", help="JSON of runs, or of the stages of gpu")
    report.add_argument("--out", type=Path, required=True, help="folder for report.md, report.html and the plots")
    report.add_argument("--docs", action="store_true", help="rewrite the generated parts of README and evidence too")
    compared = commands.add_parser("compare", help="which rows of ours got slower, by ratio to what ran beside them")
    compared.add_argument("baseline", type=Path, help="JSON of an earlier run, or of pytest benchmarks")
    compared.add_argument("new", type=Path, help="of the same kind")
    compared.add_argument(
        "--threshold", type=_share, default=compare.THRESHOLD, help=f"tolerated share; default {compare.THRESHOLD}"
    )
    tune = commands.add_parser("tune", help="times kernel configurations on this GPU and rewrites the tuning table")
    tune.add_argument("op", choices=["attention"])
    tune.add_argument("--out", type=Path, help="file to write; default: the table that the package reads")
    tune.add_argument("--budget-seconds", type=_amount, default=540, help="the rest keeps what it has; default 540")
    tune.add_argument("--head-dim", type=int, action="append", help="only this head width, repeatable; default all")
    tune.add_argument("--case", default="", help='only cases with this in their name: "stamps 256 full"; default all')
    tune.add_argument("--kernel", choices=KERNELS, action="append", help="only this kernel, repeatable; default all")
    tune.add_argument("--json", type=Path, help="write what every candidate took there; default: nowhere")
    tune.add_argument("--dry-run", action="store_true", help="tiny, in Triton's interpreter: shows that it runs")
    gpu = commands.add_parser("gpu", help="everything a GPU is needed for, in stages, JSON after each")
    gpu.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    gpu.add_argument("--stage", action="append", help="stage by name, repeatable; default all, in order of worth")
    gpu.add_argument("--budget-seconds", type=_amount, default=540, help="for all stages together; default 540")
    gpu.add_argument("--dry-run", action="store_true", help="each stage on CPU stand-ins, tiny: shows that it runs")
    options = parser.parse_args(argv)
    if getattr(options, "host", False) and (options.case or options.budget_seconds or options.shapes != "quick"):
        parser.error("attention --host takes neither --case nor --budget-seconds nor --shapes: it has one small batch")
    return options


def _amount(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number that is not negative")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "an integer that is not negative")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < 1, "a share such as 0.15, below 1")


def _number(text: str, kind: type, fits: Callable[[float], bool], expected: str) -> float:
    with contextlib.suppress(ValueError):
        if fits(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text}, expected {expected}")


def _budgets(op: str) -> str:
    if op == "all":
        return f"{run.ALL_SECONDS['quick']} for quick and {run.ALL_SECONDS['full']} for full, shared by all"
    return "by operator and shapes"


if __name__ == "__main__":
    sys.exit(main())
