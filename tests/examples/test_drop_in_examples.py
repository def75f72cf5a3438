"""The examples of the Hugging Face and timm drop-ins run as a user would run them, and assert what they show."""

import runpy

import pytest
from file_map import ROOT


@pytest.mark.parametrize(("name", "needs"), [("huggingface_padding", "transformers"), ("timm_naflex", "timm")])
def test_example_runs_and_holds(name, needs, capsys):
    pytest.importorskip(needs)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "same " in capsys.readouterr().out
