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
    os.mkfifo(tmp_path / f".pipe{left.suffix}")
    with replacing(tmp_path / "b") as living:
        assert left.exists()  # so new that its process might be about to lock it
        os.utime(left, (0, 0))
        os.utime(living.parent, (0, 0))
        atomic.write_json(tmp_path / "c", {"x": 1})
        assert left.exists()  # it was written in just now
        os.utime(left / "a", (0, 0))
        atomic.write_json(tmp_path / "c", {"x": 1})
        assert not left.exists()
        living.write_text("whole")
    assert contents(tmp_path) == {".other.mmmodel-partial": "", "b": "whole", "c": '{\n "x": 1\n}\n'}


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_writer_stopped_between_the_two_moves_of_a_folder_loses_neither(tmp_path, signal_number):
    """The new one takes its place: at once, or once somebody writes beside it."""
    program = (
        "import os, sys; from pathlib import Path; from mmmodel.atomic import replacing\n"
        "move = os.replace\n"
        "def stopped(*paths):\n"
        "    move(*paths)\n"
        "    os.replace = move\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))\n"
        "os.replace = stopped\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.mkdir()\n"
        "    (partial / 'a').write_text('new')\n"
        "    (partial.parent / 'beside').write_text('')"
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").write_text("old")
    command = [sys.executable, "-c", program, str(tmp_path / "set"), str(int(signal_number))]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -signal_number
    assert (tmp_path / "set").exists() == (signal_number == signal.SIGINT)
    for left in tmp_path.glob(".*"):
        for path in (*left.rglob("*"), left):
            os.utime(path, (0, 0))
    atomic.write_json(tmp_path / "set.json", 1)
    assert contents(tmp_path) == {"set/a": "new", "set.json": "1\n"}
    assert {path.name for path in tmp_path.iterdir()} == {"set", "set.json"}


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_folder_that_another_makes_between_the_moves_stays(tmp_path, monkeypatch, there):
    path, move = tmp_path / "replaced", os.replace

    def overtaken(source, target):
        if target == path:
            path.mkdir()
            (path / "a").write_text("theirs")
        move(source, target)

    if there:
        path.mkdir()
        (path / "a").write_text("old")
    monkeypatch.setattr(os, "replace", overtaken)
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "a").write_text("ours")
    assert contents(tmp_path) == {"replaced/a": "theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["replaced"]
