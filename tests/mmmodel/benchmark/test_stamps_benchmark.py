"""The benchmark on a tiny synthetic run: its form, and that a second call goes on where the first stopped."""

import dataclasses
import itertools
import json

import pytest
import torch

from mmmodel import cli, configs, train
from mmmodel.benchmark import parts, report, stamps
from mmmodel.benchmark.protocol import INPUTS, Protocol
from mmmodel.configs import ConfigError
from mmmodel.data.recordings import RECORDINGS
from mmmodel.export import export, from_pretrained, open_run
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.run import finetune
from mmmodel.limits import CheckpointError

TINY = Protocol(
    language="xx",
    labels_per_class=(2, 0),
    finetune_labels=(2,),
    finetune_inputs=("image",),
    seeds=2,
    finetune_seeds=2,
    strengths=(0.1,),
    finetune={arm: FinetuneConfig(epochs=1) for arm in ("baseline", "pretrained")},
    resamples=50,
)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Two runs of two steps that differ in their seed."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("run"))
        config = dataclasses.replace(configs.tiny(), data=str(shards), steps=2, seed=seed, hold_out_speech="xx:0.25")
        train.pretrain(config, folders[-1])
    return folders


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    return out, stamps.run(runs, out, protocol=TINY)


def test_the_report_has_issue_2s_form_and_classification(finished):
    out, made = finished
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(made))
    assert made["complete"]
    names = ["speech_to_text", "image_to_text", "speech_to_image", "known_speech_to_text", "known_speech_to_image"]
    assert [task["name"] for task in made["tasks"]] == names
    for task in made["tasks"]:
        assert {"name", "n", "chance", "untrained", "pretrained", "gain_r10_ci95"} <= task.keys()
        low, high = task["gain_r10_ci95"]
        assert low - 1e-9 <= task["pretrained"]["r10"] - task["untrained"]["r10"] <= high + 1e-9
        assert len(task["r10_of_runs"]["pretrained"]) == 2
    rows = {row["name"]: row for row in made["classification"]}
    probes = [f"probe.{inputs}.{labels}" for inputs in INPUTS for labels in ("2", "all")]
    assert list(rows) == [*probes, "finetune.image.2"]
    assert rows["finetune.image.2"]["repeats"] == 4  # two runs of two seeds
    assert rows["probe.all.all"]["repeats"] == 2  # with all labels nothing is drawn
    for row in rows.values():
        assert 0 <= row["baseline"] <= 1
        assert 0 <= row["pretrained"] <= 1
    assert "| frozen probe | image | 2 | 4 |" in (out / "report.md").read_text()


def test_a_second_call_goes_on_where_the_first_stopped(runs, finished, tmp_path):
    cut = stamps.run(runs, tmp_path, budget_minutes=1e-9, protocol=TINY)
    assert not cut["complete"]
    assert len(cut["left"]) == 2 * (2 + 2 * 2)  # two runs: retrieval, probe, two seeds of two arms
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "retrieval-0.json").write_bytes((finished[0] / "parts" / "retrieval-0.json").read_bytes())
    stamp = (tmp_path / "parts" / "retrieval-0.json").stat().st_mtime_ns
    whole = stamps.run(runs, tmp_path, protocol=TINY)
    assert (tmp_path / "parts" / "retrieval-0.json").stat().st_mtime_ns == stamp
    for kind in ("tasks", "classification"):  # the same figures as in one go
        assert json.loads(json.dumps(whole[kind])) == json.loads(json.dumps(finished[1][kind]))


def test_one_strength_for_all_seeds_by_their_mean_on_validation():
    """The first seed alone would choose 1.0, both together 0.01; of equals the smaller."""
    scores = [{"0.01": 0.5, "1.0": 0.6, "0.1": 0.2}, {"0.01": 0.5, "1.0": 0.3, "0.1": 0.8}]
    rows = [{"tried": {strength: {"validation": value} for strength, value in row.items()}} for row in scores]
    assert report.best_strength(rows) == "0.01"
    assert report.best_strength(rows[:1]) == "1.0"


