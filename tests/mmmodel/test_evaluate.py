"""From a run to its report: what is counted, what is shared, and when the demo fails."""

import dataclasses
import errno
import io
import json
import math

import numpy as np
import pytest
import torch
from builders import batch_of, learner, objective_learner, samples
from PIL import Image

from mmmodel import atomic, cli, configs, evaluate, export, held_out, retrieval, start, train
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_shard
from mmmodel.features import Item
from mmmodel.pretraining import Corpus


@pytest.fixture(scope="module")
def report(run):
    returned = evaluate.evaluate(run)
    written = json.loads((run / "report.json").read_text())
    assert written == json.loads(json.dumps(returned))
    return written


def test_report_has_the_promised_form(report):
    assert report.keys() == {"tasks", "start", "unscored", "objectives", "guesses", "data", "seconds", "versions"}
    assert [task["name"] for task in report["tasks"]] == ["speech_to_text", "image_to_text", "speech_to_image"]
    for task in report["tasks"]:
        assert task.keys() == {"name", "n", "chance", "untrained", "pretrained", "gain_r10_ci95"}
        for kind in ("chance", "untrained", "pretrained"):
            rates = task[kind]
            assert rates.keys() == {"r1", "r5", "r10"}
            assert 0 <= rates["r1"] <= rates["r5"] <= rates["r10"] <= 1
        low, high = task["gain_r10_ci95"]
        assert low <= task["pretrained"]["r10"] - task["untrained"]["r10"] <= high
    evaluate.show(report)


def test_another_split_leaves_the_test_scores(run):
    own = evaluate.evaluate(run)
    evaluate.evaluate(run, split="validation")
    assert json.loads((run / "report.json").read_text())["data"] == own["data"]
    assert json.loads((run / "report-validation.json").read_text())["data"]["split"] == "validation"


def test_a_split_without_samples_is_one_line(run):
    with pytest.raises(ConfigError, match="no samples of split 'recordings'"):
        evaluate.evaluate(run, split="recordings")


def test_embed_equals_the_head_on_each_item_and_shares_features():
    _, learned = learner()
    items, features = samples()
    shared = dataclasses.replace(items[0], key="again", language="yy", rows={"image": items[0].rows["image"]})
    points = evaluate.embed(learned, Corpus([*items, shared], features), [*items, shared])
    batch = batch_of(learned, items, features)
    with torch.no_grad():
        packed = learned.model.encode(learned.model.streams(batch), batch.layout, learned.model.isolated())
        expected = learned.objectives["contrastive"].points(packed, batch.layout, batch.modality).numpy()
    for point, (sample, modality, _, _) in zip(expected, batch.layout.segments.tolist(), strict=True):
        np.testing.assert_allclose(points[("text", "image", "audio")[modality]][sample], point, atol=1e-5)
    np.testing.assert_array_equal(points["image"][-1], points["image"][0])
    assert np.isnan(points["text"][-1]).all()


def png(brightness):
    data = io.BytesIO()
    Image.new("RGB", (32, 16), (brightness, 0, 0)).save(data, "PNG")
    return data.getvalue()


def items_in(languages, concepts):
    return [
        Item(f"{c}{i}/{lang}", f"{c}{i}", lang, c, "test", {}) for lang in languages for i, c in enumerate(concepts)
    ]


