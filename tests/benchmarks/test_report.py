"""The report of made-up runs: every figure is in it, nothing from outside, no GPU claim without a GPU's file."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from benchmarks import schema, table
from benchmarks.report import command, documents, evidence, plots, regions, tables

FACTS = dict.fromkeys(schema.ENVIRONMENT, "x") | {"date": "2026-11-24T00:00:00+00:00", "device": "cpu", "cores": 2}
FACTS |= {"threads": 2, "cpu": "A Processor", "commit": "0123456789ab", "seed": 0}
GPU = FACTS | {"device": "cuda", "gpu": {"name": "NVIDIA Example", "driver_version": "999.9"}}


def row(op, case, impl, ms, direction="fwd", **extra):
    return {
        "op": op, "case": case, "direction": direction, "dtype": "fp32", "impl": impl, "median_ms": ms, "spread": 0.1,
        "rate": 10 / ms, "rate_unit": "TFLOP/s", "percent_of_limit": 50 / ms, "speedup_over": {}, "checked": True,
        "samples_ms": [ms, ms * 1.1], **({"extra": extra} if extra else {}),
    }  # fmt: skip


def rows():
    found = []
    for direction in ("fwd", "fwd+bwd"):
        for length, batch in ((64, 16), (256, 4), (1024, 1)):
            case = f"uniform {batch}x{length} full T1024 H2 D64"
            found += [
                row("attention", case, "mm.torch", 3.0, direction),
                row("attention", case, "sdpa", 4.0, direction),
            ]
            found.append(row("attention", case, "mm.cpp", 2.0, direction, auto=True, pairs_computed_over_visible=1.25))
    found += [row("packing", "pack <mixed> 1", impl, ms) for impl, ms in (("mm.cpp", 1.0), ("torch.cat", 3.0))]
    found.append(row("packing", "pack <mixed> 1", "copy_", 0.5, yardstick=True))
    skipped = {key: found[0][key] for key in schema.IDENTITY} | {"impl": "fa3", "skipped": "runs on CUDA devices only"}
    return [*found, skipped]


def document(**changes):
    return {"environment": FACTS, "limits": {"gemm_fp32": {"value": 0.1, "unit": "TFLOP/s"}}, "rows": rows()} | changes


@pytest.fixture
def files(tmp_path):
    """A run, an older one, and what is none."""
    older = FACTS | {"date": "2026-01-01T00:00:00+00:00", "commit": "old"}
    contents = {
        "run": document(),
        "older": document(environment=older, rows=[row("attention", "stamps 3 full T9 H1 D8", "mm.cpp", 7.0)]),
        "other": {"tasks": []},
        "number": 5,
        "null": None,
        "malformed": document(rows=[{"op": "attention"}]),
        "dry": {"stage": "attention", "ok": True, "dry_run": True, "environment": FACTS, "result": document()},
        "red": {"stage": "attention", "ok": False, "dry_run": False, "environment": FACTS, "error": "no"},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "text.json").write_bytes(b"\xff")
    return tmp_path


def test_load(files):
    found, left_out = documents.load(sorted(files.glob("*.json")))
    assert [d.name for d in found] == ["run", "older"]
    text = "\n".join(left_out)
    for name in ("other", "number", "null"):
        assert f"{name}.json: no benchmark document: it has no rows" in text
    for reason in ("malformed.json: malformed", "dry.json: a dry run", "red.json: stage"):
        assert reason in text
    assert "text.json: no JSON" in text


def test_who_makes_its_mask_is_measured_by_ours_that_does(tmp_path, capsys):
    """In files from before there was such a row, the ratio says what it compares."""
    case = "stamps 3 prefix T9 H1 D8"
    old = [row("attention", case, "mm.cpp", 1.0, auto=True), row("attention", case, "flex", 4.0)]
    old.append(row("attention", case, "flex_with_mask", 12.0, host_ms=0.5))
    new = [*old[:2], row("attention", case, "mm.cpp_with_mask", 3.0, makes_mask=True, host_ms=0.25)]
    new.append(row("attention", case, "flex_with_mask", 12.0, makes_mask=True, host_ms=0.5))
    cells = {}
    for name, members in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document(rows=members)))
        (read,), _ = documents.load([tmp_path / f"{name}.json"])
        ((*_, cells[name, "ratios"], cells[name, "notes"]),) = tables.body(read, "attention")
        (found,) = documents.cases(read.timed("attention"))
        assert (found.ours["impl"], found.best["impl"]) == ("mm.cpp", "flex")
    assert cells["old", "ratios"] == "4.00 flex, 12.00 flex_with_mask (makes its mask, ours kept its own)"
    assert cells["new", "ratios"] == "4.00 flex, 4.00 flex_with_mask (by mm.cpp_with_mask), 3.00 mm.cpp_with_mask"
    assert cells["new", "notes"] == "mm.cpp_with_mask host ms 0.25, flex_with_mask host ms 0.5"
    table.print_rows(new)
    shown = [line for line in capsys.readouterr().out.splitlines() if "mm.cpp" in line]
    assert "4.00 flex" in shown[0]
    assert "flex_with_mask" not in shown[0]
    assert "4.00 flex_with_mask" in shown[1]


def test_two_files_of_one_name(tmp_path):
    """Each run has plots of its own; a file that is named twice is one run."""
    paths = [tmp_path / folder / "packing.json" for folder in ("before", "after")]
    for path, ms in zip(paths, (1.0, 8.0), strict=True):
        path.parent.mkdir()
        own = [row("packing", "pack mixed 1", "mm.cpp", ms), row("packing", "pack mixed 1", "torch.cat", 2.0)]
        path.write_text(json.dumps(document(rows=own)))
    found, _ = documents.load([*paths, tmp_path / "after/../after/packing.json"])
    assert [each.name for each in found] == ["before-packing", "after-packing"]
    assert command.run(paths, tmp_path / "out", docs=False) == 0
    pictures = [tmp_path / f"out/{name}-packing-limit-fwd.png" for name in ("before-packing", "after-packing")]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def _stage(folder, gpu, stage="attention", ok=True):
    """The stage file of a run on that GPU."""
    folder.mkdir(exist_ok=True)
    facts = GPU | {"gpu": GPU["gpu"] | {"name": gpu}}
    record = {"stage": stage, "ok": ok, "dry_run": False, "environment": facts, "result": document(environment=facts)}
    (folder / f"{stage}.json").write_text(json.dumps(record))
    return folder / f"{stage}.json"


def test_a_second_gpu_renames_no_plot_of_the_first(tmp_path):
    """Pages link them by name."""
    first, second = _stage(tmp_path / "gpu", "NVIDIA A"), _stage(tmp_path / "gpu-b", "NVIDIA B")
    names = [[each.name for each in documents.load(paths)[0]] for paths in ([first], [first, second], [second, first])]
    assert names == [["gpu-attention"], ["gpu-attention", "gpu-b-attention"], ["gpu-b-attention", "gpu-attention"]]


def test_pages_lose_no_gpu_whose_folder_is_not_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / command.README[0], tmp_path / command.EVIDENCE[0]]
    for page, mark in zip(pages, (command.README[1], command.EVIDENCE[1]), strict=True):
        page.write_text(_marks(mark))
    first, second = _stage(tmp_path / "gpu", "NVIDIA A"), _stage(tmp_path / "gpu-b", "NVIDIA B")
    out = tmp_path / "out"
    assert command.run([first], out, docs=True, root=tmp_path) == 0
    before = [page.read_text() for page in pages]
    assert command.run([second], out, docs=True, root=tmp_path) == 2
    assert "docs/evidence.md has results of NVIDIA A, the files have none" in capsys.readouterr().err
    assert [page.read_text() for page in pages] == before
    assert command.run([second, first], out, docs=True, root=tmp_path) == 0
    for page in pages:
        assert page.read_text().index("NVIDIA A") < page.read_text().index("NVIDIA B")
    rows = [line.split(" | ")[2] for line in pages[1].read_text().splitlines() if line.startswith("| attention | ")]
    assert rows == ["NVIDIA A", "NVIDIA B"]


def test_the_host_of_a_gpu_machine_is_no_gpu(tmp_path):
    """`all` on a GPU times the planner on the host: not "run on a GPU", and not by the GPU's copy rate."""
    own = [row("packing", "pack mixed 1", "mm.triton", 1.0), row("planner", "mixed n10", "mm.cpp", 1.0)]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(document(environment=GPU, rows=own)))
    found, _ = documents.load([path])
    assert [(each.name, each.on_gpu, each.ops()) for each in found] == [
        ("all", True, ["packing"]),
        ("all-host", False, ["planner"]),
    ]
    on_gpu, on_cpu = tables.summaries(found)
    assert "NVIDIA Example" in on_gpu[0]
    assert [line[0] for line in on_gpu[1]] == ["packing, fwd, 1 case"]
    assert "A Processor" in on_cpu[0]
    assert [line[0] for line in on_cpu[1]] == ["planner, fwd, 1 case"]
    assert "Limits" not in tables.facts(found[1])


