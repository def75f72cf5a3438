"""Runs the GPU stages one after another and writes OUT/<stage>.json after each, so that a cut-off run loses nothing.

A stage's file: {"stage", "ok", "dry_run", "seconds", "environment", "result"}, or "error" in place of "result".
The timing stages also write what they have after each case, so that a stage that is ended on the way is not lost.
Speed is not measured while correctness is red: the timing stages read OUT/correctness.json first.  A second run into
the same folder goes on where the first stopped, also with the cases that a stage had no time for; a stage that is named
is run again.  Each GPU has a folder of its own.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import attention_tiles, environment, files, harness, limits, run
from benchmarks.gpu import correctness, dry_problems, processes, profile, subprocesses
from benchmarks.harness import BROKEN, PREFIX
from mmkernels import dispatch, native

SEED = 0


@dataclass(frozen=True)
class Context:
    """What a stage may use.  A dry run has the CPU, other implementations than Triton, and tiny problems.

    anew: cases that were timed in an earlier run into OUT are timed again.
    """

    device: torch.device
    out: Path
    seconds: float
    dry_run: bool
    anew: bool = False

    def path(self, stage: str) -> Path:
        return self.out / f"{stage}.json"


class Refused(RuntimeError):
    """The stage's condition is not met."""


def probe(context: Context) -> tuple[bool, dict]:
    """What this machine is and can do, and what would run on it."""
    dtypes = ["fp32"] if context.dry_run else ["fp32", "bf16", "fp16"]
    seconds = 0.1 if context.dry_run else 1.0
    unbuilt = [name for name in native.MODULES if native.path_of(name) is None and not native.needless(name)]
    if unbuilt:
        print(
            f"  {', '.join(unbuilt)} not built: torch or numpy stand in.  First: python -m mmkernels.build", flush=True
        )
    return True, {
        "limits": limits.measure(context.device, dtypes, seconds),
        "dispatch": dispatch.explain().splitlines(),
        "not_built": unbuilt,
    }


def check(context: Context) -> tuple[bool, dict]:
    """Every operator's kernels against the float64 reference.  What an earlier run into OUT showed is not repeated."""
    earlier = _earlier(context, "correctness").get("result", {})
    passed = [c for c in earlier.get("checks", ()) if c["ok"]]
    result = correctness.run(context.device, context.seconds, dry_run=context.dry_run, passed=passed)
    return result["green"], result


def sanitizer(context: Context) -> tuple[bool, dict]:
    """Small cases of every kernel under compute-sanitizer; a dry run has the cases without the sanitizer."""
    return subprocesses.sanitized(context.device, context.seconds, dry_run=context.dry_run)


def attention_more(context: Context) -> tuple[bool, dict]:
    """What the stage attention leaves out: short samples in several tiles, other widths, fp32, both directions in one
    of batches of one length.  And where the time of a call on short samples goes."""
    if context.dry_run:
        problems = dry_problems.of("attention_more")
    else:
        rest = run.load("attention").more_problems(context.device, SEED)
        problems = [*attention_tiles.problems(context.device, SEED), *rest]
    ok, document = _timed(context, "attention_more", op="attention", problems=problems)
    return ok, document | {"profile": [_profiled(problems[0], context.device)]}


def tune(context: Context) -> tuple[bool, dict]:
    """Configurations of the attention kernels; OUT/tuned.json is for mmkernels/ops/attention."""
    _require_green(context, "attention")
    return subprocesses.tuned(context.out / "tuned.json", context.seconds, dry_run=context.dry_run)


def train_step(context: Context) -> tuple[bool, dict]:
    """Pretraining steps of `base` in each layout, at the sizes of GPU_STAGE, and where the time of ours goes."""
    problems = _step_problems(context, "GPU_STAGE")
    ok, document = _timed(context, "train_step", green=False, problems=problems)
    return ok, document | {"profile": [_profiled(problem, context.device) for problem in problems[:PROFILED]]}


