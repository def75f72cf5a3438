"""The ONNX graph, run by onnxruntime, computes what the packed model computes, at lengths it was not traced with."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from builders import batch_of, learner, samples

from mmmodel import cli
from mmmodel.configs import ConfigError
from mmmodel.export import export
from mmmodel.export_onnx import PlainEncoder, export_onnx

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
            np.testing.assert_allclose(found[1].numpy(), points[0], atol=1e-5)


def test_onnxruntime_equals_the_packed_model_at_every_length(tmp_path):
    _, learned = learner()
    items, features = samples()
    export_onnx(tmp_path / "joint.onnx", learned, ALL)
    session = onnxruntime.InferenceSession(tmp_path / "joint.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == list(ALL)
    lengths = set()
    for item in with_all(items, ALL):
        hidden, _ = expected(learned, item, features, ALL)
        (found,) = session.run(["hidden"], fed(item, features, ALL))
        np.testing.assert_allclose(found, hidden, atol=2e-5)
        lengths.add(len(hidden))
    assert len(lengths) > 1


def test_the_command_writes_one_modality_with_its_point(tmp_path, capsys):
    config, learned = learner()
    items, features = samples()
    export(tmp_path / "model.safetensors", learned, config)
    path = tmp_path / "text.onnx"
    cli.main(["export", "--from", str(tmp_path), "--out", str(path), "--modalities", "text"])
    assert "text -> hidden, point" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for item in with_all(items, ("text",)):
        _, points = expected(learned, item, features, ("text",))
        np.testing.assert_allclose(session.run(["point"], fed(item, features, ("text",)))[0], points[0], atol=2e-5)


def test_refuses_what_has_no_plain_form(monkeypatch):
    _, learned = learner()
    with pytest.raises(
        ConfigError, match=r"modalities are \('video',\), expected some of \('text', 'image', 'audio'\)"
    ):
        PlainEncoder(learned, ("video",))
    learned.model.front_ends["image"] = torch.nn.Identity()
    with pytest.raises(ConfigError, match="no plain form of image's front end, Identity; leave image out"):
        PlainEncoder(learned, ALL)
