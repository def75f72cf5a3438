"""The ONNX graph, run by onnxruntime, computes what the packed model computes, at lengths it was not traced with."""

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch
from builders import batch_of, learner, samples
from tokenizers import Tokenizer

from mmmodel import cli, embed
from mmmodel.configs import ConfigError
from mmmodel.export import export
from mmmodel.export_onnx import PlainEncoder, export_onnx
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import FineTuned
from mmmodel.finetuning.predict import Predictor
from mmmodel.finetuning.run import finetune
from mmmodel.finetuning.tasks import predict

ALL = ("text", "image", "audio")


def fed(item, features, names):
    """The inputs of a sample as the graph takes them: no batch, no padding."""
    raw = {name: features.get(name, item.rows[name]) for name in names}
    as_input = {
        "text": lambda value: value.astype(np.int64),
        "image": lambda value: value[None].astype(np.float32),
        "audio": lambda value: value.astype(np.float32),
    }
    return {name: as_input[name](value) for name, value in raw.items()}


def expected(learned, item, features, names):
    """hidden and the points of the packed model, fed this sample with these modalities."""
    batch = batch_of(learned, [dataclasses.replace(item, rows={name: item.rows[name] for name in names})], features)
    with torch.no_grad():
        hidden = learned.model.encode(learned.model.streams(batch), batch.layout)
        points = learned.objectives["contrastive"].points(hidden, batch.layout, batch.modality)
    return hidden.numpy(), points.numpy()


def as_embed_has_it(learned, item, features):
    reader = object.__new__(embed.Embedder)
    reader.model = learned.model.eval()
    return reader.joint([item], features)[0]


def with_all(items, names):
    """Samples that have these modalities: the lengths of builders, from one frame and one cell upwards."""
    return [item for item in items if set(names) <= set(item.rows)]


@pytest.mark.parametrize("names", [("text",), ("image",), ("audio",), ("text", "audio"), ALL], ids="-".join)
def test_plain_encoder_equals_the_packed_model(names):
    _, learned = learner()
    items, features = samples()
    encoder = PlainEncoder(learned, names[::-1])  # the model's order counts, not the caller's
    assert tuple(encoder.modalities) == names
    for item in with_all(items, names):
        hidden, points = expected(learned, item, features, names)
        inputs = [torch.from_numpy(value) for value in fed(item, features, names).values()]
        with torch.no_grad():
            found = encoder(*inputs)
        np.testing.assert_allclose(found[0].numpy(), hidden, atol=1e-5)
        if len(names) == 1:
            np.testing.assert_allclose(found[2].numpy(), points[0], atol=1e-5)