def train_compiled(context: Context) -> tuple[bool, dict]:
    """The same steps with compiled blocks, beside those without.  Compiling may take a minute: a stage of its own."""
    return _timed(
        context, "train_compiled", op="train_step", green=False, problems=_step_problems(context, "GPU_COMPILED")
    )


def _step_problems(context: Context, cases: str) -> list:
    """Those of a step's cases of that name; refused where a kernel of it is not shown to be right."""
    from benchmarks import train_step_cases

    for op in ("attention", "modality_embed", "packing"):
        _require_green(context, op)
    if context.dry_run:
        return dry_problems.of("train_step")
    step = run.load("train_step")
    return [step.deferred(case, context.device, SEED) for case in getattr(train_step_cases, cases)]


def _profiled(problem, device: torch.device) -> dict:
    """Of a call of ours; an error costs no timed row."""
    try:
        found = _profile(harness.built(problem), device)
    except Exception as error:
        traceback.print_exc()
        found = {"error": harness.in_a_line(error)}
    run.free_memory(device)
    return {"case": problem.case} | found


def _profile(problem, device: torch.device) -> dict:
    ours = next(i for i in problem.implementations() if i.name.startswith(PREFIX))
    if problem.op == "train_step":
        return profile.of(ours.forward, device) | {"steps": len(ours.forward.batches)}
    return profile.of(lambda: torch.autograd.grad(ours.forward(), ours.leaves, ours.grad_output), device)


def attention_host(context: Context) -> tuple[bool, dict]:
    """Host time of one attention call, by part, and of lowering a layout.  No kernel is timed: needs no green."""
    from benchmarks import attention_host as host

    return True, host.run(context.device, seed=SEED)


@dataclass(frozen=True)
class Stage:
    """run(context) -> (ok, result); share: of what time is left for it and those after it, beside theirs."""

    run: Callable[[Context], tuple[bool, dict]]
    share: int


# In order of worth.  The tuner is last: one case is a hundred configurations to compile, which takes minutes.
STAGES = {
    "probe": Stage(probe, 10),
    "correctness": Stage(check, 240),
    "sanitizer": Stage(sanitizer, 40),
    "attention": Stage(lambda context: _timed(context, "attention"), 170),
    "modality_embed": Stage(lambda context: _timed(context, "modality_embed"), 30),
    "packing": Stage(lambda context: _timed(context, "packing"), 40),
    "train_step": Stage(train_step, 110),
    "attention_host": Stage(attention_host, 5),
    "attention_more": Stage(attention_more, 60),
    "train_compiled": Stage(train_compiled, 70),
    "tune": Stage(tune, 20),
}
PROFILED = 2  # cases of train_step: the one that waits for the host, and the one that keeps the GPU busy
GRACE = 60.0  # seconds beyond its share after which a stage is ended: it may compile, or be slow to start, but not hang
LEAST = 3.0  # seconds left, below which no stage is begun


