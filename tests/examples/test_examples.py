"""Each example runs as a user would run it; it asserts by itself that what it shows holds."""

import runpy
import sys

import pytest
from file_map import ROOT

EXAMPLES = {
    "social_media_posts": "accuracy on",
    "recommendation": "of 5 recommended pictures",
    "driving_fusion": "all sensors",
    "sensor_modality": "motion to text",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_and_holds(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert EXAMPLES[name] in capsys.readouterr().out
