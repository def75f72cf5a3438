"""`benchmarks tune attention`: refuses without a GPU, keeps what it did not measure, leaves out what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention, harness, tune
from benchmarks.__main__ import main
from mmkernels import settings
from mmkernels.ops.attention import configs, tuned

CPU = torch.device("cpu")
ENTRY = {
    "arch": "sm_90", "dtype": "bf16", "head_dim": 64, "extras": False, "mask": "causal", "lengths": "long",
    "kernel": "fwd", "config": {"rows": 128, "cols": 64, "warps": 8, "stages": 3}, "provenance": {"device": "a test"},
}  # fmt: skip


def test_refuses_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tuned.tuned_path().read_text()
    assert main(["tune", "attention"]) == 2
    assert "inspector's report" in capsys.readouterr().err
    assert main(["tune", "attention", "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert ("needs --out" if settings.current().triton_interpret else "set TRITON_INTERPRET=1") in message
    assert tuned.tuned_path().read_text() == before


def test_refuses_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    """A width that no case has would tune nothing; a file that is no table would show after the first kernel."""
    monkeypatch.setattr(tune, "walk", lambda *_: pytest.fail("timed first"))
    monkeypatch.setattr(tune, "sweep_of", lambda *_: None)
    assert main(["tune", "attention", "--head-dim", "64", "--head-dim", "7"]) == 2
    assert "--head-dim is 7, expected one of 32, 64, 128, 256" in capsys.readouterr().err
    assert main(["tune", "attention", "--head-dim", "7"]) == 2
    assert "--head-dim is 7, expected one of 32, 64, 128, 256" in capsys.readouterr().err
    monkeypatch.setattr(tune, "_refusal", lambda *_: None)
    path = tmp_path / "tuned.json"
    path.write_text('{"rows": []}')
    assert main(["tune", "attention", "--out", str(path)]) == 2
    assert "tuned.json: expected" in capsys.readouterr().err
    assert main(["tune", "attention", "--out", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_only_what_is_named_is_walked(tmp_path, capsys, monkeypatch):
    walked = []
    monkeypatch.setattr(tune, "_refusal", lambda *_: None)
    monkeypatch.setattr(tune, "sweep_of", lambda *_: tune.Sweep(CPU, "sm_90", (), 0.0, {"device": "x"}))
    monkeypatch.setattr(tune, "tune_kernel", lambda sweep, problem, case, kernel: walked.append((case, kernel)))
    small = attention.from_case(tune.DRY_CASES[0], CPU, 0)
    monkeypatch.setattr(attention, "from_case", lambda *_: small)
    command = ["tune", "attention", "--out", str(tmp_path / "t.json"), "--json", str(tmp_path / "tried.json")]
    assert main([*command, "--case", "stamps 256 full", "--head-dim", "64", "--kernel", "fwd"]) == 0
    assert [(case.workload, case.mask, case.width, kernel) for case, kernel in walked] == [
        ("stamps", "full", 64, "fwd")
    ]
    assert json.loads((tmp_path / "tried.json").read_text()) == {"provenance": {"device": "x"}, "tried": []}
    assert main([*command, "--case", "nonsense"]) == 2
    assert "no case has 'nonsense' in its name; they are: stamps 256 full" in capsys.readouterr().err


def test_a_case_that_no_width_asked_for_has_is_refused(tmp_path, capsys, monkeypatch):
    """Nothing would be walked, without a word."""
    monkeypatch.setattr(tune, "_refusal", lambda *_: None)
    monkeypatch.setattr(tune, "walk", lambda *_: pytest.fail("walked"))
    monkeypatch.setattr(tune, "sweep_of", lambda *_: tune.Sweep(CPU, "sm_90", (), 0.0, {"device": "x"}))
    command = ["tune", "attention", "--out", str(tmp_path / "t.json"), "--case", "H6 D128"]
    assert main([*command, "--head-dim", "64", "--head-dim", "32"]) == 2
    message = capsys.readouterr().err
    assert "no case of --head-dim 64, 32 has 'H6 D128' in its name; they are: stamps 256 full" in message
    assert " D64" in message
    assert " D128;" not in message


def test_an_entry_of_another_gpu_is_not_replaced_without_a_word(timed, capsys):
    start = configs.select("sm_90", "fp32", 16, mask="causal", lengths="short").fwd[0]
    ms = {None: 2.0, (start.rows, start.warps): 2.0, (64, 8): 2.0, (128, 8): 1.5, (128, 4): 1.0}
    (entry,) = timed(ms).entries
    assert "in_place_of" not in entry["provenance"]
    (newer,) = timed(ms, before={tune._key(entry): {"device": "an H100", "date": "2026-11-27"}}).entries
    assert newer["provenance"]["in_place_of"] == "an H100, 2026-11-27"
    assert "in place of what was found on an H100" in capsys.readouterr().out


def test_merge_keeps_the_others(tmp_path):
    path = tmp_path / "a folder that is made/tuned.json"
    tune.merge(path, [ENTRY, ENTRY | {"kernel": "dq"}])
    newer = ENTRY | {"config": {"rows": 64, "cols": 64, "warps": 4, "stages": 2}}
    tune.merge(path, [newer])
    assert tuned.read(path) == [ENTRY | {"kernel": "dq"}, newer]


def test_every_case_has_a_place_in_the_table():
    """Each class of mask and length of `tuned.classify` is measured at each width."""
    places = set()
    for case in tune.CASES:
        layout = attention.workloads.BY_NAME[case.workload](
            case.samples, 0, **({"length": case.length} if case.length else {})
        )
        plan = attention.MaskPlan.lower(layout, attention.MASKS[case.mask](layout))
        places.add((case.dtype, configs.bucket(case.width), *tuned.classify(plan)))
    for width in configs.BUCKETS:
        for mask in tuned.MASKS:
            for lengths in tuned.LENGTHS:
                assert ("bf16", width, mask, lengths) in places


@pytest.fixture
def timed(monkeypatch):
    """tune_kernel with made-up candidates and times: ms by configuration, None for the default."""

    def run(ms, reasons=None, before=()):
        sweep = tune.Sweep(
            CPU, "sm_90", ((({"rows": 64}), ({"rows": 128})), ({"warps": 4}, {"warps": 8})), 0.0, {"x": 1}
        )
        sweep.before = dict(before)
        problem = attention.from_case(tune.DRY_CASES[0], CPU, 0)

        def candidate(sweep, problem, kernel, config):
            return (reasons or {}).get(config and (config.rows, config.warps), config)

        monkeypatch.setattr(tune, "candidate", candidate)
        monkeypatch.setattr(tune, "_medians", lambda calls, sweep: {c: ms[c and (c.rows, c.warps)] for c in calls})
        tune.tune_kernel(sweep, problem, tune.DRY_CASES[0], "fwd")
        return sweep

    return run


def test_the_fastest_is_written(timed):
    start = configs.select("sm_90", "fp32", 16, mask="causal", lengths="short").fwd[0]
    ms = {None: 2.0, (start.rows, start.warps): 2.0, (64, 8): 2.0, (128, 8): 1.5, (128, 4): 1.0}
    (entry,) = timed(ms).entries
    assert {name: entry["config"][name] for name in ("rows", "warps")} == {"rows": 128, "warps": 4}
    assert (entry["provenance"]["ms"], entry["provenance"]["default_ms"]) == (1.0, 2.0)
    assert (entry["mask"], entry["lengths"], entry["head_dim"]) == ("causal", "short", 32)


def test_what_is_wrong_or_hardly_faster_is_not_written(timed):
    start = configs.select("sm_90", "fp32", 16, mask="causal", lengths="short").fwd[0]
    ms = {None: 2.0, (start.rows, start.warps): 2.0, (64, 8): 2.0, (64, 4): 2.0, (128, 8): 0.1, (128, 4): 0.1}
    sweep = timed(ms, {(128, 8): "wrong: result 0", (128, 4): "spills 8 registers"})
    assert sweep.entries == []
    assert {row["skipped"] for row in sweep.tried if "skipped" in row} == {"wrong: result 0"}
    assert timed(ms | {(128, 8): 1.99, (128, 4): 1.99}).entries == []


def test_late_products_are_offered_to_the_kernels_that_have_them(monkeypatch):
    tried = []
    monkeypatch.setattr(tune, "candidate", lambda sweep, problem, kernel, config: tried.append(config) or config)
    monkeypatch.setattr(tune, "_medians", lambda calls, sweep: dict.fromkeys(calls, 1.0))
    problem = attention.from_case(tune.DRY_CASES[0], CPU, 0)
    long = next(case for case in tune.CASES if (case.workload, case.mask, case.width) == ("uniform", "full", 64))
    for kernel in configs.KERNELS:
        tried.clear()
        tune.tune_kernel(tune.Sweep(CPU, "sm_90", tune.AXES, 0.0, {"x": 1}), problem, long, kernel)
        found = {(config.late, config.registers) for config in tried if config}
        more = {(True, 0)} if kernel in ("fwd", "dkdv") else set()
        assert found == {(False, 0)} | more | ({(True, 128)} if kernel == "fwd" else set())


@pytest.mark.interpreter
def test_dry_run(tmp_path, capsys, monkeypatch):
    """The whole walk on real kernels: every kernel is tried, and the file can be read."""
    monkeypatch.setattr(harness, "MIN_ROUNDS", 1)  # no figure counts here
    path = tmp_path / "tuned.json"
    assert main(["tune", "attention", "--dry-run", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    for kernel in configs.KERNELS:
        assert f"  {kernel}: " in shown
    assert "skipped" not in shown
    tuned.read(path)


@pytest.mark.parametrize(("before_late", "late"), [(2, True), (100, False)])
def test_the_time_is_looked_at_between_candidates(monkeypatch, before_late, late):
    """A sweep of one kernel compiles for minutes: what is not through by then keeps what it had."""
    tried = []
    sweep = tune.Sweep(CPU, "sm_90", (({"rows": 64}, {"rows": 128}),), 0.0, {})

    def candidate(sweep, problem, kernel, config):
        tried.append(config)
        sweep.deadline = -1.0 if len(tried) == before_late else sweep.deadline
        return config

    monkeypatch.setattr(tune, "candidate", candidate)
    monkeypatch.setattr(tune, "_medians", lambda calls, sweep: {c: 1.0 if c is None else 0.1 for c in calls})
    problem = attention.from_case(tune.DRY_CASES[0], CPU, 0)
    tune.tune_kernel(sweep, problem, tune.DRY_CASES[0], "fwd")
    assert len(tried) == before_late if late else len(tried) >= 3
    assert len(sweep.entries) == (not late)


@pytest.mark.interpreter
def test_a_wrong_candidate_is_left_out(monkeypatch):
    problem = attention.from_case(tune.DRY_CASES[0], CPU, 0)
    sweep = tune.Sweep(CPU, "sm_80", tune.DRY_AXES, 0.0, {})
    config = configs.select("sm_80", "fp32", 16).fwd[0]
    assert callable(tune.candidate(sweep, problem, "fwd", config))
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *inputs, **options: 1.01 * right(*inputs, **options))
    problem.check("fwd", [problem.q.detach()])  # the oracle, before it too is wrong
    assert "wrong" in tune.candidate(sweep, problem, "fwd", config)
