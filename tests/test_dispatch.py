"""Dispatch: asked for an implementation, get it or an error that says what is missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import dispatch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(dispatch.cpp_missing() is not None, reason="mmkernels._C is not built")


def test_auto_takes_the_first_that_can_run(monkeypatch):
    monkeypatch.setattr(dispatch, "cpp_missing", lambda: "not built")
    assert dispatch.resolve("packing", "auto", device=CPU, dtype=torch.float32) == "torch"
    monkeypatch.setattr(dispatch, "cpp_missing", lambda: None)
    assert dispatch.resolve("packing", "auto", device=CPU, dtype=torch.float32) == "cpp"
    assert dispatch.resolve("attention", "auto", device=CPU, dtype=torch.float64) == "reference"


@pytest.mark.parametrize(
    ("op", "impl", "dtype", "error", "message"),
    [
        ("attention", "triton", torch.float32, RuntimeError, "CPU tensors need TRITON_INTERPRET=1"),
        ("attention", "cuda", torch.float32, RuntimeError, "attention has no CUDA C"),
        ("attention", "torch", torch.float64, RuntimeError, "float64 is for the reference alone"),
        ("packing", "cuda", torch.float32, RuntimeError, "the CUDA kernels are for GPU tensors"),
        ("packing", "triton", torch.float32, RuntimeError, "packing has no Triton kernels"),
        ("attention", "fast", torch.float32, ValueError, "impl is 'fast', expected one of auto"),
        ("conv", "auto", torch.float32, ValueError, "op is 'conv', expected one of attention"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(op, impl, dtype, error, message):
    with pytest.raises(error, match=message):
        dispatch.resolve(op, impl, device=CPU, dtype=dtype)


def test_the_gpu_that_is_asked_is_the_tensors_own(monkeypatch):
    """An old GPU beside a new one; torch.compile takes the answer for a constant."""
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: [(9, 0), (7, 5)][torch.device(device).index]
    )
    new, old = torch.device("cuda:0"), torch.device("cuda:1")
    assert dispatch.resolve("attention", "triton", device=new, dtype=torch.bfloat16) == "triton"
    with pytest.raises(RuntimeError, match="the GPU is sm_75, needs sm_80"):
        dispatch.resolve("attention", "triton", device=old, dtype=torch.bfloat16)

    def traced(x):
        return x + len(dispatch.resolve("modality_embed", "auto", device=old, dtype=torch.bfloat16))

    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == len("torch")


def test_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "cpp_missing", lambda: "the extension mmkernels._C is not built")
    with pytest.raises(RuntimeError, match=r"mmkernels\._C is not built"):
        dispatch.resolve("packing", "cpp", device=CPU, dtype=torch.float32)
    assert "not cpp: the extension mmkernels._C is not built" in dispatch.explain()


def test_an_extension_that_cannot_be_loaded_is_named_in_every_call():
    """One of another torch, say: a second try ended in an error about schemas that were defined before."""
    code = """
from mmkernels import dispatch, native
def fails(name): raise OSError("of another torch")
native._load = fails
for op in 2 * list(dispatch.TABLE):
    try: dispatch.load(op, "cpp")
    except OSError as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["of another torch"] * 6


@needs_cpp
@pytest.mark.parametrize(
    ("floats", "bf16", "line"),
    [
        (16, 32, "vectors of 16 floats (AVX-512), attention in bf16 of 32 bf16 (AVX512_BF16)"),
        (16, 16, "vectors of 16 floats (AVX-512)"),
        (8, 8, "vectors of 8 floats (AVX2)"),
        (4, 4, "vectors of 4 floats"),
        (None, None, "of an older version (run: python -m mmkernels.build)"),
    ],
)
def test_explain_says_how_wide_the_cpus_vectors_are(monkeypatch, floats, bf16, line):
    cpp = dispatch.load("attention", "cpp")
    assert cpp.vector_terms() in (16, 8, 4)
    assert cpp.vector_terms(torch.float16) == cpp.vector_terms()
    monkeypatch.setattr(cpp, "vector_terms", lambda dtype=torch.float32: bf16 if dtype == torch.bfloat16 else floats)
    assert f"C++ on the CPU: {line}\n" in dispatch.explain()


@needs_cpp
def test_bf16_is_multiplied_as_it_is_where_the_cpu_can():
    """By the flags that the kernel of the system reports, not by what the extension asks the CPU itself."""
    cpp = dispatch.load("attention", "cpp")
    told = Path("/proc/cpuinfo")
    flags = set(told.read_text().split()) if told.exists() else set()
    if "avx2" not in flags:
        pytest.skip("no CPU of x86-64 with AVX2, or a system that does not tell")
    wide = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    assert cpp.vector_terms() == (16 if wide else 8)
    assert cpp.vector_terms(torch.bfloat16) == (32 if wide and "avx512_bf16" in flags else cpp.vector_terms())


def test_an_extension_without_python_functions_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "cpp_missing", lambda: None)
    monkeypatch.setattr(dispatch.native, "cpu_functions", lambda: None)
    monkeypatch.setattr(dispatch, "_vectors", lambda: "of some width")
    assert "packing and modality_embed: short calls on the CPU take the dispatcher" in dispatch.explain()


def test_the_interpreter_refuses_bf16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreter gives wrong bf16"):
        dispatch.resolve("attention", "triton", device=CPU, dtype=torch.bfloat16)
    assert dispatch.resolve("attention", "triton", device=CPU, dtype=torch.float16) == "triton"


def test_old_triton_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 5))
    with pytest.raises(RuntimeError, match=r"Triton is 3\.5, needs 3\.6"):
        dispatch.resolve("attention", "triton", device=CPU, dtype=torch.float32)


def test_explain_names_every_operator():
    printed = subprocess.run([sys.executable, "-m", "mmkernels"], capture_output=True, text=True, check=True).stdout
    for op in dispatch.TABLE:
        assert op in printed
    other = subprocess.run([sys.executable, "-m", "mmkernels", "attention"], capture_output=True, text=True)
    assert other.returncode == 2
    assert "unrecognized arguments: attention" in other.stderr


def test_the_command_line_says_its_version():
    """The one that pip has installed, which reads pyproject.toml."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    printed = subprocess.run([sys.executable, "-m", "mmkernels", "--version"], capture_output=True, text=True).stdout
    assert printed == f"mmkernels {version}\n" == f"mmkernels {mmkernels.__version__}\n"


def test_the_package_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import mmkernels; mmkernels.attention; mmkernels.modality_embed"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_all_that_the_package_exports_is_there_and_listed():
    assert {"attention", "pad", "unpad", "KeyIntervals", "ModalityEmbedding"} <= set(mmkernels.__all__)
    assert set(mmkernels.__all__) <= set(dir(mmkernels))
    assert all(callable(getattr(mmkernels, name)) for name in mmkernels.__all__)
