"""The command line: a user's mistake is one line and a non-zero exit, not a traceback."""

import errno
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

import mmkernels
from mmmodel import checkpoint, cli, configs, embed, export, run_folder, train, update
from mmmodel.data import convert, stamps
from mmmodel.data.shards import write_shard
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.run import finetune
from mmmodel.limits import RunError


def test_the_command_without_its_packages_says_how_to_get_them(monkeypatch):
    """`pip install .`, for the kernels alone, installs the command too."""
    for name in ("tyro", "docstring_parser"):  # which tyro imports
        for there in [there for there in sys.modules if there.split(".")[0] in (name, "tyro")]:
            monkeypatch.delitem(sys.modules, there)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "mmmodel.cli", raising=False)
        with pytest.raises(SystemExit, match=rf'^mmmodel: {name} is not there; pip install "\.\[model\]"'):
            importlib.import_module("mmmodel.cli")
        monkeypatch.undo()


@pytest.mark.parametrize("name", cli.PACKAGES)
def test_a_command_without_one_of_its_packages_says_which(monkeypatch, tmp_path, name):
    def needs(*_):
        importlib.import_module(name)

    monkeypatch.setattr(train, "pretrain", needs)
    monkeypatch.setitem(sys.modules, name, None)
    start = ("pretrain", "--preset", "tiny", "--out", tmp_path)
    assert_one_line(f'^mmmodel: {name} is not there; pip install "', *start)


