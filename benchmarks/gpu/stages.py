"""Runs the GPU stages one after another and writes OUT/<stage>.json after each, so that a cut-off run loses nothing.

A stage's file: {"stage", "ok", "dry_run", "seconds", "environment", "result"}, or "error" in place of "result".
Speed is not measured while correctness is red: the timing stages read OUT/correctness.json first.
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

from benchmarks import environment, limits, run
from benchmarks.gpu import correctness
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
    """Every operator's kernels against the float64 reference."""
    result = correctness.run(context.device, context.seconds, dry_run=context.dry_run)
    return result["green"], result


def attention(context: Context) -> tuple[bool, dict]:
    """Attention against its peers."""
    _require_green(context)
    problems = None
    if context.dry_run:
        from benchmarks import attention as op

        # One of each mask that the table on the GPU has: ragged, and uniform as in the published ones.
        cases = [op.Case("stamps", 3, mask, 2, 2, 32) for mask in ("isolated", "prefix", "bidirectional", "visible")]
        cases += [op.Case("uniform", 2, mask, 2, 2, 32, length=16) for mask in ("full", "causal")]
        problems = [op.from_case(case, context.device, SEED) for case in cases]
    shapes = "quick" if context.dry_run else "full"
    document = run.run(
        "attention", context.device, shapes=shapes, seconds=context.seconds, seed=SEED, problems=problems
    )
    ours = [row for row in document["rows"] if row["impl"].startswith(PREFIX)]
    return bool(ours) and all("checked" in row for row in ours), document


def attention_host(context: Context) -> tuple[bool, dict]:
    """Host time of one attention call, by part, and of lowering a layout.  No kernel is timed: needs no green."""
    from benchmarks import attention_host as host

    return True, host.run(context.device, seed=SEED)


STAGES: dict[str, Callable[[Context], tuple[bool, dict]]] = {
    "probe": probe,
    "correctness": check,
    "attention": attention,
    "attention_host": attention_host,
}
# Of the time left: correctness must not starve the stages after it, nor be cut short by them.
SHARE = {"probe": 0.2, "correctness": 0.7, "attention": 0.95, "attention_host": 1.0}


def run_all(out: Path, names: list[str] | None, seconds: float, *, dry_run: bool = False) -> int:
    """Runs the named stages (default all); returns an exit code: 0 when all are ok."""
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
        record = _run_stage(name, Context(device, out, left * SHARE[name], dry_run))
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


def _require_green(context: Context) -> None:
    path = context.out / "correctness.json"
    if not path.exists():
        raise Refused(f"no {path.name} in the output folder: run the stage correctness first")
    record = json.loads(path.read_text())
    if not record["ok"] or record["dry_run"] != context.dry_run:
        raise Refused("correctness is red (or was a dry run): speed is not measured")
    if record["environment"]["commit"] != environment.commit():
        raise Refused(f"correctness was shown for commit {record['environment']['commit']}, the sources are another")
