"""The one seam: which implementation of an operator runs, and why.

An operator is asked for by name ("attention") with impl="auto" or a concrete implementation.  `auto` takes the first
entry of TABLE that can run here; everything else is taken at its word, and raises with what is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections import Counter
from importlib.metadata import version
from types import ModuleType

import torch

from mmkernels import native, settings
from mmkernels.arguments import KERNEL_FLOATS, one_of

IMPLS = ("auto", "reference", "torch", "cpp", "triton", "cuda")

# What each operator has by device type, in order of preference.  Reference is last everywhere: it is the oracle, not a
# product.  Where Triton interprets, its kernels run on the CPU too.
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "reference")},
    "modality_embed": {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "torch", "reference")},
    "packing": {"cpu": ("cpp", "torch", "reference"), "cuda": ("cuda", "torch", "reference")},
}

# The file of each implementation, in ops/<op>/.
FILES = {
    "reference": "reference",
    "torch": "torch_impl",
    "cpp": "cpp_impl",
    "triton": "triton_kernels",
    "cuda": "cuda_impl",
}

MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)


class UnavailableError(RuntimeError):
    """Nothing that was asked for can run here; says what is missing."""


def resolve(op: str, impl: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """The concrete implementation that runs `op` on tensors of this device and dtype.

    Raises ValueError for an unknown op or impl, UnavailableError when `impl` cannot run here.
    """
    one_of("dispatch", "op", op, TABLE)
    one_of(op, "impl", impl, IMPLS)
    if impl != "auto":
        reason = missing(op, impl, device=device, dtype=dtype)
        if reason is not None:
            raise UnavailableError(f"{op}: impl={impl!r} cannot run on {device.type} {_name(dtype)}: {reason}")
        return impl
    reasons = []
    for candidate in TABLE[op].get(device.type, ()):
        reason = missing(op, candidate, device=device, dtype=dtype)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    why = "; ".join(reasons) or f"there are no kernels for {device.type} tensors"
    raise UnavailableError(f"{op}: nothing can run on {device.type} {_name(dtype)} ({why})")


def missing(op: str, impl: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """What stops `impl` from running `op` there, or None when it can run."""
    if impl == "reference":
        return None
    if dtype == torch.float64 and op != "packing":  # packing moves any dtype and sums fp64 as fp64
        return "float64 is for the reference alone"
    has_for_gpus = impl in TABLE[op]["cuda"]
    if impl == "torch":
        return None if has_for_gpus or device.type == "cpu" else "this path is for CPU tensors"
    if impl == "cpp":
        if device.type != "cpu":
            return "the C++ path is for CPU tensors"
        return cpp_missing()
    if not has_for_gpus:
        return f"{op} has no {'Triton' if impl == 'triton' else 'CUDA C++'} kernels"
    if impl == "triton":
        return _triton_missing(device, dtype)
    if device.type != "cuda":
        return "the CUDA kernels are for GPU tensors"
    return cuda_missing()


@functools.cache
def load(op: str, impl: str) -> ModuleType:
    """The module that computes `op` by the concrete implementation `impl`."""
    return importlib.import_module(f"mmkernels.ops.{op}.{FILES[impl]}")


def cpp_missing() -> str | None:
    """Why the C++ operators cannot run, or None."""
    return None if _CPP_BUILT else f"the extension mmkernels._C is not built ({native.HOW_TO_BUILD})"


def cuda_missing() -> str | None:
    """Why the CUDA C++ operators cannot run, or None."""
    return None if _CUDA_BUILT else f"the extension mmkernels._C_cuda is not built ({native.HOW_TO_BUILD})"


def triton_version() -> tuple[int, ...] | None:
    """Triton's version, or None where it is not installed."""
    return _TRITON_VERSION


def _find_triton() -> tuple[int, ...] | None:
    # sys.modules["triton"] = None is how a process says that it does without
    if ("triton" in sys.modules and sys.modules["triton"] is None) or importlib.util.find_spec("triton") is None:
        return None
    return tuple(int(part) for part in version("triton").split("+")[0].split(".")[:2])


