"""The folder of a run: whose it is, what may differ where it goes on, and what a mistake leaves of it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from builders import assert_same_run

from mmmodel import checkpoint, configs, metrics, pretraining, run_folder, train
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_shard


def test_a_run_that_goes_on_says_that_its_data_changed(tiny, shards, tmp_path, caplog):
    """Shards that were only copied and renamed are the same data; a sample fewer is not, nor another caption."""
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    half, changed = dataclasses.replace(tiny, data=str(data), checkpoint_every=1), "the data changed"

    def goes_on(steps):  # to the stop that a kill is, which leaves the configuration as it was
        out = tmp_path / "run"
        if (out / "config.json").exists():
            config = json.loads((out / "config.json").read_text())
            (out / "config.json").write_text(json.dumps(config | {"steps": steps}))
        caplog.clear()
        train.pretrain(dataclasses.replace(half, steps=steps), out)
        return caplog.text

    assert changed not in goes_on(1)
    first = min(data.glob("*train*.tar"))
    first.rename(first.with_name("renamed.tar"))
    os.utime(first.with_name("renamed.tar"))
    assert changed not in goes_on(2)
    write_shard(data / "more.tar", [{"__key__": "extra", "txt": "one more"}])
    assert "(80 samples -> 81): its batches are others from here on" in goes_on(3)
    assert changed not in goes_on(4)
    write_shard(data / "more.tar", [{"__key__": "extra", "txt": "one more, reworded"}])
    assert "(still 81 samples, not the same)" in goes_on(5)
    write_shard(data / "more.tar", [{"__key__": "extra", "txt": "one more"}])
    assert changed not in goes_on(5)  # it is finished


@pytest.mark.parametrize("gone", ["", "checkpoints/step-00000008", "checkpoints"])
def test_a_finished_run_is_left_alone_with_or_without_its_checkpoints(tiny, unbroken, tmp_path, caplog, gone):
    """They take three times the model's space.  More steps are another configuration; without the model it trains."""
    out = shutil.copytree(unbroken, tmp_path / "run")
    if gone:
        shutil.rmtree(out / gone)

    def files():
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}

    before = files()
    with caplog.at_level("INFO"):
        assert train.pretrain(tiny, out)
    assert caplog.messages == [f"{out} is finished: all of its 8 steps are done"]
    assert files() == before
    with pytest.raises(ConfigError, match="holds a run with other steps 8 -> 9"):
        train.pretrain(dataclasses.replace(tiny, steps=9), out)
    (out / "model.safetensors").unlink()
    assert train.pretrain(tiny, out)
    assert_same_run(out, unbroken)


