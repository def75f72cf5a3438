"""`benchmarks compare`: a planted regression is flagged on any machine, a slower machine and noise are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import FACTS  # the same made-up machine

from benchmarks import compare, harness, test_speed
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def document(rng, *, machine=1.0, ours=1.0, noise=0.1, peers=True, cases=12):
    """machine: how much slower everything is, limits too; ours: how much slower our row of case 0 is besides."""
    rows = []
    for case in range(cases):
        for impl, ms in (("mm.cpp", 2.0), ("eager", 5.0), ("padded", 4.0)) if peers else (("mm.cpp", 2.0),):
            true = ms * machine * (ours if (impl, case) == ("mm.cpp", 0) else 1.0)
            samples = (true * np.exp(noise * rng.standard_normal(30))).tolist()
            median = float(np.median(samples))
            rows.append(
                {"op": "attention", "case": f"case {case}", "direction": "fwd", "dtype": "fp32", "impl": impl}
                | {"median_ms": median, "spread": 0.1, "rate": 10 / median, "rate_unit": "TFLOP/s", "checked": True}
                | {"percent_of_limit": 100 * machine / median, "speedup_over": {}, "samples_ms": samples}
            )
    return {"environment": FACTS, "limits": {}, "rows": rows}


def verdict(tmp_path, old, new):
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    return main(["compare", *map(str, paths)])


@pytest.mark.parametrize("peers", [True, False])  # by the peers beside it, or by the limit of the run
@pytest.mark.parametrize("machine", [0.5, 1.0, 1.7])
def test_a_planted_regression_is_flagged_and_noise_is_not(machine, peers, tmp_path, capsys):
    """96 rows of noise of 10 % on a machine of another speed: none flagged; a row 1.6 times as slow: flagged alone."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        old = document(rng, peers=peers)
        assert verdict(tmp_path, old, document(rng, machine=machine, peers=peers)) == 0
        assert verdict(tmp_path, old, document(rng, machine=machine, ours=1.6, peers=peers)) == 1
        flagged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SLOWER")]
        assert len(flagged) == 1
        assert "case 0" in flagged[0]
        assert ("eager, padded" if peers else "the limit") in flagged[0]


def test_real_timings(tmp_path, capsys):
    """The same loop timed twice by the harness, with a peer beside it; then our loop walks twice as far."""

    def walk(steps):
        return lambda: sum(range(steps))

    def measured(steps):
        samples = harness.time_calls({"mm.cpp": walk(steps), "eager": walk(40_000)}, 0.6, CPU)
        base = document(np.random.default_rng(0), cases=1)
        for row in base["rows"]:
            row["samples_ms"] = samples.get(row["impl"], row["samples_ms"])
            row["median_ms"] = float(np.median(row["samples_ms"]))
            row["rate"] = 10 / row["median_ms"]
        return base | {"rows": [row for row in base["rows"] if row["impl"] != "padded"]}

    old = measured(20_000)
    assert verdict(tmp_path, old, measured(40_000)) == 1
    assert "SLOWER 0." in capsys.readouterr().out
    assert verdict(tmp_path, old, old) == 0


def test_what_cannot_be_compared(tmp_path, capsys):
    rng = np.random.default_rng(0)
    old, other = document(rng, cases=1), document(rng, cases=1)
    for row in other["rows"]:
        row["case"] = "another"
    assert verdict(tmp_path, old, other) == 2
    assert "no row of ours" in capsys.readouterr().out
    assert verdict(tmp_path, {"tasks": []}, old) == 2
    assert "neither" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", '{"benchmarks": [{"name": "of somebody else"}]}', '{"stage": "tune"}'])
def test_files_of_another_kind(text, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(text)
    new.write_text(json.dumps(document(np.random.default_rng(0), cases=1)))
    assert main(["compare", str(old), str(new)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none.json"), str(new)]) == 2
    assert "none.json: No such file" in capsys.readouterr().err


def test_stages_of_gpu(tmp_path, capsys):
    """Their files hold a document; of another GPU or another torch, that is said."""
    rng = np.random.default_rng(0)
    gpu = [FACTS | {"gpu": {"name": name}, "torch": "2"} for name in ("H100", "H200")]
    stages = [
        {"stage": "attention", "ok": True, "dry_run": False, "environment": facts}
        | {"result": document(rng, ours=ours) | {"environment": facts}}
        for facts, ours in zip(gpu, (1.0, 1.6), strict=True)
    ]
    assert verdict(tmp_path, stages[0], stages[0]) == 0
    assert "which moves" not in capsys.readouterr().out
    assert verdict(tmp_path, *stages) == 1
    out = capsys.readouterr().out
    assert "gpu was H100 and is H200" in out
    assert out.count("which moves") == 1
    cpu = document(rng) | {"environment": FACTS | {"torch": "2"}}
    verdict(tmp_path, cpu, stages[1])
    assert "gpu was none and is H200" in capsys.readouterr().out


@pytest.mark.parametrize("impl", ["mm.cpp", "all"])  # its row, or that of a case which nobody could be timed on
def test_a_row_that_is_wrong_now_is_a_regression(impl, tmp_path, capsys):
    old, new = (document(np.random.default_rng(0), cases=2) for _ in range(2))
    gone = new["rows"].pop(0)
    assert verdict(tmp_path, old, new) == 0  # not measured is not worse
    identity = {name: gone[name] for name in ("op", "case", "direction", "dtype")}
    new["rows"].append(identity | {"impl": impl, "skipped": "the time budget was spent before this case"})
    assert verdict(tmp_path, old, new) == 0
    new["rows"][-1]["skipped"] = "wrong: result 0 has relative error 1"
    capsys.readouterr()
    assert verdict(tmp_path, old, new) == 1
    assert "BROKEN attention / case 0 / fwd / fp32 / mm.cpp: wrong: result 0" in capsys.readouterr().out


def test_pytest_suite(tmp_path):
    """pytest benchmarks --benchmark-json: rows that `compare` reads, each with the calibration that ran beside it."""
    path = tmp_path / "speed.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "benchmarks", "--op", "planner"]
    command += ["-k", "layout or n256", "--benchmark-json", str(path)]
    # pytest-benchmark times nothing in a worker of xdist, which this process may be; that one is not
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    found = compare.read(path).scores
    assert {key[0] for key in found} == {"planner"}
    assert len(found) == 3
    assert all(score.time > 0 and score.beside["calibration"][0] > 0 for score in found.values())
    assert main(["compare", str(path), str(path)]) == 0
    slower = json.loads(path.read_text())
    for each in slower["benchmarks"]:
        each["stats"]["median"] *= 20  # beyond any uncertainty: a busy machine times the calls badly
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert main(["compare", str(path), str(tmp_path / "slower.json")]) == 1


def test_the_suite_fails_a_wrong_kernel(monkeypatch):
    """Ours is checked before it is timed: a benchmark fixture that is touched is a benchmark that lies."""

    class Wrong:
        case, dtype, op = "x", "fp32", "attention"

        def implementations(self):
            yield harness.Implementation("mm.cpp", lambda: time.sleep(0))

        def check(self, direction, results):
            return "wrong: on purpose"

    monkeypatch.setattr(test_speed.FEED, "get", lambda *which: Wrong())
    with pytest.raises(AssertionError, match="on purpose"):
        test_speed.test_speed(None, "attention", CPU, "quick", 0, "fwd")
