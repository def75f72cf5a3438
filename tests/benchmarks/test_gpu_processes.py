"""A stage of `benchmarks gpu` in its own process: what is left on disk of one that hangs, dies or is cut off."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest
import torch

from benchmarks import environment, files, run
from benchmarks.gpu import processes, stages, subprocesses
from benchmarks.report import documents, evidence

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small_stages")


def test_a_stage_in_its_own_process(tmp_path):
    assert stages.run_all(tmp_path, ["probe"], 600, dry_run=True, apart=True) == 0
    record = json.loads((tmp_path / "probe.json").read_text())
    assert record["ok"]
    assert "gemm_fp32" in record["result"]["limits"]


@pytest.mark.parametrize("way", ["hangs", "dies"])
def test_a_stage_that_hangs_or_dies_leaves_its_rows(tmp_path, way):
    path = tmp_path / "attention.json"
    record = processes.run(_half_a_stage, (path, way), path, 15.0 if way == "hangs" else 60.0)
    assert record == json.loads(path.read_text())
    assert not record["ok"]
    assert record["error"] == {"hangs": "ended after 15 s", "dies": "its process ended with code 9"}[way]
    assert record["result"] == {"rows": ["one"]}


def test_a_stage_ends_with_who_started_it(tmp_path, monkeypatch):
    """Ctrl-C in `benchmarks gpu`: the stage would go on, on the GPU, and the program wait for it."""
    process = multiprocessing.get_context("spawn").Process
    started, join = [], process.join

    def stopped(self, timeout=None):
        if self not in started:
            started.append(self)
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(process, "join", stopped)
    path = tmp_path / "attention.json"
    with pytest.raises(KeyboardInterrupt):
        processes.run(_half_a_stage, (path, "hangs"), path, 60.0)
    assert not started[0].is_alive()


def test_a_stage_ends_with_who_started_it_and_was_killed(tmp_path):
    """As where a machine's time is up: what went on, on the GPU, would disturb a second run."""
    beat = tmp_path / "beat"
    arguments = (_beats, (beat,), tmp_path / "attention.json", 600.0)
    starter = multiprocessing.get_context("spawn").Process(target=processes.run, args=arguments)
    starter.start()
    _wait_for(beat.exists)
    starter.kill()
    starter.join()
    _wait_for(lambda: time.time() - beat.stat().st_mtime > 2.0)


def test_a_stage_ends_where_who_started_it_was_killed_before_it_began(tmp_path):
    """It imports torch for seconds before it can look."""
    spawn = multiprocessing.get_context("spawn")
    reader, writer = spawn.Pipe(duplex=False)
    starter = spawn.Process(target=_starts_a_stage_and_dies, args=(writer,))
    starter.start()
    writer.close()
    starter.join()
    assert starter.exitcode == 9
    assert reader.poll(30.0), "the stage goes on"  # it alone has the other end, and sends nothing
    with pytest.raises(EOFError):
        reader.recv()


def _starts_a_stage_and_dies(writer):
    multiprocessing.get_context("spawn").Process(target=processes._alone, args=(_sleeps, (writer,))).start()
    os._exit(9)


def _sleeps(writer):
    time.sleep(60.0)


def _beats(path):
    while True:
        path.touch()
        time.sleep(0.1)


def _wait_for(condition):
    until = time.time() + 60.0
    while not condition():
        assert time.time() < until
        time.sleep(0.1)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"stage": "attention", "ok": true}'])
def test_files_that_are_no_records_count_as_none(tmp_path, text):
    """What a run that was killed left, or the JSON of another command."""
    for name in ("probe", "correctness"):
        (tmp_path / f"{name}.json").write_text(text)
    context = stages.Context(CPU, tmp_path, 600.0, True)
    assert stages._earlier(context, "probe") == {}
    with pytest.raises(stages.Refused, match="red"):
        stages._require_green(context, "attention")
    assert evidence.stage_records(tmp_path.glob("*.json")) == []


def _half_a_stage(path, way):
    facts = {"stage": "attention", "ok": False, "cut_off": True, "environment": {}}
    files.write(facts | {"result": {"rows": ["one"]}}, path)
    if way == "dies":
        os._exit(9)
    time.sleep(600)


def test_rows_are_on_disk_after_each_case(tmp_path, monkeypatch):
    """A machine that goes away in the third case leaves the rows of two, which the report takes."""
    monkeypatch.setattr(stages, "_require_green", lambda context, op: None)
    measured = run._measured

    def goes_away(problem, *rest):
        if len(json.loads(path.read_text())["result"]["rows"]) if path.exists() else False:
            raise KeyboardInterrupt
        return measured(problem, *rest)

    path = tmp_path / "packing.json"
    monkeypatch.setattr(run, "_measured", goes_away)
    with pytest.raises(KeyboardInterrupt):
        stages.run_all(tmp_path, ["packing"], 600, dry_run=True)
    record = json.loads(path.read_text())
    assert record["cut_off"]
    assert not record["ok"]
    assert any("checked" in row for row in record["result"]["rows"])
    path.write_text(json.dumps(record | {"dry_run": False}))
    (document,), left_out = documents.load([path])
    assert document.timed("packing")
    assert left_out == []


