"""Tunes the Triton attention kernels on the present GPU and rewrites mmkernels/ops/attention/tuned.json.

    python -m benchmarks tune attention [--out PATH] [--json PATH] [--budget-seconds N] [--head-dim 64 --head-dim 128]
                                        [--case "stamps 256 full"] [--kernel fwd]
    TRITON_INTERPRET=1 python -m benchmarks tune attention --dry-run --out PATH    the same walk, in the interpreter

For each head width, dtype, mask class and length profile, each kernel's tile, warps, stages, loads and late products
are varied one after another from its default.  A candidate that fails, spills or is wrong is left out; one that is
faster by MIN_GAIN is written with where and when it was measured.  Other entries of the file stay.  The table goes by
architecture: where an entry takes the place of another, it says which GPU had found that one, and when.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import attention, environment, files, harness
from benchmarks.attention_cases import Case
from mmkernels import dispatch, settings
from mmkernels.ops.attention import configs, tuned
from mmkernels.ops.attention.configs import Config

SEED = 0
MIN_GAIN = 1.02  # a smaller one is within the spread of a busy clock
SECONDS_PER_AXIS = 1.0
DIRECTION = {"fwd": "fwd", "fused": "bwd", "dkdv": "bwd", "dq": "bwd"}

# What is varied, in this order, each from the best of those before.  A limit of registers is right for one tile: it is
# lifted for others.
AXES: tuple[tuple[dict, ...], ...] = (
    tuple({"rows": r, "cols": c, "registers": 0} for r, c in itertools.product((32, 64, 128, 256), (32, 64, 128))),
    tuple({"warps": n, "registers": 0} for n in (4, 8)),
    # Not one stage: Triton 3.6 then gives wrong gradients of 16-bit tiles of 32 queries (fused, H100), or faults.
    tuple({"stages": n} for n in (2, 3, 4)),
    tuple({"tma": on} for on in (False, True)),
    ({"late": False, "registers": 0}, {"late": True, "registers": 0}, {"late": True, "registers": 128}),
)
DRY_AXES: tuple[tuple[dict, ...], ...] = (({"rows": 16, "cols": 16}, {"rows": 32, "cols": 16}),)

WIDTHS = (64, 128, 32, 256)
PROFILES = (("stamps", 256, None), ("native", 64, None), ("uniform", 4, 4096))  # short, medium, long
CASES = tuple(
    Case(workload, samples, mask, 768 // width, 768 // width, width, "bf16", length)
    for width in WIDTHS
    for workload, samples, length in PROFILES
    for mask in ("full", "causal", "visible", "window")
) + tuple(Case("native", 64, "full", 12, 12, width, "fp32") for width in (64, 128))
DRY_CASES = (Case("uniform", 2, "causal", 1, 1, 16, "fp32", 12),)


@dataclass
class Sweep:
    """Where candidates run, and what has been found.  axes: what is varied; seconds: of each axis.

    spilled  registers spilled by (kernel, dtype, width, mask has bits, configuration): a kernel is compiled once for
             several cases, so what was seen then is kept
    """

    device: torch.device
    arch: str
    axes: tuple[tuple[dict, ...], ...]
    seconds: float
    provenance: dict
    before: dict[tuple, dict] = field(default_factory=dict)
    entries: list[dict] = field(default_factory=list)
    tried: list[dict] = field(default_factory=list)
    spilled: dict[tuple, int] = field(default_factory=dict)
    deadline: float = math.inf  # of time.perf_counter; a kernel whose candidates were not all tried keeps what it has


def run(
    out: Path | None,
    seconds: float,
    widths: list[int] | None = None,
    *,
    named: str = "",
    kernels: list[str] | None = None,
    tried: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Returns an exit code: 2 where there is nothing to tune on.

    out: None is the table that the package reads.  named: of the cases those with it in their name.  tried: file
    for what every candidate took.
    """
    every = DRY_CASES if dry_run else CASES
    unknown = set(widths or ()) - {case.width for case in every}
    of_width = [case for case in every if not widths or case.width in widths]
    cases = [case for case in of_width if named in attention.name_of(case, SEED)]
    reason = _refusal(dry_run, out, unknown)
    if not cases and not unknown:
        names = "; ".join(attention.name_of(case, SEED) for case in of_width)
        which = f" of --head-dim {', '.join(map(str, widths))}" if widths else ""
        reason = f"no case{which} has {named!r} in its name; they are: {names}"
    if reason:
        print(f"tune: {reason}", file=sys.stderr)
        return 2
    out = out or tuned.tuned_path()
    for path in filter(None, (out, tried)):
        files.refuse_unwritable(path)
    try:
        # Before the first kernel's minutes: what is there must be a table.
        before = [*merged(tuned.tuned_path(), []), *merged(out, [])]
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    sweep = sweep_of(torch.device("cpu" if dry_run else "cuda"), dry_run)
    sweep.before = {_key(entry): entry["provenance"] for entry in before}
    walk(sweep, cases, out, seconds, tried, tuple(kernels or configs.KERNELS))
    return 0