# Looked up once, at import: torch.compile traces `resolve`, and sees constants here instead of the file system.
_CPP_BUILT = native.path_of("_C") is not None
_CUDA_BUILT = native.path_of("_C_cuda") is not None
_TRITON_VERSION = _find_triton()


def _triton_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    found = triton_version()
    if found is None:
        return "Triton is not installed"
    if found < MIN_TRITON:
        return f"Triton is {'.'.join(map(str, found))}, needs {'.'.join(map(str, MIN_TRITON))} or later"
    if dtype not in KERNEL_FLOATS:
        return f"the kernels take fp32, bf16 and fp16, not {_name(dtype)}"
    if device.type == "cpu":
        if not settings.current().triton_interpret:
            return "CPU tensors need TRITON_INTERPRET=1"
        if dtype == torch.bfloat16:
            return "Triton's interpreter gives wrong bf16 products; use fp32 or fp16 there"
        return None
    if device.type != "cuda":
        return "the kernels run on CUDA devices"
    capability = _capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}, needs sm_80 or later"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    """Of the tensors' own GPU, which need not be the current one."""
    return torch.cuda.get_device_capability(device)


_capability._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without importing the compiler


def note(text: str) -> None:
    """Keep for `explain` that a call ran elsewhere than its caller may think, and why.  Counted, once per text;
    inside torch.compile once, while the region is traced."""
    _NOTES[text] += 1


# What torch.compiler.assume_constant_result does, but without importing Dynamo: run while tracing, not in the graph.
note._dynamo_marked_constant = True
_NOTES: Counter[str] = Counter()


def explain() -> str:
    """What would run here, for each operator, device and dtype, why not something faster; and what the
    drop-in replacements of mmkernels.compat handed to torch in this process so far."""
    from mmkernels import planner

    lines = [
        f"torch {torch.__version__}, triton {'.'.join(map(str, triton_version() or ())) or 'not installed'}",
        f"GPU: {_gpu()}",
        f"planner: {planner.BACKEND}" + ("" if planner.BACKEND == "cpp" else "  (mmkernels._planner is not built)"),
    ]
    if cpp_missing() is None:
        lines.append(f"C++ on the CPU: {_vectors()}")
    lines.append("")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op, per_device in TABLE.items():
        for device_type in devices:
            for dtype in KERNEL_FLOATS:
                lines.append(_row(op, per_device[device_type], torch.device(device_type), dtype))
    if cpp_missing() is None and not hasattr(native.cpu_functions(), "modality_embed_fwd"):
        lines.append(
            "packing and modality_embed: short calls on the CPU take the dispatcher, since mmkernels._C was built "
            f"without Python's headers, or before these functions were in it ({native.HOW_TO_BUILD})"
        )
    if _NOTES:
        lines += ["", *(f"{text}  ({count} call{'s' if count > 1 else ''})" for text, count in _NOTES.items())]
    return "\n".join(lines)


def _vectors() -> str:
    terms = load("attention", "cpp").vector_terms
    floats = terms()
    if floats is None:
        return f"of an older version ({native.HOW_TO_BUILD})"
    name = {16: " (AVX-512)", 8: " (AVX2)"}.get(floats, "")
    bf16 = ", attention in bf16 of 32 bf16 (AVX512_BF16)" if terms(torch.bfloat16) == 2 * floats else ""
    return f"vectors of {floats} floats{name}{bf16}"


def _row(op: str, order: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str:
    reasons = {impl: missing(op, impl, device=device, dtype=dtype) for impl in order}
    chosen = next((impl for impl in order if reasons[impl] is None), "nothing")
    faster = order[: order.index(chosen)] if chosen in order else order
    why = "; ".join(f"not {impl}: {reasons[impl]}" for impl in faster)
    return f"{op:<15} {device.type:<5} {_name(dtype):<9} -> {chosen:<10} {why}".rstrip()


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none visible (Triton kernels run in the interpreter under TRITON_INTERPRET=1)"
    return f"{torch.cuda.get_device_name()} sm_{''.join(map(str, torch.cuda.get_device_capability()))}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