def test_a_second_run_loses_no_row_of_one_that_was_cut_off(tmp_path, monkeypatch, capsys):
    """Named, it begins the stage anew, and may be cut off earlier, or end with fewer."""
    monkeypatch.setattr(stages, "_require_green", lambda context, op: None)
    path, measured, most = tmp_path / "packing.json", run._measured, [3]

    def goes_away(problem, *rest):
        most[0] -= 1
        if most[0] < 0:
            raise KeyboardInterrupt
        return measured(problem, *rest)

    monkeypatch.setattr(run, "_measured", goes_away)
    rows = []
    for most[0] in (3, 1, 4):
        with pytest.raises(KeyboardInterrupt):
            stages.run_all(tmp_path, ["packing"], 600, dry_run=True)
        rows.append(stages._timed_rows(json.loads(path.read_text())["result"]))
    assert rows[0] == rows[1] < rows[2]
    record = stages._run_stage(
        "packing", stages.Context(CPU, tmp_path, 0.0, True, anew=True)
    )  # ends, by its budget, with none
    assert record == json.loads(path.read_text())
    assert stages._timed_rows(record["result"]) == rows[2]
    kept = f"kept the {rows[2]} timed rows of an earlier run, as the one that ended later has 0"
    assert (record["ok"], record["cut_off"], record["error"]) == (False, True, kept)
    assert kept in capsys.readouterr().out


def test_a_second_run_times_the_cases_that_an_earlier_one_had_no_time_for(tmp_path, monkeypatch, capsys):
    """And those alone; what is there by then stays, also where the second run is ended in its first case."""
    monkeypatch.setattr(stages, "_require_green", lambda context, op: None)
    monkeypatch.setattr(stages, "STAGES", {"packing": stages.STAGES["packing"]})
    path, measured, most, cases = tmp_path / "packing.json", run._measured, [2], []

    def short(problem, *rest):
        most[0] -= 1
        if most[0] < 0:
            return run._skipped(problem, run.NOT_REACHED)
        cases.append(problem.case)
        return measured(problem, *rest)

    def goes_away(problem, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_measured", short)
    assert stages.run_all(tmp_path, None, 600, dry_run=True) == 0
    first = json.loads(path.read_text())
    assert stages._not_reached(first)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_measured", goes_away)
        with pytest.raises(KeyboardInterrupt):
            stages.run_all(tmp_path, None, 600, dry_run=True)
    ended = json.loads(path.read_text())
    assert ended["cut_off"]
    assert stages._timed_rows(ended["result"]) == stages._timed_rows(first["result"]) > 0
    most[0] = 100
    assert stages.run_all(tmp_path, None, 600, dry_run=True) == 0
    result = json.loads(path.read_text())["result"]
    assert len(cases) == len(set(cases)) == len({row["case"] for row in result["rows"]})  # each timed once
    assert result["rows"][: stages._timed_rows(first["result"])] == [
        row for row in first["result"]["rows"] if row.get("skipped") != run.NOT_REACHED
    ]
    assert not stages._not_reached({"result": result})
    capsys.readouterr()
    assert stages.run_all(tmp_path, None, 600, dry_run=True) == 0
    assert "packing: ok in" in capsys.readouterr().out
    assert stages.run_all(tmp_path, ["packing"], 600, dry_run=True) == 0  # named: all of them again
    assert len(cases) == 2 * len(set(cases))


def test_a_second_run_that_ends_with_fewer_rows_keeps_those_of_a_process_of_its_own(tmp_path, capfd):
    path = _cut_off_with_three_rows(tmp_path)
    record = processes.run(_ends_with_one_row, (tmp_path,), path, 60.0)
    assert f"packing: {record['error']}\n" in capfd.readouterr().out
    assert record["error"].startswith("kept the 3 timed rows")
    assert record == json.loads(path.read_text())
    assert len(record["result"]["rows"]) == 3


def test_rows_of_a_run_that_was_cut_off_do_not_hide_a_wrong_kernel(tmp_path):
    path = _cut_off_with_three_rows(tmp_path)
    _ends_with_one_row(tmp_path, skipped="wrong: result 0")
    assert "cut_off" not in json.loads(path.read_text())


def _cut_off_with_three_rows(folder):
    facts = {"stage": "packing", "ok": False, "dry_run": True, "environment": environment.describe(CPU, 0)}
    rows = [{"impl": "mm.cpp", "checked": True}] * 3
    files.write(facts | {"cut_off": True, "error": "cut off", "result": {"rows": rows}}, folder / "packing.json")
    return folder / "packing.json"


def _ends_with_one_row(folder, **other):
    rows = [{"impl": "mm.cpp", "checked": True}, {"impl": "mm.torch", **other}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "sources", lambda: "the same")  # the fixture's is not of a process of its own
        patch.setitem(stages.STAGES, "packing", stages.Stage(lambda context: (True, {"rows": rows}), 1))
        return stages._run_stage("packing", stages.Context(CPU, folder, 600.0, True, anew=True))


def test_a_sanitizer_may_take_longer_than_its_share(tmp_path, monkeypatch):
    """It is all or nothing, and the share of a run of nine minutes is what it took on an H100."""
    monkeypatch.setattr(subprocesses.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocesses, "_ran", lambda command, seconds, tool: (True, {"seconds": seconds}))
    _, result = subprocesses.sanitized(CPU, 36.0, dry_run=False)
    assert 36.0 + 20.0 < result["seconds"] < 36.0 + stages.GRACE


def test_what_a_sanitizer_started_ends_with_it(tmp_path, monkeypatch):
    """Else it would go on, on the device, under the stages that time."""
    monkeypatch.setattr(subprocesses, "LEAST", 1.0)
    alive = tmp_path / "alive"
    script = f"echo begun; (sleep 3; touch {alive}) & wait"
    ok, result = subprocesses._ran(["bash", "-c", script], 1.0, tool="none")
    assert not ok
    assert result["tail"] == "begun\n\nstopped after 1 s"
    time.sleep(3)
    assert not alive.exists()
