"""The data commands, as a user types them."""

import subprocess
import sys

import pytest
from fake_stamps import make_tree

from mmmodel import cli, settings
from mmmodel.data.loader import ShardDataset


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MMMODEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert settings.current().cache == tmp_path / ".cache/mmmodel"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(settings.current().cache) == "/x/mmmodel"
    monkeypatch.setenv("MMMODEL_CACHE", "~/mine")
    assert settings.current().cache == tmp_path / "mine"


def test_synthetic(tmp_path, capsys):
    cli.main(["data", "synthetic", "--out", str(tmp_path / "set"), "--samples", "4", "--seed", "1"])
    assert str(tmp_path / "set") in capsys.readouterr().out
    assert len(ShardDataset(tmp_path / "set")) == 4


def test_stamps_that_are_not_the_published_ones_exit_non_zero(tmp_path, capsys):
    make_tree(tmp_path / "tree")
    arguments = [
        "data",
        "stamps",
        "--cache",
        str(tmp_path / "cache"),
        "--tree",
        str(tmp_path / "tree"),
        "--workers",
        "0",
    ]
    with pytest.raises(SystemExit, match="images 6, expected 950"):
        cli.main(arguments)
    assert "13 samples of 6 images" in capsys.readouterr().out


def test_help_does_not_import_torch():
    code = (
        "import sys, mmmodel.cli as c\n"
        "try: c.main(['data', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
