"""The examples of the Hugging Face and timm drop-ins run as a user would run them, and assert what they show."""

import runpy
import sys

import pytest
from file_map import ROOT

NEEDS = [("huggingface_padding", "transformers"), ("timm_naflex", "timm")]


@pytest.mark.parametrize(("name", "needs"), NEEDS)
def test_example_runs_and_holds(name, needs, capsys):
    pytest.importorskip(needs)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "same " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "needs"), NEEDS)
def test_a_missing_package_is_one_line(name, needs, monkeypatch):
    monkeypatch.setitem(sys.modules, needs, None)  # its import fails then
    with pytest.raises(SystemExit, match=f"^{name}.py: .*; pip install '?{needs}[^\\n]*$"):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