def test_tasks_are_scored_per_language_and_pooled_over_the_three():
    """Speech finds its text in fr and el, never in es: pooled counts fr and es (ru is absent) and leaves el out."""
    items = items_in(("fr", "es", "el"), "abcdefghijklmnopqrstuvwx")
    rng = np.random.default_rng(0)
    text = rng.normal(size=(len(items), 8)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    speech = text.copy()
    speech[24:48] *= -1
    outcomes = evaluate.ranks({"text": text, "image": text, "audio": speech}, items)
    assert retrieval.recall(outcomes["speech_to_text", "fr"].before_hit)["r1"] == 1
    assert retrieval.recall(outcomes["speech_to_text", "es"].before_hit)["r10"] == 0
    rows = [row for row in evaluate.task_names(outcomes, pooled=evaluate.POOLED) if row[1] == "speech_to_text"]
    assert rows == [
        ("speech_to_text", "speech_to_text", ["fr", "es"]),
        ("speech_to_text.fr", "speech_to_text", ["fr"]),
        ("speech_to_text.es", "speech_to_text", ["es"]),
        ("speech_to_text.el", "speech_to_text", ["el"]),
    ]
    pooled = evaluate._score(rows[0], outcomes, outcomes)
    assert pooled["n"] == 48
    assert pooled["pretrained"]["r10"] == 0.5
    assert pooled["chance"]["r10"] == pytest.approx(10 / 24)
    assert pooled["gain_r10_ci95"] == [0, 0]
    assert evaluate.task_names(outcomes)[0] == ("speech_to_text", "speech_to_text", ["fr", "es", "el"])


def test_one_concept_is_not_scored():
    """Whatever is answered is right."""
    points = dict.fromkeys(("text", "image", "audio"), np.eye(3, dtype=np.float32))
    assert evaluate.ranks(points, items_in(("fr",), "aaa")) == {}
    assert evaluate.ranks(points, items_in(("fr",), "aab")) != {}


def write_captioned(folder, languages, **manifest):
    """Four held-out pictures in each language; a manifest.json beside them where one is given."""
    samples = [
        {"__key__": f"{tag}{i}", "txt": f"a {i}", "png": png(40 * i), "json": {"split": "test", "lang": tag}}
        for tag in languages
        for i in range(4)
    ]
    folder.mkdir()
    write_shard(folder / "a-0.tar", samples)
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_pooled_row_is_over_every_language_but_of_the_stamps(run, tmp_path):
    own = write_captioned(tmp_path / "own", ("en", "fr"))
    found = {task["name"]: task["n"] for task in evaluate.evaluate(run, data=str(own))["tasks"]}
    assert found == {"image_to_text": 8, "image_to_text.en": 4, "image_to_text.fr": 4}
    stamps = write_captioned(tmp_path / "stamps", ("en", "fr"), data="stamps")
    found = {task["name"]: task["n"] for task in evaluate.evaluate(run, data=str(stamps))["tasks"]}
    assert found == {"image_to_text": 4, "image_to_text.en": 4, "image_to_text.fr": 4}


def test_pairs_that_the_three_tasks_lack_are_asked_both_ways():
    """A demo's table stays three tasks long; text and video, or a sensor, have scores too."""
    assert evaluate.tasks_of(("text", "image", "audio")) == evaluate.TASKS
    assert evaluate.tasks_of(("text", "video")) == {
        "text_to_video": ("text", "video"),
        "video_to_text": ("video", "text"),
    }
    assert list(evaluate.tasks_of(("image", "audio", "motion"))) == [
        "speech_to_image",
        "image_to_motion",
        "speech_to_motion",
        "motion_to_image",
        "motion_to_speech",
    ]


def gif(brightness):
    data = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (brightness, 20 * i, 0)) for i in range(3)]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    return data.getvalue()


def test_text_and_video_are_scored(tmp_path, capsys):
    splits = 8 * ["train"] + 6 * ["test"]
    clips = [
        {"__key__": f"k{i}", "txt": f"a {i}", "gif": gif(15 * i), "json": {"split": split}}
        for i, split in enumerate(splits)
    ]
    write_shard(tmp_path / "a-0.tar", clips)
    fields = ("model.modalities=text,video", "objectives.matching.weight=0", "steps=1", f"data={tmp_path}")
    train.pretrain(configs.override(configs.tiny(), fields), tmp_path / "run")
    cli.main(["evaluate", "--from", str(tmp_path / "run")])
    tasks = json.loads((tmp_path / "run" / "report.json").read_text())["tasks"]
    assert {task["name"]: task["n"] for task in tasks} == {"text_to_video": 6, "video_to_text": 6}
    printed = capsys.readouterr().out
    assert "6 test samples of 6 concepts" in " ".join(printed.split())  # the title is as wide as the table
    assert "…" not in printed  # everything fits, a rate of 100 too
    assert "not scored" not in printed