def test_onnxruntime_equals_the_packed_model_at_every_length(tmp_path):
    _, learned = learner()
    items, features = samples()
    export_onnx(tmp_path / "joint.onnx", learned, ALL)
    session = onnxruntime.InferenceSession(tmp_path / "joint.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == list(ALL)
    lengths = set()
    for item in with_all(items, ALL):
        hidden, _ = expected(learned, item, features, ALL)
        found, joint = session.run(["hidden", "joint"], fed(item, features, ALL))
        np.testing.assert_allclose(found, hidden, atol=2e-5)
        np.testing.assert_allclose(joint, as_embed_has_it(learned, item, features), atol=2e-5)
        lengths.add(len(hidden))
    assert len(lengths) > 1


def test_the_command_writes_one_modality_with_its_point_and_its_tokenizer(tmp_path, capsys):
    """What the file says of itself is enough to make its input."""
    config, learned = learner()
    export(tmp_path / "model.safetensors", learned, config)
    path = tmp_path / "deeper" / "text.onnx"
    cli.main(["export", "--from", str(tmp_path), "--out", str(path), "--modalities", "text"])
    assert "text -> hidden, joint, point" in capsys.readouterr().out
    assert sorted(p.name for p in path.parent.iterdir()) == ["text.onnx", "text.tokenizer.json"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert {name: about[name] for name in ("modalities", "text.tokenizer", "text.cls_id", "text.max_tokens")} == {
        "modalities": "text",
        "text.tokenizer": "text.tokenizer.json",
        "text.cls_id": "0",
        "text.max_tokens": "24",
    }
    ids = [
        int(about["text.cls_id"]),
        *Tokenizer.from_file(str(path.parent / about["text.tokenizer"])).encode("two red").ids,
    ]
    (point,) = session.run(["point"], {"text": np.array(ids, np.int64)})
    np.testing.assert_allclose(point, embed.embed_one(embed.Embedder(tmp_path), text="two red"), atol=2e-5)


def test_pixels_and_frames_are_described_in_the_file(tmp_path):
    _, learned = learner()
    export_onnx(tmp_path / "a.onnx", learned, ("audio", "image"))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert (
        session.get_modelmeta().custom_metadata_map.items()
        >= {
            "modalities": "image,audio",
            "image.cell": "16",
            "image.max_cells": "6",
            "audio.sample_rate": "16000",
            "audio.hop": "160",
            "audio.mels": "8",
            "audio.max_frames": "100",
        }.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]  # no words, no tokenizer


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("visibility", ["full", "isolated"])
def test_a_fine_tuned_model_gives_the_scores_of_predict(task, visibility):
    _, learned = learner()
    items, features = samples()
    labels = Labels(task, mean=3.0, deviation=2.0) if task == "regression" else Labels(task, classes=("a", "b", "c"))
    tuned = FineTuned(learned.model, labels.outputs, visibility=visibility, dropout=0.5).eval()
    torch.nn.init.normal_(tuned.head.weight)
    encoder = PlainEncoder(learned, ALL, (tuned, labels)).eval()
    assert encoder.outputs == ["hidden", "joint", "scores"]
    for item in with_all(items, ALL):
        inputs = [torch.from_numpy(value) for value in fed(item, features, ALL).values()]
        with torch.no_grad():
            found = encoder(*inputs)[2]
            scores = labels.scores(predict(tuned, features, [item]))[0]
        np.testing.assert_allclose(found.numpy(), scores.numpy(), atol=1e-5)


def test_a_number_is_no_coarser_in_the_graph(tmp_path):
    """Times in seconds: fp32 would know them to 128 s."""
    _, learned = learner()
    items, features = samples()
    rule = Labels("regression", mean=1.7e9, deviation=10.0)
    tuned = FineTuned(learned.model, 1, visibility="full", dropout=0.0).eval()
    torch.nn.init.normal_(tuned.head.weight)
    export_onnx(tmp_path / "a.onnx", learned, ("text",), (tuned, rule))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    few = [dataclasses.replace(item, rows={"text": item.rows["text"]}) for item in with_all(items, ("text",))]
    found = [session.run(["scores"], fed(item, features, ("text",)))[0][0] for item in few]
    with torch.no_grad():
        expected_numbers = rule.scores(predict(tuned, features, few))[:, 0].numpy()
    np.testing.assert_allclose(found, expected_numbers, rtol=0, atol=1e-3)
    assert len(set(found)) > 1


def test_the_command_exports_fine_tuned_runs(run, labelled, tmp_path, capsys):
    for task, label, outputs in (("classification", "colour", "scores"), ("retrieval", "concept", "point")):
        config = FinetuneConfig(task=task, label=label, epochs=1, modalities=() if task == "retrieval" else ("text",))
        finetune(run, dataclasses.replace(config, data="" if task == "retrieval" else str(labelled)), tmp_path / task)
        capsys.readouterr()
        chosen = ["--modalities", "text"] if task == "retrieval" else []  # the other was fine-tuned on text alone
        cli.main(["export", "--from", str(tmp_path / task), "--out", str(tmp_path / f"{task}.onnx"), *chosen])
        assert f"text -> hidden, joint, {outputs}" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "classification.onnx", providers=["CPUExecutionProvider"])
    predictor = Predictor(tmp_path / "classification")
    ids = predictor.learner.model.front_ends["text"].prepare("red blue").astype(np.int64)
    (scores,) = session.run(["scores"], {"text": ids})
    about = session.get_modelmeta().custom_metadata_map
    assert about["task"] == "classification"
    said = predictor.one(text="red blue")
    for name, score in zip(json.loads(about["classes"]), scores, strict=True):
        assert score == pytest.approx(said[f"score_{name}"], abs=1e-5)


def test_a_name_that_says_another_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.pt ends in '\.pt', expected \.onnx"):
        export_onnx(tmp_path / "model.pt", learner()[1], ("text",))
    assert not list(tmp_path.iterdir())


def test_refuses_what_has_no_plain_form(monkeypatch):
    _, learned = learner()
    with pytest.raises(
        ConfigError, match=r"modalities are \('video',\), expected some of \('text', 'image', 'audio'\)"
    ):
        PlainEncoder(learned, ("video",))
    learned.model.front_ends["image"] = torch.nn.Identity()
    with pytest.raises(ConfigError, match="no plain form of image's front end, Identity; leave image out"):
        PlainEncoder(learned, ALL)
