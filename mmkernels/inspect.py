"""Compiles every default Triton kernel configuration for a GPU that is not there, and reports what came out.

    python -m mmkernels.inspect --arch sm_90 [--op attention] [--dtype bf16] [--head-dim 64,128] [--json PATH]
    python -m mmkernels.inspect --arch sm_90 --check        only what has a promise to keep; fails where it is broken

Registers and spills come from the assembler's log, instruction counts from the disassembled binary (both bundled with
Triton), so the counts are of instructions in the program, not of instructions executed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mmkernels import settings
from mmkernels.kernel_spec import KernelSpec

ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}  # name -> compute capability, as triton's GPUTarget counts it

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.a-z]*)")
_GLOBAL_ACCESS = re.compile(r"(?:LDG|STG|LDGSTS)\.")
_TMA = re.compile(r"(?:UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b")
# tcgen05 (UTC*MMA, sm_100) is counted with mma: the report's columns are those of the architecture CI asks for, sm_90.
_MMA = re.compile(r"(?:[HIDQ]MMA|UTC[A-Z]*MMA)\b")
_WGMMA = re.compile(r"(?:[HIQB]GMMA)\b")


class InspectError(RuntimeError):
    """The kernels cannot be compiled here, or what was asked for does not exist."""


def available_ops() -> list[str]:
    """Operators that have Triton kernels, by their folder's name."""
    root = Path(__file__).parent / "ops"
    return sorted(path.parent.name for path in root.glob("*/kernel_specs.py"))


def kernel_specs(arch: str, ops: Iterable[str] | None = None) -> list[KernelSpec]:
    """Every default configuration that the operators name for arch.  Raises InspectError for an unknown arch or op."""
    if arch not in ARCHS:
        raise InspectError(f"inspect: unknown arch {arch!r}, expected one of {', '.join(ARCHS)}")
    known = available_ops()
    specs = []
    for op in known if ops is None else ops:
        if op not in known:
            raise InspectError(f"inspect: {op!r} has no Triton kernels, expected one of {', '.join(known)}")
        specs += importlib.import_module(f"mmkernels.ops.{op}.kernel_specs").kernel_specs(arch)
    return specs


def inspect_spec(spec: KernelSpec, arch: str) -> dict:
    """One row of the report: compiles spec for arch.  Adds "dots", whether the source has a tensor product at all."""
    binary, log = compile_spec(spec, arch)
    opcodes = Counter(_OPCODE.findall(_disassemble(binary.asm["cubin"])))
    registers = _REGISTERS.search(log)
    if registers is None or not opcodes:
        raise InspectError(f"inspect: {spec.kernel}: could not read the assembler's log or the disassembly:\n{log}")
    return {
        "op": spec.op,
        "kernel": spec.kernel,
        "arch": arch,
        "dtype": spec.dtype,
        "config": spec.config,
        "registers": int(registers.group(1)),
        "spill_bytes": max((max(int(a), int(b)) for a, b in _SPILLS.findall(log)), default=0),
        "shared_bytes": binary.metadata.shared,
        "wgmma": _total(opcodes, _WGMMA),
        "mma": _total(opcodes, _MMA),
        "tma": _total(opcodes, _TMA),
        "vector_bits": max(map(access_bits, opcodes), default=0),
        "dots": "tt.dot" in binary.asm["ttir"],
    }


def access_bits(opcode: str) -> int:
    """Width of one thread's global-memory access: LDG.E.128 -> 128, STG.E.U16 -> 16, LDG.E -> 32; 0 if it is none."""
    if not _GLOBAL_ACCESS.match(opcode + "."):
        return 0
    widths = [int(w) for w in re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)]
    return max(widths, default=32)


def is_promised(op: str, arch: str, dtype: str, config: dict) -> bool:
    """Whether this configuration must use wgmma and spill nothing: 16-bit attention on sm_90, D from 64 to 128."""
    return (
        op == "attention" and arch == "sm_90" and dtype in ("bf16", "fp16") and 64 <= config.get("head_dim", 0) <= 128
    )


def problems(row: dict) -> list[str]:
    """What a row of inspect_spec breaks of that promise.

    It may spill where it was timed and found faster than what does not.
    """
    if not is_promised(row["op"], row["arch"], row["dtype"], row["config"]):
        return []
    found = []
    if row["spill_bytes"] and not row["config"].get("measured"):
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["dots"] and not row["wgmma"]:
        found.append("has no wgmma")
    if row["wgmma"] and row["mma"]:
        found.append(f"{row['mma']} products fell back from wgmma to mma.sync")
    return found


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    try:
        _refuse_where_impossible()
        specs = kernel_specs(options.arch, options.op)
        _refuse_unknown("--dtype", options.dtype, {spec.dtype for spec in specs})
        _refuse_unknown("--head-dim", options.head_dim, {spec.config.get("head_dim") for spec in specs} - {None})
        specs = [spec for spec in specs if _wanted(spec, options)]
        if not specs:
            promise = "; --check is of 16-bit attention on sm_90 with D 64-128" if options.check else ""
            raise InspectError(f"inspect: no kernel configuration matches these options{promise}")
        if options.json:
            _refuse_unwritable(options.json)
        print(f"inspect: compiles {len(specs)} configurations", file=sys.stderr, flush=True)
        rows = list(_report(specs, options.arch, options.jobs))
    except InspectError as error:
        print(error, file=sys.stderr)
        return 2
    broken = [(row, what) for row in rows for what in problems(row)]
    _print_table(rows)
    if options.json:
        clean = [{k: v for k, v in row.items() if k != "dots"} for row in rows]
        options.json.write_text(json.dumps(clean, indent=1) + "\n")
    for row, what in broken:
        print(f"CHECK {row['kernel']} {row['dtype']} {_config(row)}: {what}", file=sys.stderr)
    if options.check:
        print(f"check: {len(rows)} configurations must use wgmma and not spill; {len(broken)} problems")
    return 1 if options.check and broken else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmkernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", help=f"one of {', '.join(ARCHS)}; default sm_90")
    parser.add_argument("--op", action="append", help="operator, repeatable; default all that have Triton kernels")
    parser.add_argument("--dtype", action="append", help="bf16, fp16 or fp32, repeatable; default all")
    parser.add_argument("--head-dim", type=_ints, help="attention head widths, such as 64,128; default all")
    parser.add_argument("--json", type=Path, help="also write the report there")
    promise = "compile only 16-bit attention with D 64-128 for sm_90; exit 1 if one spills or lacks wgmma"
    parser.add_argument("--check", action="store_true", help=promise)
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=_jobs, default=cores, help="compiler processes; default one a core")
    return parser.parse_args(argv)


