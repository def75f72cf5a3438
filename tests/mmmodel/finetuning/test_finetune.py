"""From a run and labelled shards to a fine-tuned model: every task learns, and what is saved is what was scored."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from builders import QUICK_FINETUNING as QUICK
from builders import batch_of, learner, samples
from matplotlib import pyplot

from mmmodel import cli, plot
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_index, write_shard
from mmmodel.export import from_pretrained, open_run
from mmmodel.finetuning import loop
from mmmodel.finetuning import run as finetuning
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import FineTuned, make_loss, parameter_groups
from mmmodel.finetuning.tasks import evaluate_on
from mmmodel.limits import CheckpointError
from mmmodel.model import Model


@pytest.mark.parametrize(
    ("task", "label", "bar"),
    [
        ("classification", "colour", 0.95),  # a third by chance
        ("multilabel", "names", 0.7),
        ("regression", "size", 0.3),  # 0 for the mean
        ("qa", "colour", 0.95),
    ],
)
def test_each_task_learns_and_what_is_saved_is_what_was_scored(run, labelled, tmp_path, task, label, bar):
    config = dataclasses.replace(QUICK, task=task, label=label, data=str(labelled))
    if task == "qa":
        config = dataclasses.replace(config, question="about")
    report = finetuning.finetune(run, config, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["counts"] == {"train": 64, "validation": 16, "test": 16, "without_label": 0}
    assert report["validation"][report["score"]] >= bar
    assert report["loaded"]["missing"] == report["loaded"]["misshapen"] == []
    assert len(report["loaded"]["matched"]) == len(open_run(run).tensors) - sum(
        name.startswith("objectives.") for name in open_run(run).tensors
    )
    again, labels, read_config = finetuning.load(tmp_path)
    assert read_config == config
    assert list(labels.classes) == report["classes"]
    data, _ = finetuning.read_labelled(open_run(run).config, again.model, config)
    with torch.no_grad():
        assert evaluate_on(again, data, data.test) == pytest.approx(report["test"])
        assert evaluate_on(again, data, data.validation) == pytest.approx(report["validation"])


def test_retrieval_starts_from_the_runs_own_head_and_saves_it_where_a_run_has_it(run, shards, tmp_path):
    config = dataclasses.replace(QUICK, task="retrieval", label="concept", data=str(shards), epochs=2, lr=1e-3)
    report = finetuning.finetune(run, config, tmp_path)
    assert report["validation"].keys() == {"r1", "r5", "r10"}
    assert "objectives.contrastive.heads" in report["loaded"]["matched"]
    assert "objectives.contrastive.heads" in open_run(tmp_path).tensors
    again, _, _ = finetuning.load(tmp_path)
    data, _ = finetuning.read_labelled(open_run(run).config, again.model, config)
    assert evaluate_on(again, data, data.test) == pytest.approx(report["test"])


def test_a_test_split_that_retrieval_cannot_score_costs_no_training(run, shards, tmp_path, caplog):
    """Its samples are captions alone."""
    data = shutil.copytree(shards, tmp_path / "data")
    for path in data.glob("*test*.tar"):
        path.unlink()
    made = [{"__key__": f"t{i}", "txt": "a", "json": {"split": "test", "concept": i}} for i in "ab"]
    write_shard(data / "t.tar", made)
    config = dataclasses.replace(QUICK, task="retrieval", label="concept", data=str(data), epochs=1)
    assert finetuning.finetune(run, config, tmp_path / "out")["test"] is None
    assert "not scored: finetune: 2 samples of 2 labels have nothing to retrieve, expected two" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_test_split_that_another_task_cannot_score_is_an_error(run, labelled, tmp_path, monkeypatch):
    def refuses(*_):
        raise ConfigError("finetune: something is wrong")

    monkeypatch.setattr(finetuning, "evaluate_on", refuses)
    config = dataclasses.replace(QUICK, task="classification", label="colour", data=str(labelled), epochs=1)
    with pytest.raises(ConfigError, match="something is wrong"):
        finetuning.finetune(run, config, tmp_path)


def test_a_label_that_no_training_sample_has_is_told(run, tmp_path, caplog):
    said = [("train", "a"), ("train", "b")] * 4 + [("validation", "a"), ("validation", "c"), ("test", "b")]
    made = [{"__key__": f"k{i}", "txt": x, "json": {"split": split, "label": x}} for i, (split, x) in enumerate(said)]
    write_shard(tmp_path / "data.tar", made)
    config = dataclasses.replace(QUICK, label="label", data=str(tmp_path), epochs=1)
    finetuning.finetune(run, config, tmp_path / "out")
    expected = "validation: 1 of 2 samples have a label that no training sample has, such as 'c': it is never predicted"
    assert [record.message for record in caplog.records if "no training sample" in record.message] == [expected]


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_bf16_trains_under_autocast_and_scores_in_fp32(run, labelled, shards, tmp_path, task, monkeypatch):
    label, data = ("concept", shards) if task == "retrieval" else ("colour", labelled)
    seen = set()
    original = Model.forward

    def forward(model, *args):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return original(model, *args)

    monkeypatch.setattr(Model, "forward", forward)
    config = dataclasses.replace(QUICK, task=task, label=label, data=str(data), epochs=6)
    exact = finetuning.finetune(run, config, tmp_path / "fp32")
    assert seen == {(True, False), (False, False)}
    seen.clear()
    report = finetuning.finetune(run, dataclasses.replace(config, precision="bf16"), tmp_path / "bf16")
    assert seen == {(True, True), (False, False)}
    assert {tensor.dtype for tensor in open_run(tmp_path / "bf16").tensors.values()} == {torch.float32}
    assert report["validation"][report["score"]] == pytest.approx(exact["validation"][report["score"]], abs=0.15)
    assert json.loads((tmp_path / "bf16" / "finetune.json").read_text())["precision"] == "bf16"


def test_a_folder_that_was_written_before_a_field_was_there_holds_its_default(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=1)
    finetuning.finetune(run, config, tmp_path)
    path = tmp_path / "finetune.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "precision"}))
    finetuning.finetune(run, config, tmp_path)
    with pytest.raises(ConfigError, match="other precision fp32 -> bf16"):
        finetuning.finetune(run, dataclasses.replace(config, precision="bf16"), tmp_path)


def test_a_frozen_encoder_stays_as_it_was_and_the_head_learns(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=3)
    finetuning.finetune(run, config, tmp_path)
    before, after = open_run(run).tensors, open_run(tmp_path).tensors
    for name, tensor in before.items():
        if name.startswith("model."):
            assert torch.equal(after[name], tensor), name
    assert after["head.weight"].abs().sum() > 0


def test_what_needs_the_heads_of_pretraining_says_that_they_are_gone(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=1)
    finetuning.finetune(run, config, tmp_path)
    with pytest.raises(CheckpointError, match="is fine-tuned, the heads of its pretraining are gone; predict, embed,"):
        from_pretrained(tmp_path)


def test_a_model_is_read_whatever_limits_its_training_would_have_today(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=1)
    finetuning.finetune(run, config, tmp_path)
    about = json.loads(open_run(tmp_path).finetuning)
    for fields, readable in (({"lr": 5.0, "epochs": 0}, True), ({"visibility": "none"}, False)):
        changed = json.dumps({**about, "config": {**about["config"], **fields}})
        source = dataclasses.replace(open_run(tmp_path), finetuning=changed)
        if readable:
            assert finetuning.restore(source)[2].lr == 5.0
        else:
            with pytest.raises(CheckpointError, match="fine-tuning does not read: finetune: visibility is 'none'"):
                finetuning.restore(source)


def test_the_best_epoch_is_kept_and_patience_stops(run, labelled, tmp_path):
    """A rate this high spoils what the first epochs learnt: the weights kept are those of the best."""
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), lr=0.3, epochs=40, patience=3)
    report = finetuning.finetune(run, config, tmp_path)
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [line["balanced_accuracy"] for line in history]
    assert report["best_epoch"] == int(np.argmax(scores)) + 1
    assert report["validation"]["balanced_accuracy"] == pytest.approx(max(scores), rel=1e-5)
    assert report["epochs"] == len(history) == min(40, report["best_epoch"] + 3)


def test_torchrun_is_refused_before_anything_is_read(run, labelled, tmp_path, monkeypatch):
    """Each of its processes would train the same model in the same folder."""
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(ConfigError, match="finetune: is one process, expected to be started without torchrun"):
        finetuning.finetune(run, dataclasses.replace(QUICK, data=str(labelled)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_scratch_loads_nothing(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), from_scratch=True, epochs=1, seed=7)
    report = finetuning.finetune(run, config, tmp_path)
    assert report["loaded"] is None


def test_data_without_a_validation_split_gets_one(run, labelled, tmp_path):
    made = [
        {"__key__": f"k{i}", "txt": "red" if i % 2 else "blue", "json": {"colour": "red" if i % 2 else "blue"}}
        for i in range(100)
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))
    config = dataclasses.replace(QUICK, label="colour", data=str(tmp_path))
    data, counts = finetuning.read_labelled(open_run(run).config, learner()[1].model, config)
    assert 3 <= counts["validation"] <= 20
    assert counts["train"] == 100 - counts["validation"]
    assert not {item.group for item in data.train} & {item.group for item in data.validation}


def test_layers_further_from_the_head_learn_slower():
    """Two blocks: front ends at 0.5 ** 3 of the rate, block 0 at 0.25, block 1 and the last norm at 0.5, head at 1."""
    _, made = learner()
    tuned = FineTuned(made.model, 3, visibility="full", dropout=0.0)
    rate = {}
    for group in parameter_groups(tuned, lr=1.0, layer_decay=0.5, weight_decay=0.1):
        for parameter in group["params"]:
            rate[id(parameter)] = group["lr"], group["weight_decay"]
    found = {name: rate[id(parameter)] for name, parameter in tuned.named_parameters()}
    assert len(rate) == len(found)
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    assert found["model.norm.weight"] == (0.5, 0.0)
    assert found["model.blocks.1.qkv.weight"] == (0.5, 0.1)
    assert found["model.blocks.0.qkv.bias"] == (0.25, 0.0)
    assert found["model.embedding.token_weight"] == (0.125, 0.0)
    assert found["model.front_ends.audio.convs.0.weight"] == (0.125, 0.1)


def test_a_samples_output_does_not_depend_on_its_batch():
    _, made = learner()
    tuned = FineTuned(made.model, 3, visibility="full", dropout=0.0).eval()
    torch.nn.init.normal_(tuned.head.weight)
    items, features = samples()
    with torch.no_grad():
        together = tuned(batch_of(made, items, features))
        alone = torch.cat([tuned(batch_of(made, [item], features)) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_balanced_loss_by_hand():
    """Three of one class, one of the other, all equally likely: each class brings half, log 2 in all."""
    labels = Labels("classification", classes=("a", "b"))
    loss = make_loss(labels, ["a", "a", "a", "b"], balance=True)
    outputs = torch.tensor([[0.0, 0.0]] * 3 + [[0.0, 2.0]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(1 + np.exp(-2))
    assert float(loss(outputs, torch.tensor([0, 0, 0, 1]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "colours"}, "no sample has a label 'colours'; their fields are about, colour"),
        ({"modalities": ("smell",)}, "the model reads text, image, audio, not smell"),
        ({"task": "qa", "question": "none"}, "no sample has a question 'none'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(run, labelled, tmp_path, fields, message, caplog):
    """For labels and modalities before hours may have gone into decoding."""
    caplog.set_level("INFO")
    config = dataclasses.replace(QUICK, **{"label": "colour", "data": str(labelled), **fields})
    with pytest.raises(ConfigError, match=message):
        finetuning.finetune(run, config, tmp_path)
    assert ("they hold text" in caplog.text) == ("question" in fields)


@pytest.mark.parametrize("sizes", [[0], [3, 3]])
def test_a_validation_set_without_a_score_is_refused(run, tmp_path, sizes, monkeypatch):
    """R2 of one number, or of equal ones, is not defined: no epoch could be better than another.  Before any step."""
    monkeypatch.setattr(loop.Training, "advance", lambda *args: pytest.fail("it learns"))
    held = {i: size for i, size in enumerate(sizes)}
    made = [
        {"__key__": f"k{i}", "txt": "red", "json": {"size": held.get(i, i), "split": "validation" if i in held else ""}}
        for i in range(9)
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))
    config = dataclasses.replace(QUICK, task="regression", label="size", data=str(tmp_path))
    with pytest.raises(ConfigError, match=f"r2 of {len(sizes)} validation samples is nan"):
        finetuning.finetune(run, config, tmp_path / "out")


def test_a_test_score_that_is_undefined_is_left_out_of_the_report(run, tmp_path, caplog):
    splits = ["train"] * 6 + ["validation"] * 3 + ["test"]
    made = [
        {"__key__": f"k{i}", "txt": "red", "json": {"size": i % 4, "split": split}} for i, split in enumerate(splits)
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))
    config = dataclasses.replace(QUICK, task="regression", label="size", data=str(tmp_path), epochs=1)
    report = finetuning.finetune(run, config, tmp_path / "out")
    assert set(report["test"]) == {"mae", "rmse"}
    assert "the 1 test samples have no r2" in caplog.text
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)


def test_samples_without_a_question_are_left_out_with_a_word(run, tmp_path, caplog):
    caplog.set_level("INFO")
    made = [
        {
            "__key__": f"k{i}",
            "txt": "red",
            "json": {"answer": "ab"[i % 2], "split": split, "q": ["who?", " "][i % 3 == 0]},
        }
        for i, split in enumerate(["train"] * 8 + ["validation"] * 4)
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))
    config = dataclasses.replace(QUICK, task="qa", label="answer", question="q", data=str(tmp_path), epochs=1)
    assert finetuning.finetune(run, config, tmp_path / "out")["counts"]["train"] == 5
    assert "left out: 4 samples without a question 'q'" in caplog.text


def test_its_curves_show_the_validation_scores(tmp_path, recwarn, monkeypatch):
    """R2 may be below zero; of what only a pretraining has there is no panel, and no warning of matplotlib."""
    lines = [{"step": 5 * i, "epoch": i, "loss": 1 / i, "lr": 0.1, "r2": -1 / i, "seconds": 1.0} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot.plot_run(tmp_path)
    validation = figures[0].axes[1]
    assert validation.get_title() == "validation"
    assert [text.get_text() for text in validation.get_legend().get_texts()] == ["r2"]
    assert validation.get_ylim()[0] < -0.9
    assert [axis.get_title() for axis in figures[0].axes[2:4]] == ["", ""]
    assert not recwarn.list


def test_another_fine_tuning_or_a_run_is_not_written_over(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), epochs=1)
    finetuning.finetune(run, config, tmp_path)
    with pytest.raises(ConfigError, match=r"holds a fine-tuning with other lr 0.01 -> 0.1; choose"):
        finetuning.finetune(run, dataclasses.replace(config, lr=0.1), tmp_path)
    with pytest.raises(ConfigError, match="is the run to start from"):
        finetuning.finetune(run, config, run)


def test_the_commands(run, labelled, tmp_path, capsys):
    arguments = ["finetune", "--from", str(run), "--data", str(labelled), "--out", str(tmp_path / "out")]
    cli.main([*arguments, "--task", "classification", "--label", "colour", "--freeze", "encoder", "--epochs", "1"])
    assert "test: accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no sample has a label"):
        cli.main([*arguments[:-1], str(tmp_path / "other"), "--label", "none"])
    assert not (tmp_path / "other" / "finetune.json").exists()  # the corrected command may use the folder
    with pytest.raises(SystemExit, match="none: no such file"):
        cli.main(["finetune", "--from", str(tmp_path / "none"), "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="layer_decay is 2"):
        cli.main([*arguments, "--layer-decay", "2"])
