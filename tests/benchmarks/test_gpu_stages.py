"""`benchmarks gpu` on CPU stand-ins, so that nothing breaks for the first time on a GPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import attention_tiles, environment, schema
from benchmarks.gpu import attention_calls, attention_checks, correctness, parallel, stages
from benchmarks.report import evidence

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small_stages")


def test_dry_run_of_every_stage(tmp_path, capsys):
    assert stages.run_all(tmp_path, None, 600, dry_run=True) == 0
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in stages.STAGES}
    for name, record in records.items():
        assert record["ok"], record
        assert record["stage"] == name
        assert record["dry_run"]
        assert set(schema.ENVIRONMENT) <= set(record["environment"])
    for name in ("attention", "attention_more", "modality_embed", "packing", "train_step", "train_compiled"):
        assert schema.errors(records[name]["result"]) == []
    checks = records["correctness"]["result"]["checks"]
    kinds = {check["name"].split(": ")[1] for check in checks}
    alone = {"isolation", "isolation, NaN", "repeats", "no sync", "graph", "drop-in graph", "memory", "met before"}
    assert kinds == {"error rule", *alone}
    for feature in attention_calls.FEATURES:
        assert any(f"D32 {feature}, " in check["name"] for check in checks), feature
    assert {check["name"].split()[0].rstrip(":") for check in checks} == set(correctness.OPS)
    timed = {row["case"] for row in records["attention"]["result"]["rows"] if "checked" in row}
    assert len(timed) == 6
    more = [row for row in records["attention_more"]["result"]["rows"] if "checked" in row]
    assert {row["direction"] for row in more} == {"fwd", "fwd+bwd"}
    tiles = {row["impl"] for row in more if row["op"] == "attention_tiles" and row["impl"].startswith("mm.auto ")}
    assert len(tiles) == len(attention_tiles.TILES[64])
    assert records["attention_more"]["result"]["profile"][0]["top"]
    # each kernel once under the sanitizer, and the walk of the tuner in the interpreter
    small = records["sanitizer"]["result"]["tail"]
    for name in ("attention bf16 D64 everything,", "attention bf16 D64 everything cross,", "modality_embed", "packing"):
        assert f"passed {name}" in small, small
    assert "fwd: " in records["tune"]["result"]["tail"]
    (profiled,) = records["train_step"]["result"]["profile"]
    assert profiled["steps"] == 1
    assert profiled["top"][0]["ms"] >= profiled["top"][-1]["ms"] > 0
    assert any(row["name"].endswith(" train_step") for row in profiled["host"]["python"])
    # dry runs are no evidence; a second run has nothing left to do
    assert evidence.render(tmp_path.glob("*.json")) == evidence.NONE
    capsys.readouterr()
    assert stages.run_all(tmp_path, None, 600, dry_run=True) == 0
    assert capsys.readouterr().out.count("already, for these sources and versions") == len(stages.STAGES)


def test_no_speed_while_correctness_is_red(tmp_path):
    attention_alone = ["attention"]
    assert stages.run_all(tmp_path, attention_alone, 600, dry_run=True) == 1
    assert "correctness" in json.loads((tmp_path / "attention.json").read_text())["error"]
    green = {"attention": True, "modality_embed": False}
    facts = environment.describe(CPU, 0) | {"commit": "0"}
    for changes, stage, message in (
        ({"result": {"green_ops": {"attention": False}}}, "attention", "red"),
        ({"dry_run": False}, "attention", "red"),
        ({"error": "it broke", "result": {}}, "attention", "red"),
        ({"environment": facts | {"sources": "0"}}, "attention", "commit 0, with other sources than now"),
        ({"environment": facts | {"triton": "0"}}, "attention", "with other triton than now"),
        ({}, "modality_embed", "modality_embed is red"),
        ({}, "train_step", "modality_embed is red"),
    ):
        record = {"ok": True, "dry_run": True, "environment": facts}
        (tmp_path / "correctness.json").write_text(json.dumps(record | {"result": {"green_ops": green}} | changes))
        assert stages.run_all(tmp_path, [stage], 600, dry_run=True) == 1
        record = json.loads((tmp_path / f"{stage}.json").read_text())
        assert message in record["error"]
        assert "result" not in record


def test_a_profile_that_fails_costs_no_row(tmp_path, monkeypatch):
    """It comes behind the timed rows, and a batch that keeps a GPU busy may be too much for it."""

    def breaks(call, device):
        raise torch.OutOfMemoryError("too much\nand more")

    monkeypatch.setattr(stages, "_require_green", lambda context, op: None)
    monkeypatch.setattr(stages.profile, "of", breaks)
    assert stages.run_all(tmp_path, ["train_step"], 600, dry_run=True) == 0
    result = json.loads((tmp_path / "train_step.json").read_text())["result"]
    assert any("checked" in row for row in result["rows"])
    assert result["profile"] == [{"case": "tiny longtail B4", "error": "OutOfMemoryError: too much"}]


def test_correctness_goes_on_where_it_stopped(monkeypatch):
    """What passed is not run again, what failed is."""
    run_now = []

    def checks(device, scope):
        for op in correctness.OPS:
            yield f"{op} a: x", lambda op=op: run_now.append(op)

    monkeypatch.setattr(correctness, "all_checks", checks)
    first = correctness.run(CPU, 0.0, dry_run=True)
    assert not first["green"]
    assert len(first["not_run"]) == 3
    passed = [{"name": "attention a: x", "ok": True, "message": "", "seconds": 1.0}]
    second = correctness.run(CPU, 600, dry_run=True, passed=passed)
    assert second["green"]
    assert second["passed"] == 3
    assert run_now == ["modality_embed", "packing"]


def test_processes_share_the_checks(tmp_path):
    """Two processes; what one leaves undone when it is killed, a fresh one does."""
    groups = [["a", "b"], ["dies once", "c"], ["d"]]
    records = parallel.run(functools.partial(_work, tmp_path / "died"), groups, 2)
    assert {record["name"] for record in records} == {"a", "b", "dies once", "c", "d"}


def test_a_process_killed_before_any_record_is_no_lack_of_time(tmp_path):
    records = parallel.run(functools.partial(_work, tmp_path / "died"), [["dies once", "c"]], 1)
    assert {record["name"] for record in records} == {"dies once", "c"}


def test_a_check_that_hangs_is_killed_after_the_deadline(monkeypatch):
    """The others' records stay, and what hung has none: it counts as not run."""
    monkeypatch.setattr(parallel, "HUNG", 20.0)  # enough for two processes to start on a busy machine
    started = time.time()
    records = parallel.run(_hangs, [["a"], ["hangs"], ["b"]], 2, deadline=started)
    assert {record["name"] for record in records} == {"a", "b"}
    assert time.time() - started < 60


