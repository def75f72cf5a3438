"""docs/finetuning.md is true: its commands and its Python run as they stand, on a smaller set and a smaller model."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

from mmmodel import cli

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_goes_on_from_the_run_that_other_pages_make():
    """README and training.md fill runs/quick too, and another configuration would be refused there."""
    command = "mmmodel pretrain --preset quick --out runs/quick"
    assert all(command in (ROOT / "docs" / page).read_text() for page in ("finetuning.md", "training.md", "model.md"))
    assert f"{command} " not in PAGE


def test_the_page_runs(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    searched = False
    for line in blocks("sh")[0].splitlines():
        line = line.replace("--preset quick", f"--preset tiny --set steps=2 data={shards}")
        program, *arguments = shlex.split(line)
        assert program == "python"
        if arguments[:2] == ["-m", "mmmodel"]:
            cli.main(arguments[2:])
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            capsys.readouterr()
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            searched = len(capsys.readouterr().out.splitlines()) == 5
    assert searched
    capsys.readouterr()
    classes = json.loads(Path("runs/shapes/report.json").read_text())["classes"]
    for block in blocks("python"):
        exec(block.replace('find_data("synthetic")', f"{str(shards)!r}"), {})
    said, rows, cosine, by_onnx = capsys.readouterr().out.splitlines()
    assert said.split()[0] in classes
    assert by_onnx == said.split()[0]
    assert rows.startswith("['")
    assert cosine.startswith("(16,) ")
