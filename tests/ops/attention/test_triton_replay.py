"""A launch that is repeated is the launch that Triton would make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmkernels


def test_repeated_launches_are_tritons_own():
    """Also which calls repeat nothing, and that nothing of a call is kept; in a process where a driver is stubbed."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("replay_stub.py")
    environment = os.environ | {"PYTHONPATH": str(Path(mmkernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