def _ints(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected widths such as 64,128") from None


def _jobs(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected 1 or more")
    return int(text)


def _wanted(spec: KernelSpec, options: argparse.Namespace) -> bool:
    head_dim = spec.config.get("head_dim")
    if options.check and not is_promised(spec.op, options.arch, spec.dtype, spec.config):
        return False
    return (not options.dtype or spec.dtype in options.dtype) and (
        not options.head_dim or head_dim is None or head_dim in options.head_dim
    )


def _refuse_unknown(option: str, given: list | None, known: set) -> None:
    unknown = [str(value) for value in given or () if value not in known]
    if unknown:
        expected = f"one of {', '.join(map(str, sorted(known)))}" if known else "none: it is of attention alone"
        raise InspectError(f"inspect: {option} is {', '.join(unknown)}, expected {expected}")


def _refuse_unwritable(path: Path) -> None:
    """Before the minutes that compiling takes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InspectError(f"inspect: --json {error.filename}: {error.strerror}") from error


def _refuse_where_impossible() -> None:
    if settings.current().triton_interpret:
        raise InspectError("inspect: TRITON_INTERPRET=1 turns kernels into Python; run inspect in a process without it")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise InspectError(f"inspect: needs Triton >= 3.6 (pip install triton): {error}") from error


def compile_spec(spec: KernelSpec, arch: str):
    """(compiled kernel, assembler's log); its `asm` has every stage from "ttir" to "cubin"."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {_path(spec.fn.arg_names, name): [["tt.divisibility", 16]] for name in spec.divisible_by_16}
    source = ASTSource(spec.fn, dict(spec.signature), dict(spec.constexprs), attrs)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cache hit would have no log
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        options |= {"maxnreg": spec.max_registers} if spec.max_registers else {}
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", ARCHS[arch], 32), options=options)
        except Exception as error:
            # Triton's error text leaves out which of the many configurations it was.
            raise InspectError(f"inspect: {spec.kernel} {spec.dtype} {spec.config} on {arch}: {error!r}") from error
    return compiled, log.getvalue()


def _path(arg_names: list[str], name: str) -> tuple[int, ...]:
    """Where an argument is: "out_ptr" -> (3,), the second member of a tuple argument "streams.1" -> (0, 1)."""
    name, *members = name.split(".")
    return (arg_names.index(name), *map(int, members))


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _total(opcodes: Counter, pattern: re.Pattern) -> int:
    return sum(count for name, count in opcodes.items() if pattern.match(name))


def _report(specs: list[KernelSpec], arch: str, jobs: int) -> Iterator[dict]:
    """Rows in the order of specs, compiled by several processes."""
    if jobs <= 1 or len(specs) < 3:
        for spec in specs:
            yield inspect_spec(spec, arch)
        return
    # fork: the workers inherit the specs, whose JIT functions do not pickle.  No GPU context exists to be inherited.
    _inherited[:] = specs
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_inspect_inherited, range(len(specs)), [arch] * len(specs))


_inherited: list[KernelSpec] = []


def _inspect_inherited(index: int, arch: str) -> dict:
    return inspect_spec(_inherited[index], arch)


def _config(row: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in row["config"].items())


def _print_table(rows: list[dict]) -> None:
    columns = [
        "op",
        "kernel",
        "dtype",
        "registers",
        "spill_bytes",
        "shared_bytes",
        "wgmma",
        "mma",
        "tma",
        "vector_bits",
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # rich comes with the model extra; the report does not need it
        for row in rows:
            print(*(row[c] for c in columns), _config(row), sep="\t")
        return
    table = Table(title=f"{rows[0]['arch']}: what the assembler made of the default configurations")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("op", "kernel", "dtype") else "right")
    table.add_column("config", overflow="fold")
    for row in rows:
        style = "red" if problems(row) else None
        table.add_row(*(str(row[c]) for c in columns), _config(row), style=style)
    # Where the output is piped, 80 columns would break every row.
    console = Console()
    Console(width=max(console.width, 160) if not console.is_terminal else None).print(table)


if __name__ == "__main__":
    sys.exit(main())