@pytest.mark.parametrize("left", ["checkpoints", "model.safetensors", "metrics.jsonl"])
def test_what_is_left_of_a_run_without_its_configuration_is_no_start_of_another(tiny, unbroken, tmp_path, left):
    """Its config.json was deleted to get the folder free: the next run went on from its checkpoint."""
    source = unbroken / left
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / left)
    with pytest.raises(ConfigError, match=r"holds a run without its config.json; delete it, or choose another"):
        train.pretrain(dataclasses.replace(tiny, seed=1), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_damaged_model_is_written_anew_from_the_checkpoint(tiny, unbroken, tmp_path):
    """Without a checkpoint it is an error: the run would begin again."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    (out / "model.safetensors").write_bytes(b"cut")
    assert train.pretrain(tiny, out)
    assert_same_run(out, unbroken)
    shutil.rmtree(out / "checkpoints")
    (out / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="not a safetensors file, or a damaged one"):
        train.pretrain(tiny, out)


def test_a_damaged_tokenizer_of_a_stopped_run_is_named(tiny, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()  # as if it had not come to its end
    (tmp_path / "run" / "tokenizer.json").write_bytes(b'{"version"\xff')
    with pytest.raises(ConfigError, match=r"run/tokenizer.json: is no tokenizer, or a damaged one"):
        train.pretrain(tiny, tmp_path / "run")


def test_a_folder_of_another_run_is_refused(tiny, unbroken):
    wider = dataclasses.replace(tiny, lr=1.0, model=dataclasses.replace(tiny.model, width=32))
    with pytest.raises(ConfigError, match=r"holds a run with other model.width 16 -> 32, lr 0.002 -> 1.0; choose"):
        train.pretrain(wider, unbroken)


def test_a_stopped_run_goes_on_elsewhere_in_other_portions_and_from_data_that_moved(
    tiny, shards, unbroken, tmp_path, caplog
):
    """The objective is the same, and the figures are but for rounding.  Other samples are another run's."""
    out = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    (out / "model.safetensors").unlink()
    moved = dataclasses.replace(tiny, data=str(shutil.copytree(shards, tmp_path / "moved")))
    fields = {"threads": 2, "chunk_tokens": 100, "checkpointing": True, "checkpoint_every": 1, "keep_checkpoints": 3}
    config = dataclasses.replace(moved, **fields)
    (tmp_path / "other").mkdir()
    write_shard(tmp_path / "other" / "a-0.tar", [{"__key__": f"k{i}", "txt": f"red {i}"} for i in range(8)])
    for field, wrong in (
        ("data", {"data": str(tmp_path / "other")}),
        ("data", {"data": str(tmp_path / "nowhere")}),
        ("precision", {"precision": "bf16"}),
        ("compile", {"compile": True}),
    ):
        with pytest.raises(ConfigError, match=f"holds a run with other .*{field} "):
            train.pretrain(dataclasses.replace(config, **wrong), out)
    threads = torch.get_num_threads()
    try:
        with caplog.at_level("INFO"):
            assert train.pretrain(config, out)
    finally:
        torch.set_num_threads(threads)
    assert (
        f"going on with other data {shards} -> {moved.data}, threads 1 -> 2, chunk_tokens 0 -> 100, "
        "checkpointing False -> True, checkpoint_every 3 -> 1, keep_checkpoints 2 -> 3" in caplog.messages
    )
    assert configs.from_dict(json.loads((out / "config.json").read_text())) == config
    lines = [metrics.read(folder / "metrics.jsonl") for folder in (out, unbroken)]
    assert [line["step"] for line in lines[0]] == list(range(1, 9))
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-3)


def test_a_run_that_made_no_step_leaves_its_folder_free(tiny, tmp_path):
    """What was wrong: the data, the batch, and then the first step, as when it does not fit in memory."""
    with pytest.raises(FileNotFoundError):
        train.pretrain(dataclasses.replace(tiny, data="/typo"), tmp_path)
    with pytest.raises(ConfigError, match="batch_size is 1000, expected at most the"):
        train.pretrain(dataclasses.replace(tiny, batch_size=1000), tmp_path)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(dataclasses.replace(tiny, batch_size=5))))
    (tmp_path / "tokenizer.json").write_text("of other data")
    assert train.pretrain(dataclasses.replace(tiny, steps=1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 4
    (tmp_path / "config.json").write_text('{"steps')
    with pytest.raises(ConfigError, match=r"config.json does not read: .*; choose another --out"):
        train.pretrain(dataclasses.replace(tiny, steps=1), tmp_path)


def test_a_folder_is_one_processs_at_a_time(tiny, unbroken):
    before = checkpoint.saved(unbroken / "checkpoints")
    with (
        run_folder.alone_in(unbroken, "pretrain"),
        pytest.raises(ConfigError, match="pretrain: another process is at work in"),
    ):
        train.pretrain(dataclasses.replace(tiny, steps=9), unbroken)
    assert checkpoint.saved(unbroken / "checkpoints") == before
    assert train.pretrain(tiny, unbroken)


def test_a_relative_folder_of_data_is_kept_absolute(tiny, shards, tmp_path, monkeypatch):
    """And a run that kept it as it was typed goes on."""
    monkeypatch.chdir(shards.parent)
    typed = f"./{shards.name}"
    assert train.pretrain(dataclasses.replace(tiny, data=typed, steps=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"] == str(shards)
    (tmp_path / "config.json").write_text(json.dumps({**config, "data": typed}))
    assert train.pretrain(dataclasses.replace(tiny, data=typed, steps=1), tmp_path)
    assert pretraining.located("stamps") == "stamps"
    with pytest.raises(ConfigError, match="data is '', expected stamps, synthetic, or a folder of shards"):
        train.pretrain(dataclasses.replace(tiny, data=""), tmp_path / "nothing")
