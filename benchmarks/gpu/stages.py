"""Runs the GPU stages one after another and writes OUT/<stage>.json after each, so that a cut-off run loses nothing.

A stage's file: {"stage", "ok", "dry_run", "seconds", "environment", "result"}, or "error" in place of "result".
Speed is not measured while correctness is red: the timing stages read OUT/correctness.json first.  A second run into
the same folder goes on where the first stopped; a stage that is named is run again.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import environment, harness, limits, run
from benchmarks.gpu import correctness, dry_problems, profile, subprocesses
from benchmarks.harness import PREFIX
from mmkernels import dispatch

SEED = 0


@dataclass(frozen=True)
class Context:
    """What a stage may use.  A dry run has the CPU, other implementations than Triton, and tiny problems."""

    device: torch.device
    out: Path
    seconds: float
    dry_run: bool


class Refused(RuntimeError):
    """The stage's condition is not met."""


def probe(context: Context) -> tuple[bool, dict]:
    """What this machine is and can do, and what would run on it."""
    dtypes = ["fp32"] if context.dry_run else ["fp32", "bf16", "fp16"]
    seconds = 0.1 if context.dry_run else 1.0
    return True, {
        "limits": limits.measure(context.device, dtypes, seconds),
        "dispatch": dispatch.explain().splitlines(),
    }


def check(context: Context) -> tuple[bool, dict]:
    """Every operator's kernels against the float64 reference.  What an earlier run into OUT showed is not repeated."""
    earlier = _earlier(context, "correctness")
    passed = [c for c in (earlier or {}).get("result", {}).get("checks", ()) if c["ok"]]
    result = correctness.run(context.device, context.seconds, dry_run=context.dry_run, passed=passed)
    return result["green"], result


def sanitizer(context: Context) -> tuple[bool, dict]:
    """Small cases of every kernel under compute-sanitizer; a dry run has the cases without the sanitizer."""
    return subprocesses.sanitized(context.device, context.seconds, dry_run=context.dry_run)


def attention(context: Context) -> tuple[bool, dict]:
    return _timed(context, "attention")


def modality_embed(context: Context) -> tuple[bool, dict]:
    return _timed(context, "modality_embed")


def packing(context: Context) -> tuple[bool, dict]:
    return _timed(context, "packing")


def tune(context: Context) -> tuple[bool, dict]:
    """Configurations of the attention kernels; OUT/tuned.json is for mmkernels/ops/attention."""
    _require_green(context, "attention")
    return subprocesses.tuned(context.out / "tuned.json", context.seconds, dry_run=context.dry_run)


def train_step(context: Context) -> tuple[bool, dict]:
    """A pretraining step in each layout, and where the time of ours goes."""
    if "train_step" not in run.OPS:
        return True, {"skipped": "benchmarks/train_step.py is not there"}
    for op in ("attention", "modality_embed", "packing"):
        _require_green(context, op)
    ok, document = _timed(context, "train_step", green=False)
    problem = next(iter(dry_problems.of("train_step") if context.dry_run else _problems(context, "train_step")))
    call = next(i.forward for i in harness.built(problem).implementations() if i.name.startswith(PREFIX))
    return ok, document | {"profile": {"case": problem.case, "top": profile.hot_spots(call, context.device)}}


def attention_host(context: Context) -> tuple[bool, dict]:
    """Host time of one attention call, by part, and of lowering a layout.  No kernel is timed: needs no green."""
    from benchmarks import attention_host as host

    return True, host.run(context.device, seed=SEED)


STAGES: dict[str, Callable[[Context], tuple[bool, dict]]] = {
    "probe": probe,
    "correctness": check,
    "sanitizer": sanitizer,
    "attention": attention,
    "modality_embed": modality_embed,
    "packing": packing,
    "tune": tune,
    "train_step": train_step,
    "attention_host": attention_host,
}
# Of the time that is left: no stage may starve those after it.
SHARE = {
    "probe": 0.2,
    "correctness": 0.5,
    "sanitizer": 0.15,
    "attention": 0.4,
    "modality_embed": 0.25,
    "packing": 0.25,
    "tune": 0.4,
    "train_step": 0.85,
    "attention_host": 1.0,
}