def _hangs(names):
    while "hangs" in names:
        time.sleep(1)
    return [{"name": name, "ok": True} for name in names]


def test_no_stage_is_begun_without_time(tmp_path, capsys):
    assert stages.run_all(tmp_path, None, 1.0, dry_run=True) == 1
    assert "no time left for probe, correctness" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def _work(died, names):
    if "dies once" in names and not died.exists():
        died.touch()
        os._exit(1)
    return [{"name": name, "ok": True} for name in names]


def test_a_wrong_kernel_turns_correctness_red(monkeypatch):
    """A key lost at the end of each sample: the error rule must see it, and the stage must not be green."""
    right = attention_calls.attention

    def wrong(q, k, v, *, impl, **options):
        if impl != "reference":
            v = v * (torch.arange(len(v))[:, None, None] != len(v) - 1)
        return right(q, k, v, impl=impl, **options)

    monkeypatch.setattr(attention_calls, "attention", wrong)
    result = correctness.run(CPU, 600, dry_run=True)
    assert not result["green"]
    failed = [check["name"] for check in result["checks"] if not check["ok"]]
    assert any("attention" in name and "error rule" in name for name in failed)
    assert not any("modality_embed" in name for name in failed)


def test_out_of_time_is_not_green():
    result = correctness.run(CPU, 0.0, dry_run=True)
    assert not result["green"]
    assert result["not_run"]