def test_items_without_speech_ask_nothing_but_can_be_found():
    items = items_in(("fr",), "abc")
    points = np.eye(3, dtype=np.float32)
    speech = points.copy()
    speech[1] = np.nan
    outcomes = evaluate.ranks({"text": points, "image": points, "audio": speech}, items)
    assert len(outcomes["speech_to_text", "fr"].before_hit) == 2
    assert outcomes["speech_to_text", "fr"].chance["r1"] == pytest.approx(1 / 3)


def bar(speech, image, low=0.01):
    chance = {"r1": 0.01, "r5": 0.04, "r10": 0.08}
    return {
        "tasks": [
            {"name": "speech_to_text", "chance": chance, "pretrained": {"r10": speech}, "gain_r10_ci95": [low, 0.5]},
            {"name": "image_to_text", "chance": chance, "pretrained": {"r10": image}, "gain_r10_ci95": [0.01, 0.5]},
        ]
    }


def test_demo_fails_below_its_bars():
    assert evaluate.failures(bar(0.25, 0.17), "demo") == []
    assert evaluate.failures(bar(0.23, 0.17), "demo")[0].startswith("speech_to_text: R@10 is 0.230, expected at least")
    assert len(evaluate.failures(bar(0.23, 0.15), "demo")) == 2
    assert "not above zero" in evaluate.failures(bar(0.25, 0.17, low=0.0), "demo")[0]


def test_the_command_exits_non_zero_below_the_bars(report, run, monkeypatch, capsys):
    cli.main(["evaluate", "--run", str(run)])
    assert "speech_to_text" in capsys.readouterr().out
    monkeypatch.setitem(evaluate.REQUIREMENTS, "quick", {"speech_to_text": 1e9})
    with pytest.raises(SystemExit, match="below the bar: speech_to_text"):
        cli.main(["evaluate", "--run", str(run), "--require", "quick"])


