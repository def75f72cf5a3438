"""Studies: every variant is a configuration that exists, and a study goes on where it stopped."""

import dataclasses
import json

import pytest
import torch

from mmmodel import ablation, configs, language_model, objectives, train, update
from mmmodel.configs import ConfigError


@pytest.fixture
def small(monkeypatch, tiny):
    monkeypatch.setattr(configs, "demo", lambda: dataclasses.replace(tiny, steps=2))


def test_a_study_runs_its_variants_once_and_writes_what_it_found(small, tmp_path, monkeypatch, capsys):
    names = ("alignment alone", "masked text and matching, no alignment")
    ablation.run("objectives", tmp_path, only=names, shared=("lr=0.001",), folder=None)
    written = json.loads((tmp_path / "objectives.json").read_text())
    assert [row["name"] for row in written["variants"]] == list(names)
    for row in written["variants"]:
        assert row["steps"] == 2
        assert "lr=0.001" in row["set"]
        assert {task["name"] for task in row["tasks"]} == {"speech_to_text", "image_to_text", "speech_to_image"}
        assert all(0 <= task["pretrained"]["r10"] <= 1 for task in row["tasks"])
    assert "alignment alone" in capsys.readouterr().out
    # Done variants train no further step, and stay in the table when others are asked for.
    monkeypatch.setattr(update, "train_step", None)
    ablation.run("objectives", tmp_path, only=names[:1], shared=("lr=0.001",), folder=None)
    assert len(json.loads((tmp_path / "objectives.json").read_text())["variants"]) == 2


def test_meaning_is_left_out_where_nothing_teaches_it(small, tmp_path, caplog):
    """The shards have no English captions: the rows before it and behind it are kept."""
    names = ("alignment alone", "with the meaning of captions", "with masked text")
    teacher = (f"objectives.meaning.teacher={tmp_path}",)  # a folder that is there, which nobody comes to read
    ablation.run("objectives", tmp_path, only=names, shared=teacher, folder=None)
    written = json.loads((tmp_path / "objectives.json").read_text())
    assert [row["name"] for row in written["variants"]] == ["alignment alone", "with masked text"]
    assert "left out: with the meaning of captions: objectives: meaning has no captions to read" in caplog.text
    with pytest.raises(ConfigError, match="meaning has no captions to read"):
        ablation.run("objectives", tmp_path, only=names[1:2], shared=teacher, folder=None)


def test_a_teacher_that_is_not_there_is_named_before_anything_runs(small, tmp_path):
    """Wherever its variant stands in the study, and whether or not the data have captions for it."""
    fields = ("objectives.meaning.teacher=mistyped",)
    with pytest.raises(ConfigError, match="meaning has no teacher: language model: mistyped is neither a folder"):
        ablation.run("objectives", tmp_path, only=(), shared=fields, folder=None)
    assert not any(tmp_path.iterdir())


def test_a_finished_study_asks_no_teacher(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "sentence_vectors", lambda _, texts: torch.eye(len(texts), 384))
    (tmp_path / "teacher").mkdir()
    fields = ("objectives.meaning.language=xx", f"objectives.meaning.teacher={tmp_path / 'teacher'}")
    name = "with the meaning of captions"
    ablation.run("objectives", tmp_path, only=(name,), shared=fields, folder=None)
    (tmp_path / "teacher").rmdir()
    capsys.readouterr()
    ablation.run("objectives", tmp_path, only=(name,), shared=fields, folder=None)
    assert "R@10 in percent" in capsys.readouterr().out


def test_rows_are_kept_where_a_later_variant_fails(small, tmp_path, monkeypatch):
    pretrain = train.pretrain
    monkeypatch.setattr(train, "pretrain", lambda config, out: "masked" not in out.name and pretrain(config, out))
    with pytest.raises(SystemExit):
        ablation.run("objectives", tmp_path, only=("alignment alone", "with masked text"), shared=(), folder=None)
    written = json.loads((tmp_path / "objectives.json").read_text())
    assert [row["name"] for row in written["variants"]] == ["alignment alone"]


@pytest.mark.parametrize("name", ablation.OBJECTIVES)
def test_variants_train_what_they_say(name):
    config = configs.override(configs.demo(), ablation.OBJECTIVES[name])
    middle = config.steps // 2  # even: all that runs every second step runs there
    running = {
        objective
        for objective in objectives.OBJECTIVES
        if objectives.weight_at(getattr(config.objectives, objective), middle, config.steps)
    }
    assert ("contrastive" in running) == ("no alignment" not in name)
    assert ("masked_text" in running) == ("masked text" in name)
    assert ("matching" in running) == ("matching" in name)
    assert ("masked_image" in running) == ("masked image" in name)
    assert ("meaning" in running) == ("meaning" in name)


def test_unknown_variants_and_a_missing_language_model_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no variant \['all'\], expected some of alignment alone"):
        ablation.run("objectives", tmp_path, only=("all",), shared=(), folder=None)
    with pytest.raises(ConfigError, match="needs --language-model"):
        ablation.run("language-model", tmp_path, only=(), shared=(), folder=None)