def test_a_leak_between_samples_is_seen():
    """A mean over the batch, too small for the error rule: isolation is there for that."""
    call = attention_calls.make(CPU, "fp32", 16, attention_calls.FEATURES["full"], 0, 12)
    mode = attention_calls.modes(CPU, "fp32", 16, "auto")[0]
    attention_checks.check_isolation(call, mode, "auto", attention_checks.BIG)
    right = attention_calls.attention
    with pytest.MonkeyPatch.context() as patch:

        def leaking(q, k, v, **options):
            return right(q, k, v + 1e-9 * v.mean(), **options)

        patch.setattr(attention_calls, "attention", leaking)
        attention_checks.check_error_rule(call, mode, "auto")
        with pytest.raises(AssertionError, match="sample 0 changed"):
            attention_checks.check_isolation(call, mode, "auto", attention_checks.BIG)


@pytest.mark.interpreter
def test_modes_of_the_kernels_in_the_interpreter():
    """What a GPU will be asked, as far as the interpreter goes: every override of schedule and dQ body is right."""
    call = attention_calls.make(CPU, "fp32", 16, attention_calls.EVERYTHING, 0, 5)
    ways = attention_calls.modes(CPU, "fp32", 16, "triton")
    assert [way.name for way in ways] == ["sample tiles", "token tiles", "fused, atomic dQ", "fused, token tiles"]
    for way in ways:
        # So few numbers that torch's largest error may be a lucky one; the rms error has no such allowance.
        attention_checks.check_error_rule(call, way, "triton", max_ratio=4.0)


@pytest.mark.interpreter
def test_isolation_and_graph_in_the_interpreter(monkeypatch):
    call = attention_calls.make(CPU, "fp32", 16, attention_calls.FEATURES["bidirectional"], 0, 8)
    token_tiles = attention_calls.modes(CPU, "fp32", 16, "triton")[1]  # where samples share tiles
    attention_checks.check_isolation(call, token_tiles, "triton", attention_checks.BIG)
    monkeypatch.setattr(attention_checks, "GRAPH_TOKENS", 40)
    monkeypatch.setattr(attention_checks, "GRAPH_LAYOUTS", 2)
    attention_checks.check_graph(CPU, "fp32", 16, "triton")


def test_stages_need_no_package_of_the_data(tmp_path):
    """A GPU machine without network has torch, numpy, pillow, tokenizers; what reads data sets may be missing."""
    script = (
        "import sys\n"
        "for name in ('soundfile', 'soxr', 'resvg_py', 'webdataset', 'tyro'):\n    sys.modules[name] = None\n"
        "import benchmarks.attention_host, benchmarks.gpu.stages, benchmarks.train_step, benchmarks.tune\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=environment.ROOT, check=True)


def test_refuses_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stages.run_all(tmp_path, None, 10) == 2
    assert "no GPU" in capsys.readouterr().err
    assert stages.run_all(tmp_path, ["nonsense"], 10, dry_run=True) == 2
    assert "expected probe, correctness, sanitizer, attention" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_of_another_gpu_is_refused(tmp_path, capsys, monkeypatch, dry_run):
    """What was right on an H100 is not shown on an H200, and its figures are not to be written over."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    record = {"ok": True, "dry_run": False, "environment": {"sources": environment.sources(), "gpu": {"name": "H100"}}}
    text = json.dumps(record)
    (tmp_path / "probe.json").write_text(text)
    assert stages.run_all(tmp_path, None, 1.0, dry_run=dry_run) == 2
    here = "a dry run" if dry_run else "NVIDIA H200"
    assert f"has results of H100: {here} needs another --out" in capsys.readouterr().err
    assert (tmp_path / "probe.json").read_text() == text
    (tmp_path / "probe.json").write_text(text.replace("H100", "NVIDIA H200"))
    assert stages.run_all(tmp_path, ["probe"], 1.0, dry_run=dry_run) == (2 if dry_run else 1)  # 1: no time left
