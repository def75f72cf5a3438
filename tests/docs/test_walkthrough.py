"""The code of the pages runs as it is printed, block after block, and their commands exist."""

import re
import shlex

import pytest
from file_map import ROOT

from mmmodel import cli

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
    """The first block of code of faq.md makes the data, the first block of commands reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path / "cache"))
    exec(blocks("faq.md", "python")[0][1], {})
    commands = blocks("faq.md", "sh")[0][1].splitlines()
    assert [line.split()[1] for line in commands] == ["pretrain", "evaluate"]
    for line in commands:
        cli.main(shlex.split(line)[1:])
    assert "image_to_text" in capsys.readouterr().out
