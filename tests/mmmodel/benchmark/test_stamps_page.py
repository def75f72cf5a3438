"""docs/stamps.md shows what its JSON holds, and the bars of the benchmark stand in it."""

import json
from pathlib import Path

import pytest

from mmmodel.benchmark import report

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def published():
    return json.loads((ROOT / "benchmarks" / "results" / "stamps-cpu.json").read_text(encoding="utf-8"))


def test_the_tables_are_the_json(published):
    page = (ROOT / "docs" / "stamps.md").read_text(encoding="utf-8")
    assert report.markdown(published) in page


def test_what_the_page_says_in_words(published):
    """Retrieval gains in all directions and fine-tuning gains, outside the interval; no linear probe does."""
    assert all(part.startswith("finetune-") for part in published["left"])
    assert len(published["runs"]) == 3
    tasks = {task["name"]: task for task in published["tasks"]}
    for name in ("speech_to_text", "image_to_text", "speech_to_image", "known_speech_to_text", "known_speech_to_image"):
        assert tasks[name]["gain_r10_ci95"][0] > 0, name
    for row in published["classification"]:
        assert (row["gain_ci95"][0] > 0) == (row["way"] == "finetune"), row["name"]
