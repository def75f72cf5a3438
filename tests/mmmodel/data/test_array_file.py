"""Arrays written one by one: read back by the safetensors library, mapped instead of loaded, whole or not at all."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from mmmodel.data.array_file import ArrayWriter


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int32"])
def test_read_back_by_the_library(tmp_path, dtype):
    """With a missing one first, where the rank is not known yet; odd sizes, so that nothing is aligned by luck."""
    rng = np.random.default_rng(0)
    arrays = [None, *(rng.integers(0, 99, (3, n, 5)).astype(dtype) for n in (1, 4, 0)), None]
    with ArrayWriter(tmp_path / "sub" / "a.safetensors") as writer:
        for array in arrays:
            writer.add(array)
        writer.finish({"missing": np.array([0, 4])})
    stored = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "sub" / "a.safetensors").items()}
    assert stored["missing"].tolist() == [0, 4]
    assert stored["shapes"].tolist() == [[0, 0, 0], [3, 1, 5], [3, 4, 5], [3, 0, 5], [0, 0, 0]]
    np.testing.assert_array_equal(stored["flat"], np.concatenate([a.reshape(-1) for a in arrays if a is not None]))
    assert stored["flat"].dtype == dtype
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.safetensors"]


def test_nothing_good_is_a_file_too(tmp_path):
    with ArrayWriter(tmp_path / "a.safetensors") as writer:
        writer.add(None)
        writer.finish({})
    stored = load_file(tmp_path / "a.safetensors")
    assert (stored["flat"].numel(), stored["shapes"].tolist()) == (0, [[0]])


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with ArrayWriter(tmp_path / "a.safetensors") as writer:
        writer.add(np.zeros(3, np.uint8))
        with pytest.raises(ValueError, match=r"array 1 is uint8 of rank 2, expected uint8 of rank 1"):
            writer.add(np.zeros((3, 1), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing(tmp_path):
    """At any moment, by a signal that nobody can catch."""
    program = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from mmmodel.data.array_file import ArrayWriter\n"
        "with ArrayWriter(Path(sys.argv[1])) as writer:\n"
        "    writer.add(np.zeros(1 << 20, np.uint8))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.safetensors")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_full_disk_is_the_error_that_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "w+b"))  # noqa: SIM115

    def fill():
        with ArrayWriter(tmp_path / "a.safetensors") as writer:
            writer.add(np.zeros(10, np.uint8))  # fits the buffer, so that closing fails too
            writer.finish({})

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's account of a process")
def test_a_file_is_paged_in_by_what_reads_it(tmp_path):
    """Opening 64 MB and reading two arrays of it takes a few pages of memory."""
    with ArrayWriter(tmp_path / "a.safetensors") as writer:
        for i in range(64):
            writer.add(np.full(1 << 20, i, np.uint8))
        writer.finish({})
    program = (
        "import sys; from safetensors.torch import load_file\n"
        "from mmmodel.features import Features\n"
        "resident = lambda: 4096 * int(open('/proc/self/statm').read().split()[1])\n"
        "before = resident(); stored = {k: v.numpy() for k, v in load_file(sys.argv[1]).items()}\n"
        "found = Features({'image': stored['flat']}, {'image': stored['shapes']})\n"
        "assert found.get('image', 3).sum() + found.get('image', 60).sum() == 63 << 20\n"
        "print(resident() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 24 << 20