def test_what_cannot_be_scored_is_said_and_the_objectives_shown(run, tmp_path, capsys):
    captions = [{"__key__": f"k{i}", "txt": f"a {i}", "json": {"split": "test"}} for i in range(4)]
    write_shard(tmp_path / "a-0.tar", captions)
    cli.main(["evaluate", "--from", str(run), "--data", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "not scored: fewer than two concepts have both in one language: speech_to_text" in printed
    assert "Retrieval" not in printed
    assert "masked_text/loss" in printed
    assert "contrastive" not in printed  # it finds nothing here: a loss of 0 would be no figure
    assert "matching" not in printed


def test_a_run_without_alignment_shows_its_objectives(shards, tmp_path, capsys):
    fields = ("objectives.contrastive.weight=0", "objectives.masked_image.weight=1", "steps=1", f"data={shards}")
    train.pretrain(configs.override(configs.tiny(), fields), tmp_path)
    cli.main(["evaluate", "--from", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "masked_image/of_mean" in printed
    assert "not scored: retrieval, which needs the contrastive objective: its weight is 0" in printed
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["tasks"] == []
    assert f"masked_text/loss {written['objectives']['masked_text/loss']:.3f} {math.log(280):.3f} cross" in printed


def test_scores_that_cannot_be_kept_are_given_all_the_same(run, monkeypatch, caplog, capsys):
    """As of a run in a folder of somebody else's."""

    def forbidden(**_):
        raise PermissionError(errno.EACCES, "Permission denied", "a temporary name")

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", forbidden)
    cli.main(["evaluate", "--from", str(run)])
    assert "speech_to_text" in capsys.readouterr().out
    assert caplog.messages == [f"{run}/report.json: not kept: Permission denied"]


def test_figures_are_read_from_the_device_once(monkeypatch):
    """Not one by one: matching's draws apart, nothing waits for a GPU."""
    _, learned = objective_learner("objectives.matching.weight=0")
    items, features = samples()
    reads = []
    for name in ("__float__", "item", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda own, original=original: reads.append(own.is_floating_point()) or original(own)
        )
    found = held_out.figures(learned, Corpus(items, features), items, batches=3)
    assert len(found) > 3
    assert sum(reads) == 1


def test_a_batch_without_words_is_no_loss_of_0():
    """A batch is in one language: in the second there is nothing to read, which would halve the mean."""
    _, learned = learner()
    items, features = samples(present=6 * [("text", "image")])
    silent = [dataclasses.replace(item, language="yy", rows={"image": item.rows["image"]}) for item in items]
    alone, both = (held_out.figures(learned, Corpus(part, features), part) for part in (items, items + silent))
    assert both["masked_text/loss"] == pytest.approx(alone["masked_text/loss"], rel=0.1)
    assert "masked_text/loss" not in held_out.figures(learned, Corpus(silent, features), silent)


def test_a_sample_with_nothing_beside_it_is_no_perfect_alignment():
    """Alone in its batch it is its own nearest, and has no false pairs."""
    _, learned = learner()
    items, features = samples(present=3 * [("text", "image", "audio")])
    found = held_out.figures(learned, Corpus(items[:1], features), items[:1])
    assert {name.partition("/")[0] for name in found} == {"masked_text"}
    found = held_out.figures(learned, Corpus(items, features), items)
    assert {name.partition("/")[0] for name in found} == {"contrastive", "masked_text", "matching"}


def test_nothing_to_score_and_no_figure_is_an_error(shards, tmp_path):
    fields = ("objectives.contrastive.weight=0", "objectives.matching.weight=0", "steps=1", f"data={shards}")
    train.pretrain(configs.override(configs.tiny(), fields), tmp_path / "run")
    write_shard(tmp_path / "a-0.tar", [{"__key__": "k", "png": png(9), "json": {"split": "test"}}])
    with pytest.raises(SystemExit, match="no task can be scored"):
        cli.main(["evaluate", "--from", str(tmp_path / "run"), "--data", str(tmp_path)])


def test_what_a_run_began_with_is_not_called_untrained(run, report, tmp_path, capsys):
    """The baseline is drawn at random whatever the run began with."""
    evaluate.show(report)
    printed = capsys.readouterr().out
    assert "untrained" in printed
    assert "random weights" not in printed
    train.pretrain(dataclasses.replace(start.configured(run), steps=1), tmp_path)
    cli.main(["evaluate", "--from", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "untrained" not in printed
    assert "random weights" in printed
    assert "This run began with" in printed
    assert json.loads((tmp_path / "report.json").read_text())["start"] == str(run)


@pytest.mark.parametrize(("loaded", "begun"), [(True, "bert"), (False, "")])  # False: its shape, from random weights
def test_a_language_models_weights_are_a_start(run, tmp_path, loaded, begun):
    opened = export.open_run(run)
    config = dataclasses.replace(opened.config, language_model="bert", load_language_model=loaded)
    export.write(tmp_path / export.FILE, opened.tensors, config, opened.tokenizer)
    assert evaluate.evaluate(tmp_path)["start"] == begun


def test_a_run_is_scored_on_other_data(run, tmp_path):
    from mmmodel.data import synthetic

    other = synthetic.prepare(tmp_path / "other", samples=60, seed=3)
    own = evaluate.evaluate(run)
    found = evaluate.evaluate(run, data=str(other))
    assert found["data"]["name"] == str(other)
    assert found["tasks"]
    written = json.loads((run / "report.json").read_text())
    assert written["data"] == own["data"]  # the run's own stays
