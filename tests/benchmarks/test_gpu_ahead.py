"""Kernels compiled ahead, without a GPU: into the folder that Triton looks them up in."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import attention, attention_tiles

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
    launchers = list(tmp_path.glob("*/*.so"))
    if shutil.which("gcc"):
        assert {path.name.split(".")[0] for path in launchers} == {"__triton_launcher", "cuda_utils"}
    # what they take from the driver is looked up in it, or they could not be loaded where there is one
    assert all(b"libcuda.so.1" in path.read_bytes() for path in launchers)


def test_another_architecture(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.ahead", "--jobs", "1", "--arch", "sm_80"]
    command += ["--only", "attention fp16 D64 blind, sample tiles: error rule"]
    environ = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("*/attention_fwd_kernel.json")
    assert json.loads(found.read_text())["target"]["arch"] == 80


def test_what_the_stages_launch_is_among_the_calls():
    """In a process of its own, whose driver is the stand-in."""
    script = "from benchmarks.gpu import absent, ahead; absent.install(); print(*dict(ahead.calls()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    names = set(done.stdout.splitlines())
    assert {f"{case}: both" for case in attention.cases("quick", "cuda")} < names
    assert {"train_step: both", "small attention bf16 D64 everything, sample tiles: error rule"} < names
    assert any(name.startswith("modality_embed stamps full") for name in names)
    assert any(name.startswith("host ") for name in names)
    tiles = sum(len(attention_tiles.TILES[case.width]) for case in attention_tiles.CASES)
    assert sum(name.endswith(": forward") for name in names) == tiles
    assert {f"{case}: both" for case in attention.CUDA_MORE} < names


def test_each_tile_is_the_one_that_is_launched():
    """A layout keeps its schedule, and quick calls keep theirs: the tiles of one problem must not meet."""
    script = """if True:
        import torch
        from benchmarks import attention, attention_tiles
        from benchmarks.attention_cases import Case
        from benchmarks.gpu import absent
        from mmkernels.ops.attention import triton_kernels
        seen = []
        absent.install()
        made = triton_kernels._forward
        def watched(*args):
            launch = made(*args)
            seen.append((launch.constants["BLOCK_Q"], launch.constants["BLOCK_K"], launch.constants["LATE"]))
            return launch
        triton_kernels._forward = watched
        problem = attention.from_case(Case("uniform", 2, "full", 1, 1, 64, "bf16", 128), torch.device("cpu"), 0)
        tiles = attention_tiles.TILES[64][:1] + attention_tiles.TILES[64][-1:]
        calls = [attention_tiles.forward(problem, tile, "triton") for tile in tiles]
        with torch.no_grad():
            for call in (*calls, *calls):
                call()
        print(seen)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[(128, 64, False), (64, 32, False)"), done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--only", "nonsense"], "no call has 'nonsense' in its name"), (["--jobs", "0"], "--jobs is 0")],
)
def test_refuses_what_would_compile_nothing(options, message):
    command = [sys.executable, "-m", "benchmarks.gpu.ahead", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert message in done.stderr
