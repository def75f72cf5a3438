"""Compiles ahead, without a GPU, what the stages of `python -m benchmarks gpu` launch, but for the tuner.

    TRITON_CACHE_DIR=DIR TRITON_STORE_BINARY_ONLY=1 python -m benchmarks.gpu.ahead [--arch sm_90] [--jobs 2]

Where GPU time is short: compiling takes minutes of several cores, and none of the GPU's.  The folder serves a machine
with the same build of Triton, under the same path: both are part of what is looked up.  What peers compile is made
there all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import attention, attention_host, attention_tiles, modality_embed, train_step, train_step_cases, tune
from benchmarks.gpu import absent, attention_checks, correctness, launchers, parallel, small_cases
from benchmarks.harness import PREFIX
from mmkernels.ops.attention.configs import Config
from mmkernels.ops.modality_embed.api import modality_embed as embed
from mmmodel import configs

CPU = torch.device("cpu")  # whose tensors stand in
FORMS = ("full", "plain")
NOTHING_COMPUTED = (AssertionError, FloatingPointError)  # of who looks at the results


class Done(Exception):
    """The kernels of a check were asked for; what they are compared with need not be computed."""


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, call): of one name all that shares kernels."""
    scope = correctness.Scope()
    yield from ((name, check) for name, check in _checks(scope) if "isolation" not in name)
    small = _checks(small_cases.SCOPE)  # other tiles than above: samples are shorter
    yield from ((f"small {name}", check) for name, check in small if small_cases.is_kept(name))
    for width in scope.widths:
        for dtype in scope.dtypes:
            for form in FORMS:
                build = functools.partial(correctness._embed, form, width, dtype, CPU)
                yield f"modality_embed {dtype} E{width} {form}: both", lambda b=build: _embed(b())
    for workload, samples, width, (dtype,) in modality_embed._cases("quick", "cuda"):
        for form in FORMS:
            build = functools.partial(modality_embed.build, form, workload, samples, width, dtype, CPU, 0)
            yield f"modality_embed {workload} {form}: both", lambda b=build: _embed(b())
    for case in (*attention.cases("quick", "cuda"), *attention.CUDA_MORE):
        yield f"{case}: both", lambda c=case: _attend(attention.from_case(c, CPU, 0))
    for case in attention_tiles.CASES:
        for tile in attention_tiles.TILES[case.width]:
            yield f"{case} {tune.shown(tile)}: forward", lambda c=case, t=tile: _forward(c, t)
    host = dataclasses.replace(attention_host.CASE, dtype="bf16")
    yield f"host {host}: both", lambda: _attend(attention.from_case(host, CPU, 0))
    yield "train_step: both", _step


def _checks(scope: correctness.Scope) -> Iterator[tuple[str, Callable[[], None]]]:
    return attention_checks.all_checks(CPU, scope.dtypes, scope.head_dims, scope.longest, 1, "triton")


def _embed(problem) -> None:
    def call():
        return embed(problem.streams, problem.layout, **problem.tensors, impl="triton")

    torch.autograd.grad(call(), problem.leaves, problem.grad_output)
    with torch.no_grad():
        call()


def _attend(problem) -> None:
    leaves = problem.q, problem.k, problem.v
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = attention.attention(*leaves, layout=problem.layout, mask=problem.mask, impl="triton")
    torch.autograd.grad(out, leaves, problem.grad_output)


def _forward(case: attention.Case, tile: Config) -> None:
    with torch.no_grad():
        attention_tiles.forward(attention.from_case(case, CPU, 0), tile, "triton")()


def _step() -> None:
    """The batches that are timed and the one that is checked, by a model of one block: the others launch the same.

    In bf16 by autocast for a CPU, which leaves norms in bf16 where CUDA's takes them to fp32.
    """
    case = train_step_cases.GPU_STAGE[0]
    config = configs.preset(case.preset)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=1, impl="triton"))
    problem = train_step.build(case, CPU, 0, config)
    problem.config = dataclasses.replace(problem.config, precision="bf16")
    step = next(i.forward for i in problem.implementations() if i.name == f"{PREFIX}packed")
    norm = F.layer_norm
    with mock.patch.object(F, "layer_norm", lambda x, *args: norm(x.float(), *args)):
        for pair in (*step.batches, problem.small):
            step.gradients(*pair)


def compile_some(arch: str, wanted: list[str]) -> list[dict]:
    """Of each name whether its kernels were compiled, as parallel.run wants it."""
    absent.install(compiled=launchers.build, arch=arch)
    launchers.build_utils()
    torch.set_num_threads(1)
    solve, left, records = attention_checks.solve, set(wanted), []

    def ours(call, leaves, mode, impl):
        if impl == "reference":
            raise Done
        return solve(call, leaves, mode, impl)

    with mock.patch.object(attention_checks, "solve", ours):
        for name, call in calls():
            if name in left:
                message = ""
                try:
                    call()
                except (Done, *NOTHING_COMPUTED):
                    pass
                except Exception as error:  # the others are wanted all the same
                    message = f"{type(error).__name__}: {error}"
                    print(f"  {name}: {message}"[:300], file=sys.stderr, flush=True)
                records.append({"name": name, "ok": not message, "message": message})
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=absent.SHARED, default="sm_90", help="an H100's or H200's by default: sm_90")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2")
    parser.add_argument("--only", default="", help="calls with this in their name; default all")
    options = parser.parse_args(argv)
    absent.install(arch=options.arch)  # the checks are those of its kind
    names = [name for name, _ in calls() if options.only in name]
    if not names or options.jobs < 1:
        what = f"--jobs is {options.jobs}, expected 1 or more" if names else f"no call has {options.only!r} in its name"
        print(f"ahead: {what}", file=sys.stderr)
        return 2
    groups = correctness._groups(names)
    shares = [list(itertools.chain(*groups[i :: options.jobs])) for i in range(options.jobs)]
    records = parallel.run(functools.partial(compile_some, options.arch), shares, options.jobs)
    failed = [record["name"] for record in records if not record["ok"]]
    print(f"{len(records) - len(failed)} calls compiled, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