def test_only_pictures_of_an_earlier_report_go(files):
    out = files / "pictures"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"mine")
    assert command.run([files / "run.json"], out, docs=False) == 0
    assert command.run([files / "older.json"], out, docs=False) == 0
    assert (out / "holiday.png").read_bytes() == b"mine"
    assert sorted({path.name.split("-")[0] for path in out.glob("*.png")}) == ["holiday.png", "older"]


def test_ours_is_what_auto_takes_and_a_yardstick_is_no_peer():
    found = documents.cases(documents.Document("x", FACTS, {}, rows()).timed("packing"))
    assert [peer["impl"] for peer in found[0].peers] == ["torch.cat"]
    assert [each["impl"] for each in found[0].yardsticks] == ["copy_"]
    attention = documents.cases(documents.Document("x", FACTS, {}, rows()).timed("attention"))[0]
    assert attention.ours["impl"] == "mm.cpp"
    assert attention.ratio(attention.best) == 2.0


def test_a_ratio_that_the_medians_do_not_tell_from_one(capsys):
    """Samples that scatter by a fifth: 1.05 times as fast is marked, in the report and on the terminal; 2.00 is not."""
    found = []
    for impl, ms in (("mm.cpp", 1.0), ("close", 1.05), ("far", 2.0)):
        found.append(row("packing", "pack mixed 1", impl, ms) | {"samples_ms": [0.8 * ms, ms, 1.2 * ms] * 3})
    (line,) = tables.body(documents.Document("x", FACTS, {}, found), "packing")
    assert "~1.05 close, 2.00 far" in line
    table.print_rows(found)
    shown = capsys.readouterr().out
    assert "~1.05 close, 2.00 far" in shown
    assert "spread %" in shown  # quarter to quarter: a ± would be half of it
    assert "±" not in shown + "".join(tables.HEADER)