def run_all(out: Path, names: list[str] | None, seconds: float, *, dry_run: bool = False) -> int:
    """Runs the named stages, or those that are not yet ok in OUT; returns an exit code: 0 when all are ok."""
    unknown = set(names or ()) - set(STAGES)
    if unknown:
        print(f"gpu: unknown stage {', '.join(sorted(unknown))}, expected {', '.join(STAGES)}", file=sys.stderr)
        return 2
    if not dry_run and not torch.cuda.is_available():
        print("gpu: torch sees no GPU; --dry-run runs every stage on CPU stand-ins", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry_run else "cuda")
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + seconds
    failed = []
    for name in [n for n in STAGES if not names or n in names]:
        left = max(deadline - time.perf_counter(), 1.0)
        context = Context(device, out, left * SHARE[name], dry_run)
        if not names and (_earlier(context, name) or {}).get("ok"):
            print(f"gpu: {name}: ok in {out} already, for this commit", flush=True)
            continue
        record = _run_stage(name, context)
        run.write(record, out / f"{name}.json")
        print(f"gpu: {name}: {'ok' if record['ok'] else 'NOT OK'} in {record['seconds']:.0f} s", flush=True)
        failed += [] if record["ok"] else [name]
    return 1 if failed else 0


def _run_stage(name: str, context: Context) -> dict:
    print(f"gpu: {name}: at most about {context.seconds:.0f} s", flush=True)
    start = time.perf_counter()
    facts = {"stage": name, "ok": False, "dry_run": context.dry_run}
    facts["environment"] = environment.describe(context.device, SEED)
    try:
        facts["ok"], facts["result"] = STAGES[name](context)
    except Refused as error:
        facts["error"] = str(error)
        print(f"gpu: {name}: {error}", file=sys.stderr)
    except Exception:  # the other stages must still get their turn; the file keeps the whole story
        facts["error"] = traceback.format_exc()
        print(facts["error"], file=sys.stderr)
    return facts | {"seconds": time.perf_counter() - start}


def _timed(context: Context, op: str, *, green: bool = True) -> tuple[bool, dict]:
    """An operator against its peers.  Ok where ours was timed and never found wrong."""
    if green:
        _require_green(context, op)
    problems = dry_problems.of(op) if context.dry_run else None
    shapes = "quick" if context.dry_run else "full"
    document = run.run(op, context.device, shapes=shapes, seconds=context.seconds, seed=SEED, problems=problems)
    ours = [row for row in document["rows"] if row["impl"].startswith(PREFIX)]
    wrong = [row for row in ours if row.get("skipped", "").startswith(("wrong", "failed"))]
    return any("checked" in row for row in ours) and not wrong, document


def _problems(context: Context, op: str):
    return run.load(op).problems("quick", context.device, SEED)


def _earlier(context: Context, name: str) -> dict | None:
    """The stage's record in OUT, where it is of these sources, this kind of run and this device."""
    path = context.out / f"{name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    same = record["dry_run"] == context.dry_run and record["environment"]["commit"] == environment.commit()
    return record if same else None


def _require_green(context: Context, op: str) -> None:
    path = context.out / "correctness.json"
    if not path.exists():
        raise Refused(f"no {path.name} in the output folder: run the stage correctness first")
    record = json.loads(path.read_text())
    if record["dry_run"] != context.dry_run or not record.get("result", {}).get("green_ops", {}).get(op):
        raise Refused(f"correctness of {op} is red (or was a dry run): speed is not measured")
    if record["environment"]["commit"] != environment.commit():
        raise Refused(f"correctness was shown for commit {record['environment']['commit']}, the sources are another")
