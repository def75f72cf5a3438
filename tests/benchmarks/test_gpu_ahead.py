"""Kernels compiled ahead, without a GPU: into the folder that Triton looks them up in."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_the_kernels_of_a_call_are_compiled(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.ahead", "--jobs", "1"]
    command += ["--only", "attention fp16 D64 blind, forward by descriptors"]
    environ = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_STORE_BINARY_ONLY": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 calls compiled, 0 failed\n"
    made = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert made == {"attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"}