def test_the_packages_are_those_of_pyproject():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    modules = {"pillow": "PIL", "scikit-learn": "sklearn", "resvg-py": "resvg_py"}
    named = {modules.get(name, name) for name in extras["optional-dependencies"]["model"]}
    assert named == {"tyro", *cli.PACKAGES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--set", "bogus=3"], "config: no field 'bogus', expected one of model"),
        # the first --set counts too, in every command that has the flag
        (["pretrain", "--set", "bogus=3", "--set", "steps=1", "seed=1"], "config: no field 'bogus'"),
        (["complexity", "--set", "bogus=3", "--set", "steps=1"], "config: no field 'bogus'"),
        (["ablate", "objectives", "--set", "bogus=3", "--set", "steps=1"], "config: no field 'bogus'"),
        (["pretrain", "--set", "steps=many"], "config: steps is 'many', expected a whole number"),
        (
            ["pretrain", "--preset", "tiny", "--set", "schedule=wsd", "--out", "other"],
            "other holds a run with other",
        ),
        (
            ["evaluate", "--run", "missing"],
            "missing: no such file; `mmmodel pretrain` writes model.safetensors with its first checkpoint",
        ),
        (
            ["complexity", "--preset", "tiny", "--seconds", "nan"],
            "complexity: seconds is nan, expected a finite number",
        ),
        (["data", "synthetic", "--samples", "0", "--out", "new"], "synthetic: samples is 0, expected at least 1"),
        (["data", "synthetic", "--seed", "-1", "--out", "new"], "synthetic: seed is -1, expected at least 0"),
        (["data", "stamps", "--workers", "-1"], "stamps: workers is -1, expected at least 0"),
        (
            ["evaluate", "--benchmark", "stamps", "--out", "new", "--budget-minutes", "-1"],
            r"evaluate: budget_minutes is -1.0, expected at least 0",
        ),
        (
            ["evaluate", "--benchmark", "stamps", "--out", "new", "--data", "other", "--device", "cuda"],
            "evaluate: --data, --device cannot be given with --benchmark, which takes its runs as they are",
        ),
        (["plot", "--run", "missing"], "plot: there is no folder missing"),
        (["plot", "--run", "."], "plot: . holds no steps to draw"),
        (["pretrain", "--from", "other"], "pretrain: --from needs --out, the folder of the new run"),
        (["data", "stamps", "--cache", "cache", "--tree", "missing"], r"stamps: no captions \(\*.txt\) under missing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(configs.to_dict(configs.tiny())))
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"mmmodel {mmkernels.__version__}\n"


@pytest.fixture
def own(tmp_path):
    """Two captions, as someone's first try: no language, no test split."""
    folder = tmp_path / "own"
    folder.mkdir()
    samples = [{"__key__": f"k{i}", "txt": f"a {i}", "json": {"split": "train", "about": "ab"[i]}} for i in range(2)]
    write_shard(folder / "a-0.tar", samples)
    return folder


def assert_one_line(message, *arguments):
    with pytest.raises(SystemExit, match=message) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert "\n" not in stopped.value.code


def test_an_implementation_that_cannot_run_here_is_one_line(tmp_path, monkeypatch):
    """Before the data, which may take long, are looked for."""
    fields = (f"data={tmp_path / 'none'}", "model.impl=triton")
    start = ("pretrain", "--preset", "tiny", "--out", tmp_path, "--set", *fields)
    assert_one_line("attention: impl='triton' cannot run on cpu float32: CPU tensors need TRITON_INTERPRET=1", *start)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_one_line("there is no folder .*none", *start)
    assert_one_line("cannot run on cpu bfloat16: Triton's interpreter gives wrong bf16", *start, "precision=bf16")


def test_a_run_of_another_machines_implementation_is_used_with_one_that_runs_here(run, shards, tmp_path):
    """A run that was trained with impl=triton, on a CPU: what it was asked for, an error that says how, or --impl."""
    opened = export.open_run(run, impl="triton")
    there = tmp_path / "model.safetensors"
    export.write(there, opened.tensors, opened.config, opened.tokenizer)
    tuned = ("--data", shards, "--freeze", "encoder", "--epochs", 1, "--label", "category")
    for name, *more in (
        ("embed", "--split", "test", "--out", tmp_path / "a.jsonl"),
        ("explain", "--out", tmp_path / "explained"),
        ("finetune", "--out", tmp_path / "tuned", *tuned),
        ("predict", "--from", tmp_path / "tuned", "--split", "test", "--out", tmp_path / "b.jsonl"),
        ("evaluate",),
    ):
        command = [name, *more] if "--from" in more else [name, "--from", there, *more]
        if name != "predict":  # which keeps what finetune was given
            refused = (*command, "--data", tmp_path / "none")  # before the data are looked for
            assert_one_line("impl='triton' cannot run .*; --impl auto takes the fastest that can", *refused)
        cli.main([*map(str, command), "--impl", "auto"])
    assert export.from_pretrained(there).config.model.impl == "triton"
    assert export.from_pretrained(there, impl="auto").config.model.impl == "auto"


def test_data_is_a_flag_of_pretrain_too(shards, tmp_path):
    cli.main(["pretrain", "--preset", "tiny", "--data", str(shards), "--set", "steps=1", "--out", str(tmp_path)])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["data"], config["steps"]) == (str(shards.resolve()), 1)


def test_what_the_data_lacks_is_one_line(run, own, tmp_path, monkeypatch):
    out, start = tmp_path / "out", ("pretrain", "--preset", "tiny", "--set", f"data={own}")
    assert_one_line("--set languages= reads samples of any", *start, "languages=fr,es,ru", "--out", out)
    nothing = ("pretrain", "--preset", "demo", "--set", f"data={tmp_path}")
    assert_one_line(r"prepare a data set first \(mmmodel data --help; your own: docs/faq.md\)$", *nothing, "--out", out)
    assert_one_line("batch_size is 4, expected at most the 2 distinct items", *start, "--out", out)
    assert_one_line("has no samples of split 'test', expected one of train", "evaluate", "--from", run, "--data", own)
    french = ("finetune", "--from", run, "--languages", "fr", "--out", out)
    assert_one_line(r"holds no sample of a language in \['fr'\]", *french)

    def offline(**_):
        raise RunError("stamps: no way to the package")

    monkeypatch.setattr(stamps, "prepare", offline)
    assert_one_line("no way to the package", "pretrain", "--out", out)


def test_a_fine_tuned_run_is_not_evaluated_again(run, shards, tmp_path):
    finetune(run, FinetuneConfig(label="category", data=str(shards), epochs=1), tmp_path)
    assert_one_line("is fine-tuned, the heads of its pretraining are gone; predict", "evaluate", "--from", tmp_path)
    assert_one_line("holds a fine-tuning; choose another --out", "pretrain", "--preset", "tiny", "--out", tmp_path)


def test_a_file_in_a_folders_place_is_one_line(shards, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    start = ("pretrain", "--preset", "tiny", "--set", f"data={shards}", "steps=1", "--out")
    assert_one_line("file: File exists", *start, tmp_path / "file")
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path / "file"))
    assert_one_line("Not a directory: .*file/features/.*MMMODEL_CACHE names the folder", *start, tmp_path / "out")


