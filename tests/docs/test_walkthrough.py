"""The code of the pages runs as it is printed, block after block, and their commands exist."""

import re
import shlex
from pathlib import Path

import pytest
from file_map import ROOT
from PIL import Image

from mmmodel import cli
from mmmodel.data.loader import ShardDataset

PAGES = ("walkthrough.md", "faq.md")
KERNEL_PAGES = ("../README.md", "attention.md", "planner.md", "packing.md", "modality_embed.md")


def blocks(page, language):
    """(line of the page, code) of each fenced block."""
    text = (ROOT / "docs" / page).read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


@pytest.mark.parametrize("page", [*PAGES, *KERNEL_PAGES])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path / "cache"))
    names = {"__name__": page}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(ROOT / "docs" / page), "exec"), names)  # tracebacks show the page's lines
    assert len(names) > 1


@pytest.mark.parametrize("page", [*PAGES, "model.md", "training.md", "stamps.md"])
def test_the_commands_of_a_page_exist(page, capsys):
    """Each flag is in the command's help."""
    joined = [block.replace("\\\n", " ") for _, block in blocks(page, "sh")]
    lines = [line for block in joined for line in block.splitlines() if "mmmodel " in line]
    assert lines
    for line in lines:
        words = shlex.split(line.split("mmmodel ", 1)[1], comments=True)
        commands = [word for word in words if re.fullmatch("[a-z]+", word)][: 2 if words[0] == "data" else 1]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*commands, "--help"])
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", printed), f"{page}: {line}: no {flag}"


def test_the_answer_about_own_data_trains_and_scores_as_written(tmp_path, monkeypatch, capsys):
    """The first block of code of faq.md makes the data, the second block of commands reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path / "cache"))
    exec(blocks("faq.md", "python")[0][1], {})
    Path("photos").mkdir()
    Path("photos/a.txt").write_text("a sea")
    Image.new("RGB", (8, 8)).save("photos/a.jpg")
    Path("posts.csv").write_text("body,file,split,label\na sea,photos/a.jpg,train,sea\n")
    (_, convert), (_, train) = blocks("faq.md", "sh")[:2]
    commands = [shlex.split(line, comments=True) for line in (convert + train).splitlines()]
    assert [command[1] for command in commands] == ["data", "data", "pretrain", "evaluate"]
    for command in commands:
        cli.main(command[1:])
    assert "image_to_text" in capsys.readouterr().out
    assert ShardDataset("shards/posts").metas == [{"split": "train", "label": "sea", "image": "photos/a.jpg"}]
