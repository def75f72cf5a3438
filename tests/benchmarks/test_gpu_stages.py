"""`benchmarks gpu` on CPU stand-ins, so that nothing breaks for the first time on a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention, environment, limits, run, schema
from benchmarks.gpu import correctness, stages

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(limits.GEMM_SIZE, "cpu", 128)
    monkeypatch.setattr(run, "MAX_SECONDS_PER_DIRECTION", 0.02)


def test_dry_run_of_every_stage(tmp_path):
    assert stages.run_all(tmp_path, None, 600, dry_run=True) == 0
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in stages.STAGES}
    for name, record in records.items():
        assert record["ok"], record
        assert record["stage"] == name
        assert record["dry_run"]
        assert set(schema.ENVIRONMENT) <= set(record["environment"])
    assert schema.errors(records["attention"]["result"]) == []
    kinds = {check["name"].split(": ")[1] for check in records["correctness"]["result"]["checks"]}
    assert kinds == {"error rule", "isolation", "blind rows", "repeats", "no sync"}


def test_no_speed_while_correctness_is_red(tmp_path):
    attention_alone = ["attention"]
    assert stages.run_all(tmp_path, attention_alone, 600, dry_run=True) == 1
    assert "correctness" in json.loads((tmp_path / "attention.json").read_text())["error"]
    for changes, message in (({"ok": False}, "red"), ({"dry_run": False}, "red"), ({"commit": "0"}, "another")):
        record = {"ok": True, "dry_run": True, "environment": {"commit": changes.get("commit", environment.commit())}}
        (tmp_path / "correctness.json").write_text(json.dumps(record | changes))
        assert stages.run_all(tmp_path, attention_alone, 600, dry_run=True) == 1
        record = json.loads((tmp_path / "attention.json").read_text())
        assert message in record["error"]
        assert "result" not in record


def test_a_wrong_kernel_turns_correctness_red(monkeypatch):
    """A key lost at the end of each sample: the error rule must see it, and the stage must not be green."""
    right = attention.attention

    def wrong(q, k, v, *, impl, **options):
        if impl != "reference":
            v = v * (torch.arange(len(v))[:, None, None] != len(v) - 1)
        return right(q, k, v, impl=impl, **options)

    monkeypatch.setattr(attention, "attention", wrong)
    result = correctness.run(CPU, 600, dry_run=True)
    assert not result["green"]
    failed = [check["name"] for check in result["checks"] if not check["ok"]]
    assert any("attention" in name and "error rule" in name for name in failed)
    assert not any("modality_embed" in name for name in failed)


def test_out_of_time_is_not_green():
    result = correctness.run(CPU, 0.0, dry_run=True)
    assert not result["green"]
    assert result["not_run"]
    assert not result["complete"]


def test_refuses_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert stages.run_all(tmp_path, None, 10) == 2
    assert "no GPU" in capsys.readouterr().err
    assert stages.run_all(tmp_path, ["nonsense"], 10, dry_run=True) == 2
    assert "expected probe, correctness, attention" in capsys.readouterr().err