def test_report(files, capsys):
    out = files / "report"
    (files / "README.md").write_text("before\n" + _marks(command.README[1]) + "\nafter\n")
    (files / "docs").mkdir()
    (files / "docs/evidence.md").write_text("by hand\n" + _marks(command.EVIDENCE[1]))
    paths = sorted(files.glob("*.json"))
    assert command.run(paths, out, docs=True, root=files) == 0
    assert "left out dry.json" in capsys.readouterr().err

    page = (out / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width' in page
    assert not re.search(r"https?://|<script|<link", page)  # one file, nothing from outside
    sources = re.findall(r'src="(.{22})', page)
    assert sources
    assert set(sources) == {"data:image/png;base64,"}
    assert tables.NO_GPU in page
    assert "pack &lt;mixed&gt; 1" in page
    assert "copy_ takes 0.5 ms" in page

    markdown = (out / "report.md").read_text()
    assert "| uniform 16x64 full T1024 H2 D64 | fwd | fp32 | mm.cpp | 2 |" in markdown
    assert "2.00 sdpa, 1.50 mm.torch" in markdown
    assert "pairs 1.25" in markdown
    assert "attention: fa3 (1 rows): runs on CUDA devices only" in markdown
    images = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    for kind in ("attention-length-fwd", "attention-limit-fwd-bwd", "attention-ratio-fwd", "packing-ratio-fwd"):
        assert f"run-{kind}.png" in images
    for name in images:
        assert Image.open(out / name).width == round(plots.WIDTH * plots.DPI)

    readme = (files / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "A Processor" in readme
    # three cases of the newer run, and one that the older alone has
    assert "| attention, fwd, 4 cases, 3 with a peer | 2.00 (2.00 to 2.00) | 25 (7 to 25) |" in readme
    assert "| packing, fwd, 1 case | 3.00 | 50 |" in readme
    assert tables.NO_GPU in readme
    assert evidence.NONE in (files / "docs/evidence.md").read_text()
    before = readme, (out / "report.html").read_bytes()
    assert command.run(paths, out, docs=True, root=files) == 0
    assert ((files / "README.md").read_text(), (out / "report.html").read_bytes()) == before  # drawn again, the same


def test_rate_over_length():
    """By length, of every implementation, one series per shape; ragged cases have no length."""
    found = documents.cases(documents.Document("x", FACTS, {}, rows()).timed("attention"))
    series = plots.over_length([case for case in found if case.direction == "fwd"])
    assert list(series) == ["full, H2 D64, fp32"]
    assert series["full, H2 D64, fp32"]["mm.cpp"] == [(64, 5.0), (256, 5.0), (1024, 5.0)]
    assert plots.over_length(documents.cases([row("attention", "stamps 32 full T9 H4 D64", "mm.cpp", 1.0)])) == {}


def test_headings_of_a_heat_map_are_not_cut_within_a_word():
    headings = {
        "torch.nested": "torch.\nnested",
        "joint index_select(out=)": "joint\nindex\nselect\n(out=)",
        "padded[mask]": "padded\n[mask]",
        "torch.cat": "torch.cat",
        "huggingface_sdpa": "huggingface\nsdpa",
    }
    for peer, lines in headings.items():
        assert plots.column_head(peer) == lines


def test_tables_without_matplotlib(files, monkeypatch, capsys):
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    assert command.run([files / "run.json"], files / "out", docs=False) == 0
    assert "without plots: matplotlib" in capsys.readouterr().err
    assert "![" not in (files / "out/report.md").read_text()
    assert "<img" not in (files / "out/report.html").read_text()
    assert list((files / "out").glob("*.png")) == []


def test_gpu_evidence(tmp_path):
    """Stages that ran on a GPU: what they showed, what failed; and only then a claim of speed, with the hardware."""
    checks = [{"name": "attention a: x", "ok": False, "message": "off | by\none", "seconds": 1.0}]
    results = {
        "correctness": {"passed": 3, "failed": 1, "not_run": ["b"], "checks": checks},
        "attention": document(environment=GPU),
        "sanitizer": {"skipped": "not installed"},
    }
    for stage, result in results.items():
        record = {"stage": stage, "ok": stage != "correctness", "dry_run": False, "environment": GPU, "result": result}
        (tmp_path / f"{stage}.json").write_text(json.dumps(record))
    text = evidence.render(sorted(tmp_path.glob("*.json")))
    assert (
        "| correctness | 3 checks passed, 1 failed, 1 not run for lack of time | NVIDIA Example | 0123456789ab |"
        in text
    )
    assert "- FAILED attention a: x: off | by one" in text
    assert "| sanitizer | skipped: not installed |" in text
    assert "Grade 3, run on a GPU; NVIDIA Example, driver 999.9" in text
    assert tables.NO_GPU not in text
    assert "failed: boom" in evidence.outcome({"stage": "tune", "ok": False, "error": "Traceback\nboom"})


def test_regions_refuse_a_page_without_marks(files, capsys):
    page = files / "README.md"
    page.write_text(_marks("x") + _marks("x"))
    with pytest.raises(ValueError, match="must hold, once"):
        regions.replace(page, "x", "text")
    (files / "docs").mkdir()
    for evidence_page, message in (("", "evidence.md must hold"), (_marks(command.EVIDENCE[1]), "README.md must hold")):
        (files / "docs/evidence.md").write_text(evidence_page)
        assert command.run([files / "run.json"], files / "out", docs=True, root=files) == 2
        assert f"{message}, once" in capsys.readouterr().err


def test_nothing_to_report(tmp_path, capsys):
    (tmp_path / "a.json").write_text("no JSON")
    assert command.run([tmp_path / "a.json"], tmp_path / "out", docs=False) == 2
    assert "none of the files" in capsys.readouterr().err


def _marks(name):
    return f"<!-- {name}: python -m benchmarks report -->\n\nold\n\n<!-- end of {name} -->\n"