@pytest.fixture
def full():
    """No file may be larger than 20 kB once it is called: what a write raises on a full disk, but for its number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", [("--help",), ("complexity", "--preset", "tiny")], ids=["print", "rich"])
def test_a_reader_that_has_seen_enough_is_no_fault(command):
    """`mmmodel --help | head -1`; rich has a way of its own."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mmmodel", *command], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("before", [(update, "train_step"), (checkpoint, "write")], ids=["checkpoint", "export"])
def test_a_full_disk_is_one_line(monkeypatch, shards, tmp_path, full, before):
    """torch raises no Exception at all there, but a BaseException with what each process met."""
    original = getattr(*before)

    def then_full(*arguments, **options):
        found = original(*arguments, **options)
        full()
        return found

    monkeypatch.setattr(*before, then_full)
    start = ("pretrain", "--preset", "tiny", "--set", f"data={shards}", "steps=1", "--out", tmp_path)
    assert_one_line("could not be written, .* MB are free there: .*File too large", *start)
    assert not list(tmp_path.rglob("*partial*"))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_without_a_folder_has_its_presets(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of `quick` in runs/demo stood in the way of the demo
    folders = []
    monkeypatch.setattr(train, "pretrain", lambda config, out: folders.append(str(out)) or True)
    cli.main(["pretrain"])
    cli.main(["pretrain", "--preset", "tiny"])
    assert folders == ["runs/demo", "runs/tiny"]


@pytest.mark.parametrize(
    "command", ["embed --from run --out there.csv", "pretrain --out there.csv", "data convert here --out there.csv"]
)
def test_a_full_disk_names_what_was_written(monkeypatch, tmp_path, command):
    """A write that fails says no name, where opening a file says one."""

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "pretrain", fails)
    monkeypatch.setattr(embed, "write", fails)
    monkeypatch.setattr(convert, "convert", fails)
    assert_one_line("^there.csv: No space left on device$", *command.split())


def test_a_fault_in_a_save_is_no_full_disk(tmp_path):
    full, gone = OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError(errno.ENOENT, "No such file")
    causes = [TypeError("a bug"), TypeError("while a full disk was handled"), RuntimeError("while a file was sought")]
    causes[1].__context__, causes[2].__context__ = full, gone
    faults = [CheckpointException("write", {0: (cause, [])}) for cause in causes]
    for fault in (*faults, SafetensorError("no such dtype")):
        with pytest.raises(type(fault)), run_folder.writing(tmp_path):
            raise fault


def test_a_full_disk_that_torch_finds_as_it_closes_is_no_fault(tmp_path):
    closing = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    closing.__context__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"could not be written, .*No space left"), run_folder.writing(tmp_path):
        raise CheckpointException("write", {0: (closing, [])})


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "pretrain", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "--preset", "tiny"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path, kind):
    def wrong(*_, **__):
        raise kind("a bug")

    monkeypatch.setattr(train, "pretrain", wrong)
    monkeypatch.setattr(stamps, "prepare", wrong)
    for command in (["pretrain", "--preset", "tiny", "--out", str(tmp_path)], ["data", "stamps"]):
        with pytest.raises(kind, match="a bug"):
            cli.main(command)