def test_recordings_that_training_never_heard_ask_for_what_it_saw(runs):
    subject = parts.open_subject(open_run(runs[0]), 0)
    recordings = subject.corpus.split(RECORDINGS)
    assert recordings
    found = parts.retrieval(subject)["known_speech_to_text"]["xx"]
    training = {item.concept for item in subject.corpus.split("train")}
    assert set(found["concepts"]) <= training
    assert len(found["concepts"]) <= len(recordings)
    heard = {item.rows["audio"] for item in subject.corpus.split("train") if "audio" in item.rows}
    assert not heard & {item.rows["audio"] for item in recordings}


def test_both_arms_of_a_seed_get_the_same_labels_and_the_baseline_its_own_weights(runs, monkeypatch):
    one, other = (parts.open_subject(open_run(run), number) for number, run in enumerate(runs))
    data, began, train = parts.labelled(one, TINY), [], parts.train
    assert not {item.concept for item in data.train} & {item.concept for item in data.test}

    def watched(learner, data, config):
        began.append(([item.key for item in data.train], learner.model.blocks[0].qkv.weight.detach().clone()))
        return train(learner, data, config)

    monkeypatch.setattr(parts, "train", watched)
    for subject, seed, arm in (
        (one, 0, "pretrained"),
        (one, 0, "baseline"),
        (one, 1, "baseline"),
        (other, 0, "baseline"),
    ):
        found = parts.finetuned(subject, TINY, "image", 2, seed, arm)
        assert len(found["correct"]) == len(data.test)
    labels, weights = zip(*began, strict=True)
    assert labels[0] == labels[1] != labels[2]
    assert torch.equal(weights[0], open_run(runs[0]).tensors["model.blocks.0.qkv.weight"])
    assert not any(torch.equal(*pair) for pair in itertools.combinations(weights, 2))


def test_runs_that_are_not_one_recipe_are_refused(runs, finished, tmp_path):
    with pytest.raises(ConfigError, match=r"have seeds \[0, 0\], expected different ones"):
        stamps.run([runs[0], runs[0]], tmp_path, protocol=TINY)
    first = open_run(runs[0]).config
    longer = dataclasses.replace(first, seed=1, model=dataclasses.replace(first.model, layers=3))
    with pytest.raises(ConfigError, match=r"the runs differ in model\.layers 2 -> 3, expected the same but for"):
        stamps._check_alike([first, longer])
    with pytest.raises(ConfigError, match="holds the benchmark of other protocol"):
        stamps.run(runs, finished[0], protocol=dataclasses.replace(TINY, seeds=3))
    with pytest.raises(ConfigError, match="holds the benchmark of other runs"):
        stamps.run(runs[:1], finished[0], protocol=TINY)


def test_a_run_of_other_data_than_the_stamps_is_refused(runs, shards, tmp_path):
    """With the command's own protocol: it asks for French, and the synthetic samples are of a language xx."""
    expected = "^benchmark: expected a run trained on the stamps: pictures with a category, in the language fr; "
    found = rf"{runs[0]}/model\.safetensors was trained on {shards} \(text, image, audio; languages xx\)$"
    with pytest.raises(ConfigError, match=expected + found):
        stamps.run(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_run_is_refused(runs, shards, tmp_path):
    finetune(runs[0], FinetuneConfig(label="category", data=str(shards), epochs=1), tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="is fine-tuned, the heads of its pretraining are gone"):
        stamps.run([tmp_path / "tuned"], tmp_path / "out", protocol=TINY)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished_is_refused(runs, tmp_path):
    config = open_run(runs[0]).config
    export(tmp_path / "model.safetensors", from_pretrained(runs[0]), config, step=1)
    with pytest.raises(ConfigError, match=r"model\.safetensors is of step 1 of 2: finish the run"):
        stamps.run([tmp_path], tmp_path / "out", protocol=TINY)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_left(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stamps, "Protocol", lambda: TINY)
    arguments = ["evaluate", "--benchmark", "stamps", "--from", str(runs[0]), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="parts are left; the same command goes on"):
        cli.main([*arguments, "--budget-minutes", "1e-9"])
    cli.main(arguments)
    assert report.markdown(json.loads((tmp_path / "report.json").read_text())) in capsys.readouterr().out
