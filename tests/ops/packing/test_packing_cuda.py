"""The CUDA kernels as compiled for GPUs that are not here: no spill, no local stack, 128-bit loads and stores."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.utils.cpp_extension as torch_build
import triton

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # small toolkits lack it
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: CUDA sources cannot be compiled here")

# ptxas prints, per kernel: its name, then the frame, then the registers.
FRAME = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
# Kernels whose vectors are 16 bytes: uint4, and Pack<T, K> with K elements of 16 bytes in all.
WIDE = re.compile(r"5uint4|If?fLi4E|I13__nv_bfloat16Li8E|I6__halfLi8E|IdLi2E")


def compile_for(arch: str, source: Path, out: Path) -> str:
    """Writes a cubin, returns what ptxas says."""
    command = [NVCC, "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas=-v", "-cubin", "-o", out, source]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stderr


def frames(printed: str) -> dict[str, tuple[int, int, int]]:
    """(stack frame, spill stores, spill loads) in bytes, by kernel."""
    return {name: tuple(map(int, sizes)) for name, *sizes in FRAME.findall(printed)}


def instructions(cubin: Path) -> dict[str, str]:
    """Machine code by kernel."""
    code = subprocess.run([str(CUOBJDUMP), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : (\w+)\n", code)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["packing", "packing_sums"])
def test_kernels_stay_in_registers_and_move_16_bytes(arch, name, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    found = frames(compile_for(arch, ROOT / f"csrc/kernels/{name}.cu", cubin))
    code = instructions(cubin)
    assert len(found) > 10
    assert found.keys() == code.keys()
    assert {kernel: frame for kernel, frame in found.items() if any(frame)} == {}
    assert [kernel for kernel, text in code.items() if re.search(r"\b(LDL|STL)\b", text)] == []
    wide = [kernel for kernel in code if WIDE.search(kernel)]
    assert len(wide) >= 6
    for kernel in wide:
        assert re.search(r"\bLDG\.\S*128", code[kernel]), f"{kernel}: no 128-bit load"
        assert re.search(r"\bSTG\.\S*128", code[kernel]), f"{kernel}: no 128-bit store"


def test_a_local_stack_would_be_found(tmp_path):
    """An array that is indexed at run time: what the tables of streams would be without __grid_constant__."""
    source = tmp_path / "stack.cu"
    source.write_text(
        "__global__ void bad(const int* at, int* out) {\n"
        "  int table[32];\n"
        "  for (int i = 0; i < 32; ++i) table[(at[i] * 7) % 32] = at[i + 1];\n"
        "  for (int i = 0; i < 32; ++i) out[i] = table[at[i + 64] % 32];\n"
        "}\n"
    )
    cubin = tmp_path / "stack.cubin"
    (frame,) = frames(compile_for("sm_90", source, cubin)).values()
    assert frame[0] > 0
    assert re.search(r"\b(LDL|STL)\b", *instructions(cubin).values())


def test_bindings_compile_against_this_torch():
    """Also a CPU build: the stable ABI's headers are whole there."""
    includes = [f"-isystem={path}" for path in torch_build.include_paths()]
    macros = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command = [NVCC, "-std=c++20", "-Xcompiler=-fsyntax-only", "-Icsrc", *macros, *includes, "-c"]
    source = "csrc/bindings/packing_cuda.cpp"
    done = subprocess.run([*command, source, "-o", "/dev/null"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
