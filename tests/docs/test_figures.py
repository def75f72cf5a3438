"""Figures that pages copy from benchmarks/results by hand are those of the files."""

import json
import re

import pytest
from file_map import ROOT


def timed(name):
    """Rows of a result file that were timed."""
    found = json.loads((ROOT / "benchmarks/results" / name).read_text())
    return [row for row in found.get("result", found)["rows"] if "skipped" not in row]


def speedups(rows, case, peer, direction="fwd+bwd"):
    """{ours: times as fast as the peer} of the case whose name holds all of `case`."""
    return {
        row["impl"]: f"{row['speedup_over'][peer]:.2f}"
        for row in rows
        if peer in row["speedup_over"] and row["direction"] == direction and all(part in row["case"] for part in case)
    }


def table(page, first_cell):
    """Cells of the row that begins with `first_cell`, without emphasis."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith(f"| {first_cell} |")]
    assert len(lines) == 1, (page, first_cell)
    return [cell.strip().strip("*") for cell in lines[0].strip("|").split("|")]


@pytest.mark.parametrize(
    ("row", "case"),
    [
        ("stamps (45 % padding)", ["stamps 32"]),
        ("repeats (33 % padding)", ["repeats 32"]),
        ("longtail causal (34 % padding)", ["longtail 4"]),
        ("16 samples of at most 256 tokens, 10 % padding", ["16x256", "10% padding"]),
        *((f"the same, {share} %", ["16x256", f" {share}% padding"]) for share in (20, 30, 50, 68)),
    ],
)
def test_drop_in_has_the_gain_of_sdpa_of_the_file(row, case):
    found = speedups(timed("cpu-compat.json"), case, "sdpa")
    assert table("docs/drop_in.md", row)[1:] == [found["mm.sdpa"], found["mm.sdpa_lengths"]]


def test_drop_in_has_the_gain_of_hugging_face_of_the_file():
    rows = timed("cpu-compat.json")
    text = (ROOT / "docs/drop_in.md").read_text().split("Hugging Face, from the same run")[1]
    kind, checked = "", 0
    for name, padding, *printed in re.findall(
        r"^\| (\w*) ?\| (\d+) % \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M
    ):
        kind = name or kind
        case = [f"{kind} x2", f" {padding}% padding"]
        for value, direction in zip(printed, ("fwd", "bwd", "fwd+bwd"), strict=True):
            assert speedups(rows, case, "huggingface_sdpa", direction) == {"mm.huggingface": value}, (case, direction)
            checked += 1
    assert checked == 24


def test_the_packing_target_is_judged_by_the_file():
    rows = timed("cpu-packing.json")
    gains = [
        speedups(rows, [f"pack_out stamps {n}"], "joint index_select(out=)", "fwd")["mm.cpp"] for n in ("32 ", "4 ")
    ]
    cells = table(
        "docs/evidence.md", "packing, into a given output of 8 MB and less: 1.3 over `index_select(out=)`, forward"
    )
    printed = [f"**{gain}" if float(gain) < 1.3 else gain for gain in gains]  # bold: missed
    assert re.findall(r"(?:\*\*)?\d\.\d\d", cells[1]) == printed


def test_the_memory_of_a_step_on_a_gpu_is_that_of_the_file():
    peak = {row["impl"]: row["extra"]["peak_memory_mb"] for row in timed("gpu/train_step.json")}
    cells = table("docs/training.md", "length-bucketed, pool of 8; of 50")
    assert cells[3] == "; ".join(f"{peak[name] / 1000:.0f} GB" for name in ("bucketed_8", "bucketed_50"))
