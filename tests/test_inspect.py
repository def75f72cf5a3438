"""The inspector, on a kernel of our own and, in a process of its own, on the real defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels import inspect
from mmkernels.kernel_spec import KernelSpec

ROOT = Path(__file__).parents[1]
KEYS = ["op", "kernel", "arch", "dtype", "config", "registers", "spill_bytes", "shared_bytes"]
KEYS += ["wgmma", "mma", "tma", "vector_bits"]


def product_spec() -> KernelSpec:
    """A small matrix product: has tensor-core work, wide loads and nothing else."""
    from tests.toy_kernels import matmul_fwd

    pointers = ("a_ptr", "b_ptr", "c_ptr")
    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "K": 64}
    signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(sizes, "constexpr")
    return KernelSpec("toy", "matmul_fwd", "bf16", {"k": 64}, matmul_fwd, signature, sizes, pointers, num_warps=4)


# One architecture per generation of tensor-core instruction: mma.sync, wgmma, tcgen05 (counted with mma).
@pytest.mark.parametrize(("arch", "wgmma"), [("sm_80", False), ("sm_90", True), ("sm_100", False)])
def test_counts_each_generation(arch, wgmma):
    pytest.importorskip("triton")
    row = inspect.inspect_spec(product_spec(), arch)
    assert (row["wgmma"] > 0) is wgmma
    assert (row["mma"] > 0) is not wgmma
    assert row["spill_bytes"] == 0
    assert 16 <= row["registers"] <= 255
    assert row["shared_bytes"] >= 64 * 64 * 2
    assert row["vector_bits"] >= 128
    assert row["dots"]


def test_access_bits():
    expected = {"LDG.E.128": 128, "STG.E.U16": 16, "LDGSTS.E.BYPASS.128": 128, "LDG.E": 32, "LDG.E.U8.CONSTANT": 8}
    expected |= {"LDG.E.ENL2.256": 256, "LDGDEPBAR": 0, "LDS.128": 0, "FFMA": 0}
    assert {opcode: inspect.access_bits(opcode) for opcode in expected} == expected


def test_check_bites():
    """Each way to break the promise is reported; outside the promised range none is."""
    good = {"op": "attention", "arch": "sm_90", "dtype": "bf16", "config": {"head_dim": 64}}
    good |= {"spill_bytes": 0, "wgmma": 8, "mma": 0, "dots": True}
    assert inspect.problems(good) == []
    assert inspect.problems(good | {"dots": False, "wgmma": 0}) == []  # a kernel without products needs none
    for broken in ({"spill_bytes": 16}, {"wgmma": 0, "mma": 32}, {"mma": 4}):
        assert len(inspect.problems(good | broken)) == 1
        for outside in ({"dtype": "fp32"}, {"arch": "sm_80"}, {"config": {"head_dim": 256}}, {"op": "packing"}):
            assert inspect.problems(good | broken | outside) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sm_91"], "sm_80, sm_90, sm_100"),
        (["--op", "nonsense"], "nonsense"),
        (["--dtype", "int8"], "expected one of bf16, fp16, fp32"),
        (["--head-dim", "64,63"], "is 63, expected one of 32, 64, 96, 128, 256"),
        (["--head-dim", "64", "--op", "modality_embed"], "expected none"),
        (["--check", "--dtype", "fp32"], "matches these options; --check is of 16-bit attention on sm_90"),
        (["--check", "--arch", "sm_80"], "--check is of 16-bit attention on sm_90"),
        (["--json", f"{__file__}/report.json"], f"--json {__file__}: "),
    ],
)
def test_refuses_what_does_not_exist(options, message, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(inspect, "_report", lambda *_: pytest.fail("compiled first"))
    assert inspect.main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--head-dim", "64,x"), ("--jobs", "0"), ("--jobs", "-3")])
def test_a_number_that_is_none_is_named(option, value, capsys):
    with pytest.raises(SystemExit):
        inspect.main([option, value])
    assert f"argument {option}: '{value}', expected" in capsys.readouterr().err


def test_refuses_the_interpreter(monkeypatch, capsys):
    """There the kernels are Python functions: a report on them would be about something else."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert inspect.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_attention_defaults_on_sm90(tmp_path):
    """Grade 2 of the evidence: bf16 attention, D 64 and 128, uses wgmma and spills nothing."""
    pytest.importorskip("triton")
    path = tmp_path / "report.json"
    options = ["--arch", "sm_90", "--op", "attention", "--dtype", "bf16", "--head-dim", "64,128", "--check"]
    # A process of its own: this one may be a test runner's worker with threads, and inspect forks.
    command = [sys.executable, "-m", "mmkernels.inspect", *options, "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())
    assert all(list(row) == KEYS for row in rows)
    assert all("fwd" in row["kernel"] or "bwd" in row["kernel"] for row in rows)
    assert {row["config"]["head_dim"] for row in rows if row["wgmma"] and "fwd" in row["kernel"]} == {64, 128}
    assert {row["config"]["head_dim"] for row in rows if row["wgmma"] and "bwd" in row["kernel"]} == {64, 128}
