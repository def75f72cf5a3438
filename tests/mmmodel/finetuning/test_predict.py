"""`mmmodel predict`: what a fine-tuned model says of samples without labels is what it was scored by with them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import soundfile
from builders import QUICK_FINETUNING
from PIL import Image
from pyarrow import parquet

from mmmodel import cli, embed
from mmmodel.configs import ConfigError
from mmmodel.data.loader import ShardDataset
from mmmodel.data.shards import write_index, write_shard
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.predict import Predictor
from mmmodel.finetuning.run import finetune

QUICK = dataclasses.replace(QUICK_FINETUNING, epochs=8, batch_size=8)
LABELS = {"classification": "colour", "multilabel": "names", "regression": "size", "qa": "colour"}


@pytest.fixture(scope="module")
def tuned(run, labelled, tmp_path_factory):
    """task -> a folder and its report."""
    made = {}
    for task, label in LABELS.items():
        folder = tmp_path_factory.mktemp(task)
        question = "about" if task == "qa" else ""
        config = dataclasses.replace(QUICK, task=task, label=label, question=question, data=str(labelled))
        made[task] = folder, finetune(run, config, folder)
    return made


@pytest.fixture
def unlabelled(labelled, tmp_path):
    """The test samples with nothing but text and, for qa, the question; one more has nothing that the model reads."""
    read = ShardDataset(labelled, "test")
    rows = [
        {"__key__": key, "txt": read.read_text(i), "json": {"about": meta["about"]}}
        for i, (key, meta) in enumerate(zip(read.keys, read.metas, strict=True))
    ]
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    write_index(folder, write_shard(folder / "a-0.tar", [*rows, {"__key__": "empty", "json": {"about": "?"}}]))
    return folder


@pytest.mark.parametrize("task", LABELS)
def test_predictions_without_labels_have_the_score_of_the_report(task, tuned, labelled, unlabelled, tmp_path, capsys):
    folder, report = tuned[task]
    out = tmp_path / "made" / "p.parquet"
    cli.main(["predict", "--from", str(folder), "--data", str(unlabelled), "--out", str(out)])
    assert f"{out}: 16 rows; 1 samples have nothing that the model reads" in capsys.readouterr().out
    rows = parquet.read_table(out).to_pylist()
    truth = {meta["key"]: meta for meta in ({**e.meta, "key": e.key} for e in ShardDataset(labelled, "test").entries)}
    assert [row["key"] for row in rows] == sorted(truth)
    expected = [truth[row["key"]][LABELS[task]] for row in rows]
    if task == "regression":
        assert list(rows[0]) == ["key", "predicted"]
        errors = [abs(row["predicted"] - value) for row, value in zip(rows, expected, strict=True)]
        assert np.mean(errors) == pytest.approx(report["test"]["mae"], rel=1e-5)
        return
    names = [f"score_{name}" for name in report["classes"]]
    assert list(rows[0]) == ["key", "predicted", *names]
    scores = np.array([[row[name] for name in names] for row in rows])
    if task == "multilabel":
        for row, found in zip(rows, scores, strict=True):
            assert row["predicted"] == [name for name, s in zip(report["classes"], found, strict=True) if s >= 0.5]
        right = sum(len(set(row["predicted"]) & set(names)) for row, names in zip(rows, expected, strict=True))
        said = sum(len(row["predicted"]) + len(names) for row, names in zip(rows, expected, strict=True))
        assert 2 * right / said == pytest.approx(report["test"]["micro_f1"])
        return
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    assert [row["predicted"] for row in rows] == [report["classes"][i] for i in scores.argmax(1)]
    right = np.mean([row["predicted"] == value for row, value in zip(rows, expected, strict=True)])
    assert right == pytest.approx(report["test"]["accuracy"])


def test_retrieval_gives_the_vectors_that_embed_gives(run, shards, tmp_path):
    finetune(run, FinetuneConfig(task="retrieval", label="concept", data=str(shards), epochs=1), tmp_path / "tuned")
    cli.main(["predict", "--from", str(tmp_path / "tuned"), "--split", "test", "--out", str(tmp_path / "p.parquet")])
    embed.write(tmp_path / "v.parquet", tmp_path / "tuned", str(shards), split="test", joint=False)
    assert parquet.read_table(tmp_path / "p.parquet").equals(parquet.read_table(tmp_path / "v.parquet"))


def test_lists_in_csv_and_jsonl(tuned, tmp_path):
    for suffix in ("csv", "jsonl"):
        arguments = ["--split", "test", "--out", str(tmp_path / f"p.{suffix}")]
        cli.main(["predict", "--from", str(tuned["multilabel"][0]), *arguments])
    with (tmp_path / "p.csv").open(newline="") as file:
        read = [json.loads(row["predicted"]) for row in csv.DictReader(file)]
    assert read == [json.loads(line)["predicted"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert any(read)


def test_one_sample_is_as_in_the_table(tuned, labelled, tmp_path):
    predictor = Predictor(tuned["classification"][0])
    read = ShardDataset(labelled, "test")
    ((first, *_),) = predictor.rows(*predictor.prepare(read))
    assert list(predictor.one(text=read.read_text(0)).values()) == pytest.approx(list(first[1:]), abs=1e-5)
    Image.new("RGBA", (40, 30), "teal").save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16_000)
    said = predictor.one(image=tmp_path / "a.png", audio=str(tmp_path / "a.wav"), text="red")
    assert said["predicted"] in predictor.labels.classes


def test_a_model_of_some_modalities_says_which(run, labelled, tmp_path):
    finetune(run, FinetuneConfig(label="colour", data=str(labelled), modalities=("text",), epochs=1), tmp_path)
    with pytest.raises(ConfigError, match="predict: the model was fine-tuned to read text, got image"):
        Predictor(tmp_path).one(text="red", image=np.zeros((16, 16, 3), np.uint8))


def test_a_mistake_is_one_line_and_leaves_no_file(run, tuned, unlabelled, tmp_path):
    folder = str(tuned["classification"][0])
    (out := tmp_path / "out").mkdir()
    for arguments, message in (
        (["--from", str(run), "--out", str(out / "p.csv")], "is not fine-tuned; `mmmodel finetune` writes such files"),
        (["--from", folder, "--out", str(out / "p.xls")], r"suffix is '.xls', expected .parquet, .csv, .jsonl"),
        (["--from", folder, "--split", "none", "--out", str(out / "p.csv")], r"holds no sample of split 'none'"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["predict", *arguments])
    empty = tmp_path / "empty"
    empty.mkdir()
    write_index(empty, write_shard(empty / "a-0.tar", [{"__key__": "k", "json": {}}]))
    with pytest.raises(SystemExit, match=r"predict: none of the 1 samples of .* has any of text, image, audio"):
        cli.main(["predict", "--from", folder, "--data", str(empty), "--out", str(out / "p.csv")])
    assert list(out.iterdir()) == []
