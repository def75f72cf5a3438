"""Each benchmark end to end on a tiny problem: the document is well formed, right rows are timed, wrong ones never."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import attention, compat, conftest, data, files, harness, modality_embed, packing, run, schema, table
from benchmarks.__main__ import main
from benchmarks.attention_cases import Case
from benchmarks.compat_huggingface import BertProblem, HuggingFaceProblem
from benchmarks.harness import Implementation
from benchmarks.peers import attention_sdpa_loop, data_tarfile, planner_bisect, planner_karmarkar_karp
from benchmarks.planner_problems import EVENED, OURS, LayoutProblem, PacksProblem, RanksProblem
from mmkernels.masks import AttentionMask

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

CAUSAL = AttentionMask(causal=True)
LENGTHS = np.random.default_rng(0).integers(0, 30, (200, 3)).astype(np.int32)
TINY = {
    "attention": lambda: [
        attention.from_case(Case("stamps", 3, "isolated", 4, 4, 16, "fp32"), CPU, 0),
        attention.from_case(Case("stamps", 3, "causal", 4, 2, 16, "fp32"), CPU, 1),  # grouped heads
    ],
    "modality_embed": lambda: [
        modality_embed.build(form, "stamps", 3, 24, "fp32", CPU, 0) for form in ("plain", "full")
    ],
    "packing": lambda: [packing.build(f, "stamps", 3, 24, "fp32", CPU, 0) for f in packing.FUNCTIONS],
    "planner": lambda: [
        PacksProblem("tiny", np.random.default_rng(0).integers(1, 900, 500), 1024),
        PacksProblem("tiny costs", LENGTHS[:, 0], 99, costs=LENGTHS[:, 0] ** 2.0),
        PacksProblem("tiny three", LENGTHS, (99, 150, 200)),
        RanksProblem("tiny ranks", LENGTHS[:, 0] * 1.0, 4),
        RanksProblem("tiny ranks of three", LENGTHS * 1.0, 4),
        LayoutProblem("tiny layout", LENGTHS[:5]),
    ],
    "compat": lambda: [
        *(compat.padded(compat.CompatProblem, "", share, None, 3, 20, 2, 16, CPU, 0) for share in (0.0, 0.4)),
        *(compat.padded(HuggingFaceProblem, "", 0.4, mask, 3, 20, 2, 16, CPU, 0) for mask in (None, CAUSAL)),
        BertProblem("tiny BERT", compat.ragged(0.4, 3, 20), 0),
    ],
    "data": lambda: data.build(2 * data.BATCH, 0),
}


pytestmark = pytest.mark.usefixtures("small_limits")


def measure(op, problems):
    return run.run(op, CPU, seconds=600.0, problems=problems)  # a busy machine must not skip what the test is about


@pytest.mark.parametrize("op", TINY)
def test_tiny_run(op):
    document = measure(op, TINY[op]())
    assert schema.errors(document) == []
    assert json.loads(json.dumps(document)) == document
    multiplies = op in ("attention", "compat")  # to whom else products are no limit, they are not measured
    assert document["limits"].keys() == {"copy"} | ({"gemm_fp32"} if multiplies else set())
    timed = [row for row in document["rows"] if "checked" in row]
    for case in {(row["case"], row["direction"]) for row in document["rows"]}:
        impls = {row["impl"] for row in timed if (row["case"], row["direction"]) == case}
        assert any(impl.startswith("mm.") for impl in impls), f"{case}: nothing of ours was timed"
        assert any(not impl.startswith("mm.") for impl in impls), f"{case}: no peer was timed"
    # All who can run are right: a row may be skipped for something missing here, never for being wrong or failing.
    assert [row["skipped"] for row in document["rows"] if row.get("skipped", "").startswith(("wrong", "failed"))] == []


def test_wrong_peer_is_excluded():
    """A peer that forgets 1 % of its scale is shown as wrong in all directions, with no figure."""

    def build(problem):
        right = attention_sdpa_loop.build(problem)
        return Implementation("forgetful", lambda: 1.01 * right.forward(), right.leaves, right.grad_output)

    problem = TINY["attention"]()[0]
    problem.peers = (SimpleNamespace(NAME="forgetful", missing=lambda p: None, build=build), attention_sdpa_loop)
    rows = measure("attention", [problem])["rows"]
    wrong = [row for row in rows if row["impl"] == "forgetful"]
    assert [row["direction"] for row in wrong] == ["fwd", "bwd", "fwd+bwd"]
    assert all(row["skipped"].startswith("wrong: ") and "median_ms" not in row for row in wrong)
    assert all("forgetful" not in row["speedup_over"] for row in rows if "checked" in row)
    assert any(row["impl"] == "sdpa_loop" and "checked" in row for row in rows)


def test_a_problem_that_breaks_costs_the_others_nothing(capsys):
    """No memory for its inputs, say: its row has the reason, those before and after it their figures."""
    right = [packing.build("pack", "stamps", 3, 24, "fp32", CPU, seed) for seed in (0, 1)]

    class Breaks(SimpleNamespace):
        def implementations(self):
            raise torch.OutOfMemoryError("no memory\nfor it")

    broken = Breaks(op="packing", case="broken", dtype="fp32", directions=("fwd",))
    rows = measure("packing", [right[0], broken, right[1]])["rows"]
    assert [row["skipped"] for row in rows if row["case"] == "broken"] == ["failed: OutOfMemoryError: no memory"]
    assert sum("checked" in row and row["impl"].startswith("mm.") for row in rows) >= 4
    assert "Traceback" in capsys.readouterr().err


def test_a_problem_is_let_go_of_before_the_next():
    """Models of gigabytes, some of which refer to themselves."""
    held = []

    class Knot:
        def __init__(self):
            self.itself = self

    def build():
        assert not any(reference() for reference in held)
        held.append(weakref.ref(Knot()))
        return packing.build("pack", "stamps", 3, 24, "fp32", CPU, 0)

    problems = [harness.Deferred("packing", case, "fp32", ("fwd",), build) for case in ("one", "other")]
    gc.disable()  # by itself the collector comes when many objects were made, however large they are
    try:
        document = measure("packing", problems)
    finally:
        gc.enable()
    assert len(held) == 2
    assert not any(row.get("skipped", "").startswith("failed") for row in document["rows"])


def test_one_case_by_name():
    problems = [packing.build("pack", "stamps", 3, width, "fp32", CPU, 0) for width in (24, 32)]
    rows = run.run("packing", CPU, seconds=600.0, problems=problems, case=problems[1].case)["rows"]
    assert {row["case"] for row in rows} == {problems[1].case}
    with pytest.raises(
        ValueError, match=f"no case of packing .* they are: {problems[0].case} fp32; {problems[1].case}"
    ):
        run.run("packing", CPU, problems=problems, case="none of them")


def test_the_dtype_is_part_of_a_cases_name():
    """attention has one batch in fp32 and in bf16, of one name."""
    problems = [packing.build("pack", "stamps", 3, 24, dtype, CPU, 0) for dtype in ("fp32", "bf16")]
    for case in ("bf16", f"{problems[1].case} bf16"):
        rows = run.run("packing", CPU, seconds=600.0, problems=problems, case=case)["rows"]
        assert {row["dtype"] for row in rows} == {"bf16"}


def test_wrong_kernel_is_excluded(monkeypatch):
    """Our own kernel gets no more trust: with the causal mask lost, it is not timed; its peers still are."""
    right = attention.attention

    def wrong(*tensors, impl, mask, **options):
        return right(*tensors, impl=impl, mask=mask if impl == "reference" else None, **options)

    monkeypatch.setattr(attention, "attention", wrong)
    rows = measure("attention", [attention.from_case(Case("stamps", 3, "causal", 2, 2, 16, "fp32"), CPU, 0)])["rows"]
    ours = [row for row in rows if row["impl"].startswith("mm.")]
    assert ours
    assert all(row["skipped"].startswith("wrong: ") for row in ours)
    assert {row["impl"] for row in rows if "checked" in row} == {"sdpa_padded", "sdpa_dense", "sdpa_loop"}


def fails_when_called(problem):
    return Implementation("broken", lambda: torch.zeros(3) @ torch.zeros(4), (), None)


def returns_nothing(problem):
    return Implementation("broken", lambda: None, (), None)


def fails_when_built(problem):
    raise ImportError("an undefined symbol:\nbuilt for another torch")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (fails_when_called, "failed: RuntimeError: "),
        (returns_nothing, "failed: "),
        (fails_when_built, "failed: ImportError: an undefined symbol:"),
    ],
)
def test_a_peer_that_fails_is_reported_and_the_others_are_timed(build, reason):
    problem = TINY["attention"]()[0]
    problem.peers = (SimpleNamespace(NAME="broken", missing=lambda p: None, build=build), attention_sdpa_loop)
    rows = measure("attention", [problem])["rows"]
    broken = [row for row in rows if row["impl"] == "broken"]
    assert [row["direction"] for row in broken] == ["fwd", "bwd", "fwd+bwd"]
    assert all(row["skipped"].startswith(reason) for row in broken)
    assert {"mm.torch", "sdpa_loop"} <= {row["impl"] for row in rows if "checked" in row}


@pytest.mark.parametrize("build", [fails_when_called, returns_nothing, fails_when_built])
def test_a_planner_that_fails_is_reported_and_the_others_are_timed(monkeypatch, build):
    monkeypatch.setattr(planner_karmarkar_karp, "build", build)
    rows = measure("planner", [TINY["planner"]()[3]])["rows"]
    (broken,) = [row for row in rows if "skipped" in row]
    assert broken["skipped"].startswith("failed: ")
    judged = [row["impl"] for row in rows if "max_over_mean" in row.get("extra", ())]
    assert judged == [OURS, f"{OURS}_equal_count", "round_robin"]


def test_wrong_sample_and_wrong_batch_are_excluded():
    """One pixel, one missing sample, one feature: each is named."""
    shards, _, batches = data.build(data.BATCH, 0)
    (read,) = [i for i in shards.implementations() if getattr(i, "name", "") == "mm.shards"]
    decoded = read.forward()
    assert shards.check("fwd", [decoded]) is None
    key = next(key for key, (_, image, _) in decoded.items() if image is not None)
    decoded[key][1][0, 0, 0] ^= 1
    assert shards.check("fwd", [decoded]) == f"wrong: image of {key}"
    del decoded[key]
    assert "samples, expected" in shards.check("fwd", [decoded])
    found = batches.tensors(batches.batches(batches.stored))
    assert batches.check("fwd", [found]) is None
    found[0] = found[0].clone().add_(1)
    assert batches.check("fwd", [found]) == "wrong: tensor 0 of the batches"


@pytest.mark.parametrize("shuffled", [False, True])
def test_no_archive_is_opened_within_the_time(monkeypatch, shuffled):
    """In either order, ours and tarfile: an epoch of a run under way.  webdataset's pipeline opens its own."""
    shards = list(data.build(4, 0))[shuffled]
    shards.peers = (data_tarfile,)
    rows = list(shards.implementations())
    assert [row.name for row in rows] == ["mm.shards", "tarfile"]
    assert [shards.check("fwd", [row.forward()]) for row in rows] == [None, None]

    def refuse(*_, **__):
        raise AssertionError("opened within the time")

    monkeypatch.setattr(tarfile, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    assert [len(row.forward()) for row in rows] == [4, 4]


@pytest.mark.parametrize(("function", "peer"), [("pad", "index_copy"), ("unpad", "index_select")])
def test_peers_of_padding_know_their_rows_too(monkeypatch, function, peer):
    """As our layout does, before the clock starts."""
    problem = packing.build(function, "stamps", 3, 24, "fp32", CPU, 0)
    (row,) = [row for row in problem.implementations() if row.name == peer]
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    for direction in problem.directions:
        assert harness.checked_call(problem, row, direction)[1] is None


def test_all_shares_one_document(tmp_path):
    """What is there after each case is saved; an operator that cannot be imported has a row that says so."""
    saved = []
    document = run.run_all(CPU, seconds=0.0, ops=("planner", "no_such_operator", "data"), save=saved.append)
    assert schema.errors(document) == []
    assert list(dict.fromkeys(len({row["op"] for row in each["rows"]}) for each in saved)) == [1, 2, 3]
    assert len(saved) > 3
    assert saved[-1]["rows"] == document["rows"]
    assert document["environment"]["budget_seconds"] == 0.0
    (missing,) = [row for row in document["rows"] if row["op"] == "no_such_operator"]
    assert "no_such_operator" in missing["skipped"]
    assert list(document["limits"]) == ["copy"]  # measured once, and once more at the end
    assert document["limits"]["copy"]["after"] > 0
    assert saved[-1] == document


def test_a_machine_that_slows_down_is_named(capsys):
    limits = {"copy": {"value": 30.0, "unit": "GB/s", "after": 20.0}}
    limits["gemm_fp32"] = {"value": 0.2, "unit": "TFLOP/s", "after": 0.19}
    table.print_after(limits)
    assert capsys.readouterr().out.endswith("at the end copy 0.67\n")
    table.print_after({"copy": limits["copy"] | {"after": 31.0}})
    assert capsys.readouterr().out == ""


def test_every_operator_is_in_all():
    assert set(TINY) == set(run.OPS) - {"train_step"}  # which has tests of its own
    assert set(run.OPS) <= set(run.KNOWN)


def test_wrong_plan_is_excluded():
    """Over budget, a lost length, too many packs: each is named."""
    problem = TINY["planner"]()[0]
    order, offsets = planner_bisect.build(problem).packed(planner_bisect.build(problem).forward())
    assert problem.check("fwd", [(order, offsets)]) is None
    assert "exactly once" in problem.check("fwd", [(order[:-1], offsets)])
    assert "budget" in problem.check("fwd", [(order, np.array([0, len(order)]))])
    assert "packs where" in problem.check("fwd", [(order, np.arange(len(order) + 1))])


def test_packs_that_cost_more_than_was_promised_are_excluded():
    """Only of who was to even the costs out."""
    problem = TINY["planner"]()[1]
    ours, plain, *_ = problem.implementations()
    assert problem.check("fwd", [ours.packed(ours.forward())]) is None
    order, offsets = plain.packed(plain.forward())
    assert problem.check("fwd", [(order, offsets)]) is None
    assert "a pack costs" in problem.check("fwd", [(order, offsets, EVENED)])


def test_wrong_ranks_are_excluded():
    """A rank that is not there, unequal counts where equal ones were asked, and loads that anybody has evener."""
    one, three = TINY["planner"]()[3:5]
    for problem in (one, three):
        for row in problem.implementations():
            if isinstance(row, Implementation):
                assert problem.check("fwd", [row.packed(row.forward())]) is None, row.name
        free, equal, *_ = problem.implementations()
        ranks, asked = equal.packed(equal.forward())
        assert asked
        assert not free.packed(free.forward())[1]
        assert "below 4" in problem.check("fwd", [(ranks + 1, True)])
        moved = np.where(np.arange(len(ranks)) == np.argmax(ranks == 0), 1, ranks)
        assert "49 to 51 items" in problem.check("fwd", [(moved, True)])
        by_size = np.argsort(np.argsort(problem.costs.reshape(len(ranks), -1)[:, 0], kind="stable")) * 4 // len(ranks)
        for asked in (True, False):
            assert "the costliest rank costs" in problem.check("fwd", [(by_size, asked)])
    # one cost has a bound of its own, below what ranks in turn may take of items that come in an unlucky order
    unlucky = RanksProblem("unlucky", np.array([9.0, 1.0, 9.0, 1.0, 9.0, 1.0]), 2)
    assert unlucky.check("fwd", [(np.array([0, 1, 0, 1, 0, 1]), True)]) is None
    assert "expected at most 1.6000" in unlucky.check("fwd", [(np.array([0, 1, 0, 1, 0, 1]), False)])


def test_spent_budget_skips_with_reason():
    document = run.run("attention", CPU, seconds=0.0, problems=TINY["attention"]())
    assert document["rows"]
    assert all("budget" in row["skipped"] for row in document["rows"])
    assert schema.errors(document) == []


def test_deadline_within_a_case():
    """Whoever is checked slowly leaves no time for the next; their rows say so, and nothing is timed late."""
    problem = TINY["attention"]()[0]
    deadline = time.perf_counter() + 0.05

    def build(problem):
        right = attention_sdpa_loop.build(problem)
        return Implementation("slow", lambda: (time.sleep(0.1), right.forward())[1], right.leaves, right.grad_output)

    problem.peers = (SimpleNamespace(NAME="slow", missing=lambda p: None, build=build), attention_sdpa_loop)
    rows = list(harness.run_problem(problem, {}, 0.01, CPU, deadline))
    assert {row["skipped"] for row in rows if row["impl"] == "sdpa_loop"} == {
        "the time budget was spent before it was checked"
    }


def test_command_line(tmp_path):
    path = tmp_path / "planner.json"
    command = [sys.executable, "-m", "benchmarks", "planner", "--budget-seconds", "0", "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    document = json.loads(path.read_text())
    assert schema.errors(document) == []
    assert {row["op"] for row in document["rows"]} == {"planner"}


def test_command_line_refuses(capsys):
    assert main(["planner", "--device", "cuda"]) == 2
    assert capsys.readouterr().err
    for text in ("-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            main(["planner", "--budget-seconds", text])
        assert f"--budget-seconds: {text}, expected a number that is not negative" in capsys.readouterr().err
    for text in ("-1", "1.5", "x"):
        with pytest.raises(SystemExit):
            main(["planner", "--seed", text])
        assert f"--seed: {text}, expected an integer that is not negative" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "a.json", "b.json", "--threshold", "15"])  # percent: nothing would be slower
    assert "--threshold: 15, expected a share such as 0.15" in capsys.readouterr().err


def test_suites_for_a_gpu_are_refused_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="sees no GPU"):
        conftest.pytest_configure(SimpleNamespace(getoption={"--device": "cuda"}.get))
    conftest.pytest_configure(SimpleNamespace(getoption={"--device": "cpu"}.get))


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capsys):
    path = tmp_path / "new/folder/x.json"
    assert main(["planner", "--case", "no such case", "--json", str(path)]) == 2
    assert "no such case" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    files.refuse_unwritable(path)
    files.write({"made": "when there is something to write"}, path)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["folder", "new", "x.json"]


