"""What is written appears whole or not at all; what a killed process left beside it goes, a living one keeps its."""

import os
import signal
import subprocess
import sys

import pytest

from mmmodel import atomic
from mmmodel.atomic import replacing


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("failing", [False, True])
def test_a_file_is_replaced_or_stays_as_it_was(tmp_path, failing):
    path = tmp_path / "made" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("old")

    def write():
        with replacing(path) as partial:
            partial.write_text("new")
            if failing:
                raise KeyboardInterrupt

    if failing:
        with pytest.raises(KeyboardInterrupt):
            write()
    else:
        write()
    assert contents(tmp_path) == {"made/a.txt": "old" if failing else "new"}
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_of_two_writers_at_once_the_later_ones_file_stays(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert contents(tmp_path) == {"a": "one"}  # contexts end from the last to the first


def test_a_folder_is_replaced_but_not_one_that_appeared_meanwhile(tmp_path):
    """It may be being read, and its files are opened one by one."""

    def write(text):
        partial.mkdir()
        (partial / "a").write_text(text)

    for text in ("first", "second"):
        with replacing(tmp_path / "set") as partial:
            write(text)
        assert contents(tmp_path) == {"set/a": text}
    with replacing(tmp_path / "set") as partial:
        write("slower")
        with replacing(tmp_path / "set") as partial:
            write("faster")
    assert contents(tmp_path) == {"set/a": "faster"}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "a") as partial:
        partial.write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    """The first is known by its lock, not by a number of a process, which another container gives to somebody else."""
    program = (
        "import os, signal, sys; from pathlib import Path; from mmmodel.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / f".other{left.suffix}").touch()  # a file of this name is nobody's of ours
    with replacing(tmp_path / "b") as living:
        assert left.exists()  # so new that its process might be about to lock it
        for folder in (left, living.parent):
            os.utime(folder, (0, 0))
        atomic.write_json(tmp_path / "c", {"x": 1})
        assert not left.exists()
        living.write_text("whole")
    assert contents(tmp_path) == {".other.mmmodel-partial": "", "b": "whole", "c": '{\n "x": 1\n}\n'}