def run_all(
    out: Path, names: list[str] | None, seconds: float, *, dry_run: bool = False, apart: bool | None = None
) -> int:
    """Runs the named stages, or those that are not yet ok in OUT; returns an exit code: 0 when all are ok.

    apart: each in a process of its own (None: on a GPU), so that one that hangs is ended, and one that breaks the
    device does so for itself alone.
    """
    unknown = set(names or ()) - set(STAGES)
    if unknown:
        print(f"gpu: unknown stage {', '.join(sorted(unknown))}, expected {', '.join(STAGES)}", file=sys.stderr)
        return 2
    if not dry_run and not torch.cuda.is_available():
        print("gpu: torch sees no GPU; --dry-run runs every stage on CPU stand-ins", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry_run else "cuda")
    here = "a dry run" if dry_run else torch.cuda.get_device_name(device)
    others = _gpus(out) - {here}
    if others:
        print(f"gpu: {out} has results of {', '.join(sorted(others))}: {here} needs another --out", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + seconds
    todo, failed = [], []
    for name in [n for n in STAGES if not names or n in names]:
        earlier = {} if names else _earlier(Context(device, out, 0.0, dry_run), name)
        if earlier.get("ok") and not _not_reached(earlier):
            print(f"gpu: {name}: ok in {out} already, for these sources and versions", flush=True)
        else:
            todo.append(name)
    for index, name in enumerate(todo):
        left = deadline - time.perf_counter()
        if left < LEAST:
            print(f"gpu: no time left for {', '.join(todo[index:])}", flush=True)
            failed += todo[index:]
            break
        share = left * STAGES[name].share / sum(STAGES[n].share for n in todo[index:])
        context = Context(device, out, share, dry_run, anew=bool(names))
        if device.type == "cuda" if apart is None else apart:
            record = processes.run(_run_stage, (name, context), context.path(name), share + GRACE)
        else:
            record = _run_stage(name, context)
        print(f"gpu: {name}: {'ok' if record['ok'] else 'NOT OK'} in {record['seconds']:.0f} s", flush=True)
        failed += [] if record["ok"] else [name]
    return 1 if failed else 0


def _run_stage(name: str, context: Context) -> dict:
    """The stage's record, which is also in its file."""
    print(f"gpu: {name}: at most about {context.seconds:.0f} s", flush=True)
    start, refused = time.perf_counter(), False
    facts = _facts(name, context) | {"ok": False}
    try:
        facts["ok"], facts["result"] = STAGES[name].run(context)
    except Refused as error:
        refused, facts["error"] = True, str(error)
        print(f"gpu: {name}: {error}", file=sys.stderr)
    except Exception:  # the other stages must still get their turn; the file keeps the whole story
        facts["error"] = traceback.format_exc()
        print(facts["error"], file=sys.stderr)
    record = facts | {"seconds": time.perf_counter() - start}
    if not refused:  # where correctness is red, rows from before are not to be trusted either
        record = _fuller(record, context)
    files.write(record, context.path(name))
    return record


def _fuller(record: dict, context: Context) -> dict:
    """The record; where a run that was cut off left more timed rows, or it has no result, those in the file, still not
    ok.

    Not where it shows a kernel of ours to be wrong: that must be seen.
    """
    stage = record["stage"]
    kept = _earlier(context, stage)
    has, had = (_timed_rows(each.get("result", {})) for each in (record, kept))
    wrong = any(
        row["impl"].startswith(PREFIX) and row.get("skipped", "").startswith("wrong")
        for row in record.get("result", {}).get("rows", ())
    )
    if wrong or had <= has or ("result" in record and not kept.get("cut_off")):
        return record
    why = f"kept the {had} timed rows of an earlier run, as the one that ended later has {has}"
    print(f"  {stage}: {why}", flush=True)
    return kept | {"ok": False, "error": record.get("error", why), "seconds": record["seconds"]}


def _facts(name: str, context: Context) -> dict:
    environ = environment.describe(context.device, SEED)
    return {"stage": name, "dry_run": context.dry_run, "environment": environ}


def _timed(
    context: Context, stage: str, *, op: str = "", green: bool = True, problems: list | None = None
) -> tuple[bool, dict]:
    """An operator (its stage has its name, if no op is given) in the quick cases, against who may be the fastest: with
    every peer (`benchmarks OP --shapes full`) it takes half an hour, most of it to compile them.  Ok where ours was
    timed and never found wrong.

    The file has the rows so far after each case, marked as cut off, in case the machine goes away meanwhile.  Cases
    that an earlier run has done are not timed again.
    """
    op = op or stage
    if green:
        _require_green(context, op)
    if problems is None and context.dry_run:
        problems = dry_problems.of(op)
    facts, start = _facts(stage, context), time.perf_counter()
    earlier = _earlier(context, stage)
    before = _timed_rows(earlier.get("result", {}))
    kept: dict = {"limits": {}, "rows": []}
    if not context.anew and (done := _done(earlier)):
        known, everything = earlier["result"], problems or run.load(op).problems("quick", context.device, SEED)
        problems = [problem for problem in everything if (problem.op, problem.case, problem.dtype) not in done]
        kept = known | {"rows": [row for row in known["rows"] if _case(row) in done]}

    def whole(document: dict) -> dict:
        return document | {"limits": kept["limits"] | document["limits"], "rows": kept["rows"] + document["rows"]}

    def save(document: dict) -> None:
        document = whole(document)
        if _timed_rows(document) < before:
            return  # what an earlier run had when it was cut off stays until this one has more
        cut_off = {"ok": False, "cut_off": True, "error": "cut off while it ran", "result": document}
        seconds = time.perf_counter() - start
        files.write(facts | cut_off | {"seconds": seconds}, context.path(stage))
        print(f"  {stage}: {seconds:.0f} s so far", flush=True)

    if kept["rows"]:
        save(kept | {"rows": []})  # as cut off: where this run is ended in its first case, they are not lost
    document = run.run(
        op, context.device, shapes="quick", seconds=context.seconds, seed=SEED, problems=problems, save=save
    )
    document = whole(document)
    ours = [row for row in document["rows"] if row["impl"].startswith(PREFIX) or row["impl"] == "all"]
    wrong = [row for row in ours if row.get("skipped", "").startswith(BROKEN)]
    return any("checked" in row for row in ours) and not wrong, document


def _not_reached(record: dict) -> set[tuple]:
    """The cases for which a stage that times had no time."""
    rows = record.get("result", {}).get("rows", ())
    return {_case(row) for row in rows if row.get("skipped") == run.NOT_REACHED}


def _done(record: dict) -> set[tuple]:
    """The other cases that it has, however it ended; none where a kernel of ours was wrong or failed."""
    rows = record.get("result", {}).get("rows", ())
    broken = any(row["impl"].startswith(PREFIX) and row.get("skipped", "").startswith(BROKEN) for row in rows)
    return set() if broken else {_case(row) for row in rows} - _not_reached(record)


def _case(row: dict) -> tuple:
    return row["op"], row["case"], row["dtype"]


def _timed_rows(document: dict) -> int:
    return sum("checked" in row for row in document.get("rows", ()))


def _gpus(out: Path) -> set[str]:
    """Whose results are in OUT.  Those of another GPU would count as shown here, or be written over."""
    records = (files.read(out / f"{name}.json") for name in STAGES)
    return {record["environment"]["gpu"]["name"] for record in records if "gpu" in record.get("environment", {})}


def _earlier(context: Context, name: str) -> dict:
    """The stage's record in OUT; empty unless it is of these sources, these compilers and this kind of run."""
    record = files.read(context.path(name))
    same = record.get("dry_run") == context.dry_run and not _changed(record, context.device)
    return record if same else {}


def _changed(record: dict, device: torch.device) -> list[str]:
    """What is not as it was then, of what kernels depend on besides the GPU."""
    then, now = record.get("environment", {}), environment.describe(device, SEED)
    return [name for name in ("sources", "torch", "triton") if then.get(name) != now[name]]


def _require_green(context: Context, op: str) -> None:
    path = context.path("correctness")
    if not path.exists():
        raise Refused(f"no {path.name} in the output folder: run the stage correctness first")
    record = files.read(path)
    if record.get("dry_run") != context.dry_run or not record.get("result", {}).get("green_ops", {}).get(op):
        raise Refused(f"correctness of {op} is red (or was a dry run): speed is not measured")
    if changed := _changed(record, context.device):
        commit = record["environment"]["commit"]
        raise Refused(f"correctness was shown for commit {commit}, with other {', '.join(changed)} than now")