def test_a_run_that_is_stopped_keeps_its_cases(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second case of a minutes' run: the file has the first, and the command line one line."""
    measured, path = run._measured, tmp_path / "packing.json"

    def stopped(problem, *rest):
        if path.exists():
            raise KeyboardInterrupt
        return measured(problem, *rest)

    monkeypatch.setattr(run, "_measured", stopped)
    problems = [packing.build("pack", "stamps", 3, width, "fp32", CPU, 0) for width in (24, 32)]
    monkeypatch.setattr(packing, "problems", lambda *which: problems)
    assert main(["packing", "--device", "cpu", "--json", str(path)]) == 130
    assert "stopped" in capsys.readouterr().err
    document = json.loads(path.read_text())
    assert schema.errors(document) == []
    assert {row["case"] for row in document["rows"]} == {problems[0].case}


@pytest.mark.parametrize("way", ["folder", "file as a folder"])
def test_a_file_that_cannot_be_written_is_refused_first(way, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("measured first"))
    (tmp_path / "file").touch()
    path = tmp_path if way == "folder" else tmp_path / "file/x.json"
    assert main(["packing", "--device", "cpu", "--json", str(path)]) == 2
    expected = f"{path}: Is a directory" if way == "folder" else f"{tmp_path / 'file'}: a file, expected a folder"
    assert expected in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_write_that_is_cut_off_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write({"first": 1}, path)

    def cut_off(self, text):
        with self.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        files.write({"second": 2}, path)
    assert files.read(path) == {"first": 1}