def sweep_of(device: torch.device, dry_run: bool) -> Sweep:
    facts = environment.describe(device, SEED)
    provenance = {
        "device": facts["gpu"]["name"] if "gpu" in facts else f"{facts['cpu']} (interpreter: no figure counts)",
        "date": facts["date"][:10],
        "commit": facts["commit"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        "command": "python -m benchmarks tune attention" + (" --dry-run" if dry_run else ""),
    }
    arch = "sm_80" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return Sweep(device, arch, DRY_AXES if dry_run else AXES, 0.01 if dry_run else SECONDS_PER_AXIS, provenance)


def walk(
    sweep: Sweep, cases: list[Case], out: Path, seconds: float, tried: Path | None, kernels: tuple[str, ...]
) -> None:
    """Tunes case after case until the time is spent, and writes the files after each kernel."""
    sweep.deadline = time.perf_counter() + seconds
    for index, case in enumerate(cases):
        if time.perf_counter() > sweep.deadline:
            print(f"tune: out of time, {len(cases) - index} of {len(cases)} cases keep what they had")
            return
        problem = attention.from_case(case, sweep.device, SEED)
        print(f"tune: {problem.case} {problem.dtype}", flush=True)
        for kernel in kernels:
            tune_kernel(sweep, problem, case, kernel)
            merge(out, sweep.entries)
            if tried:
                files.write({"provenance": sweep.provenance, "tried": sweep.tried}, tried)


def tune_kernel(sweep: Sweep, problem, case: Case, kernel: str) -> None:
    """Appends the entry of the fastest configuration, where that is not the default."""
    mask, lengths = tuned.classify(problem.plan)
    found = configs.select(sweep.arch, case.dtype, case.width, mask=mask, lengths=lengths)
    # Where no fused kernel is the default: its shape from dkdv.
    start = (getattr(found, kernel) or (replace(found.dkdv[0], late=False),))[0]
    default = candidate(sweep, problem, kernel, None)
    if isinstance(default, str):
        print(f"  {kernel}: the default does not run: {default}")
        return
    best, best_ms, default_ms = None, float("inf"), float("inf")
    for axis in sweep.axes:
        calls = {None: default}
        current = best or start
        varied = (replace(current, **change) for change in axis)
        for option in dict.fromkeys((current, *(c for c in varied if _is_for(kernel, case.width, c)))):
            if time.perf_counter() > sweep.deadline:  # each compiles, which takes seconds
                print(f"  {kernel}: out of time")
                return
            call = candidate(sweep, problem, kernel, option)
            if isinstance(call, str):
                sweep.tried.append(_tried(problem, kernel, option) | {"skipped": call})
                print(f"  {kernel} {shown(option)}: skipped: {call}")
            else:
                calls[option] = call
        medians = _medians(calls, sweep)
        default_ms = medians.pop(None)
        for option, ms in medians.items():
            sweep.tried.append(_tried(problem, kernel, option) | {"ms": ms, "default_ms": default_ms})
        if medians:
            best = min(medians, key=medians.get)
            best_ms = medians[best]
    if best is None or default_ms < MIN_GAIN * best_ms:
        print(f"  {kernel}: the default stays, {default_ms:.4g} ms")
        return
    print(f"  {kernel}: {shown(best)} {best_ms:.4g} ms, default {default_ms:.4g} ms")
    keys = {
        "arch": sweep.arch,
        "dtype": case.dtype,
        "head_dim": configs.bucket(case.width),
        "extras": False,
        "mask": mask,
        "lengths": lengths,
        "kernel": kernel,
    }
    provenance = sweep.provenance | {"workload": problem.case}
    provenance |= {"ms": round(best_ms, 5), "default_ms": round(default_ms, 5)}
    if earlier := sweep.before.get(_key(keys)):
        provenance["in_place_of"] = f"{earlier['device']}, {earlier.get('date', 'no date')}"
        print(f"  {kernel}: in place of what was found on {provenance['in_place_of']}")
    sweep.entries.append(keys | {"config": _numbers(best), "provenance": provenance})


def _is_for(kernel: str, width: int, config: Config) -> bool:
    """128 registers: two programs of 8 warps to an SM, which a forward tile of D 64 can do with."""
    limited = kernel == "fwd" and configs.bucket(width) == 64 and config.warps == 8
    return not (config.late and kernel in configs.NEVER_LATE) and (not config.registers or limited)


def candidate(sweep: Sweep, problem, kernel: str, config: Config | None) -> Callable | str:
    """The call to time, right and without spills; or why it is left out.  config None: what `auto` takes today."""
    fresh = problem.with_new_layout()
    leaves = (fresh.q, fresh.k, fresh.v)
    options = {"layout": fresh.layout, "mask": fresh.mask, "impl": "triton"}
    if kernel in ("dq", "dkdv"):
        options["deterministic"] = True  # what these two kernels are for
    before = _spills()

    def forward():
        return attention.attention(*leaves, **options)

    try:
        with configs.override(**({} if config is None else {kernel: config})):
            if DIRECTION[kernel] == "fwd":
                results = [no_grad(forward)]
            else:
                output = forward()  # the schedule of backward is made here, and stays with the output
                results = list(torch.autograd.grad(output, leaves, fresh.grad_output, retain_graph=True))
    except Exception as error:  # out of registers or shared memory, no such layout: a candidate may fail in many ways
        return harness.in_a_line(error)[:120]
    key = (kernel, problem.dtype, problem.q.shape[2], problem.plan.has_visible, config)
    after = _spills()
    new = max((after[loaded] for loaded in after.keys() - before.keys()), default=0)
    sweep.spilled[key] = max(new, sweep.spilled.get(key, 0))
    if config is not None and sweep.spilled[key]:
        return f"spills {sweep.spilled[key]} registers"
    wrong = problem.check(DIRECTION[kernel], results)
    if wrong:
        return wrong
    if DIRECTION[kernel] == "fwd":
        return lambda: no_grad(forward)
    return lambda: torch.autograd.grad(output, leaves, fresh.grad_output, retain_graph=True)


def merge(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tuned.write(merged(path, entries), path)


def merged(path: Path, entries: list[dict]) -> list[dict]:
    """The file's entries, with these in place of those of equal keys.  Raises ValueError where it is no table."""
    ours = {_key(entry): entry for entry in entries}
    kept = [entry for entry in (tuned.read(path) if path.exists() else []) if _key(entry) not in ours]
    return [*kept, *ours.values()]


def _key(entry: dict) -> tuple:
    return tuple(entry[name] for name in tuned.KEYS)


def no_grad(call: Callable):
    with torch.no_grad():
        return call()


def _medians(calls: dict[Config | None, Callable], sweep: Sweep) -> dict[Config | None, float]:
    samples = harness.time_calls(calls, sweep.seconds, sweep.device)
    return {option: statistics.median(ms) for option, ms in samples.items()}


def _spills() -> dict[tuple, int]:
    """Spilled registers of every attention kernel that is loaded; none in the interpreter."""
    from mmkernels.ops.attention.kernel_specs import kernel_specs

    found = {}
    for fn in {id(spec.fn): spec.fn for spec in kernel_specs("sm_90")}.values():
        for device, caches in getattr(fn, "device_caches", {}).items():
            for key, kernel in caches[0].items():
                found[id(fn), device, key] = getattr(kernel, "n_spills", None) or 0
    return found


def _refusal(dry_run: bool, out: Path | None, unknown: set[int]) -> str | None:
    if unknown:
        known = sorted({case.width for case in (DRY_CASES if dry_run else CASES)})
        return f"--head-dim is {', '.join(map(str, unknown))}, expected one of {', '.join(map(str, known))}"
    if dry_run:
        if not settings.current().triton_interpret:
            return "--dry-run walks the sweep in Triton's interpreter: set TRITON_INTERPRET=1"
        if out is None:
            return "--dry-run needs --out: what it times must not become the table"
        return dispatch.missing("attention", "triton", device=torch.device("cpu"), dtype=torch.float32)
    if not torch.cuda.is_available():
        return (
            "torch sees no GPU; without one the table is the built-in one of mmkernels/ops/attention/configs.py, "
            "chosen from the inspector's report (python -m mmkernels.inspect --op attention); --dry-run walks the sweep"
        )
    return dispatch.missing("attention", "triton", device=torch.device("cuda"), dtype=torch.bfloat16)


def _numbers(config: Config) -> dict:
    numbers = {name: getattr(config, name) for name in ("rows", "cols", "warps", "stages")}
    return numbers | {name: set_to for name in ("tma", "late", "registers") if (set_to := getattr(config, name))}


def shown(config: Config) -> str:
    tile = f"{config.rows}x{config.cols} warps {config.warps} stages {config.stages}" + (" tma" if config.tma else "")
    return tile + "".join(f" {name} {n}" for name in ("late", "registers") if (n := getattr(config, name)))


def _tried(problem, kernel: str, config: Config) -> dict:
    return {"case": problem.case, "dtype": problem.dtype, "kernel": kernel, "config": _numbers(config)}
