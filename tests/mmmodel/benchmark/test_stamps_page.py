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
    """Outside the interval: retrieval in all directions, fine-tuning, and the probes that the page names."""
    assert published["complete"]
    assert not published["left"]
    assert [run["seed"] for run in published["runs"]] == [0, 1, 2]
    drawn = {"5": 15, "20": 15, "all": 3}  # three pretrainings of five draws of labels; of all there is one
    assert all(row["repeats"] == drawn[row["labels_per_class"]] for row in published["classification"])
    tasks = {task["name"]: task for task in published["tasks"]}
    for name in ("speech_to_text", "image_to_text", "speech_to_image", "known_speech_to_text", "known_speech_to_image"):
        assert tasks[name]["gain_r10_ci95"][0] > 0, name
    above = {row["name"] for row in published["classification"] if row["gain_ci95"][0] > 0}
    few = {f"probe.{inputs}.{labels}" for inputs in ("image", "text", "all") for labels in ("5", "20")}
    assert above == few | {"probe.image.all", "finetune.image.20"}
    assert all(row["gain_ci95"][1] > 0 for row in published["classification"])  # and none is worse
