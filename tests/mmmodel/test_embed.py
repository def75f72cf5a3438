"""`mmmodel embed`: the file has a row for each modality and each sample, and its vectors are the model's."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from builders import learner, samples, write_tar
from PIL import Image
from pyarrow import parquet

from mmmodel import cli, configs, embed, evaluate, export, features, train
from mmmodel.configs import ConfigError
from mmmodel.data import media, synthetic
from mmmodel.data.loader import ShardDataset
from mmmodel.data.shards import read_index, write_shard
from mmmodel.finetuning import predict
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.run import finetune
from mmmodel.pretraining import Corpus


def rows(path):
    table = parquet.read_table(path).to_pydict()
    assert list(table) == ["key", "modality", "vector"]
    return {(key, modality): np.array(v) for key, modality, v in zip(*table.values(), strict=True)}


def test_a_row_for_each_modality_of_each_sample_and_one_for_the_sample(run, shards, tmp_path):
    cli.main(["embed", "--from", str(run), "--data", str(shards), "--out", str(tmp_path / "v.parquet")])
    found = rows(tmp_path / "v.parquet")
    kinds = {"txt": "text", "png": "image", "flac": "audio"}
    expected = {
        (entry.key, modality)
        for entry in ShardDataset(shards).entries
        for modality in ("joint", *(kinds[extension] for extension in entry.members if extension in kinds))
    }
    assert found.keys() == expected
    for (_, modality), vector in found.items():
        assert np.isfinite(vector).all()
        if modality != "joint":
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["v.parquet"]


def test_vectors_are_what_evaluate_compares(run, shards, tmp_path):
    embed.write(tmp_path / "v.parquet", run, split="test", joint=False)
    found = rows(tmp_path / "v.parquet")
    made = export.from_pretrained(run)
    items, features = embed.Embedder(run).prepare(ShardDataset(shards, "test"))
    points = evaluate.embed(made, Corpus(items, features), items)
    assert {key for key, _ in found} == {item.key for item in items}
    for i, item in enumerate(items):
        for modality in item.rows:
            np.testing.assert_allclose(found[item.key, modality], points[modality][i], atol=1e-5)


def test_a_sample_that_names_no_split_is_of_train(run, tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "x", "txt": "red"}])
    assert embed.write(tmp_path / "v.parquet", run, str(tmp_path), split="train", joint=False) == 1


def test_the_joint_vector_of_one_modality_alone_is_its_mean_state():
    """With nothing else to see, reading a sample whole and reading its one segment alone are the same."""
    _, made = learner()
    items, features = samples()
    reader = object.__new__(embed.Embedder)
    reader.model, reader.contrastive = made.model.eval(), None
    alone = [item for item in items if len(item.rows) == 1]
    vectors, joint = reader.vectors(alone, features), reader.joint(alone, features)
    for i, item in enumerate(alone):
        np.testing.assert_allclose(joint[i], vectors[next(iter(item.rows))][i], atol=1e-5)


def test_a_classifier_without_the_common_space_gives_mean_states(run, shards, tmp_path):
    finetune(run, FinetuneConfig(label="category", epochs=1), tmp_path / "tuned")
    embed.write(tmp_path / "v.parquet", tmp_path / "tuned", split="test")
    width = configs.tiny().model.width
    assert {len(vector) for vector in rows(tmp_path / "v.parquet").values()} == {width}


def test_the_suffix_is_the_format(run, tmp_path):
    """The vectors are the same to the bit: floats are written with digits enough."""
    read = {}
    for suffix in ("parquet", "csv", "jsonl"):
        path = tmp_path / "deeper" / f"v.{suffix}"
        assert embed.write(path, run, split="test") > 0
        if suffix == "parquet":
            read[suffix] = parquet.read_table(path).to_pylist()
        elif suffix == "csv":
            with path.open(newline="") as file:
                read[suffix] = [{**row, "vector": json.loads(row["vector"])} for row in csv.DictReader(file)]
        else:
            read[suffix] = [json.loads(line) for line in path.read_text().splitlines()]
    for suffix in ("csv", "jsonl"):
        for expected, found in zip(read["parquet"], read[suffix], strict=True):
            assert (found["key"], found["modality"]) == (expected["key"], expected["modality"])
            np.testing.assert_array_equal(np.float32(found["vector"]), np.float32(expected["vector"]))


def test_one_thing_has_the_vector_that_it_has_in_the_data(run, shards, tmp_path):
    """From its file or as an array."""
    embedder, read = embed.Embedder(run), ShardDataset(shards, "test")
    items, features = embedder.prepare(read)
    vectors = embedder.vectors(items, features)
    assert len(items) == len(read)
    (tmp_path / "a.png").write_bytes(media.encode_png(Image.fromarray(read.read_image(0))))
    (tmp_path / "a.flac").write_bytes(media.encode_flac(read.read_waveform(0)))
    for raw in (
        {"text": f" {read.read_text(0)}\n"},
        {"image": read.read_image(0)},
        {"image": tmp_path / "a.png"},
        {"image": Image.fromarray(read.read_image(0)).convert("RGBA")},
        {"image": torch.from_numpy(read.read_image(0))},
        {"audio": read.read_waveform(0)},
        {"audio": str(tmp_path / "a.flac")},
    ):
        (name,) = raw
        np.testing.assert_allclose(embed.embed_one(embedder, **raw), vectors[name][0], atol=1e-4)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "got nothing, expected one of text=, image=, audio="),
        ({"text": "red", "image": "a.png"}, "got text, image, expected one of"),
        ({"smell": "rose"}, "the model reads text, image, audio, not smell"),
        (
            {"image": np.zeros((3, 16, 16), np.uint8)},
            r"a path, a PIL image or uint8 \[h, w, 3\]: it is uint8 \[3, 16, 16\]",
        ),
        ({"image": np.zeros((16, 16, 3), np.float32)}, "it is float32"),
        (
            {"audio": np.zeros((900, 2), np.float32)},
            r"or float \[n\] at 16 kHz: it is float32 \[900, 2\]",
        ),
        ({"image": __file__}, "image does not read"),
        ({"audio": __file__}, "audio does not read"),
        ({"text": 3}, "text does not read, expected a str: it is int"),
        ({"text": " \n"}, "text does not read, expected a str: it is blank"),
        ({"image": np.zeros((0, 16, 3), np.uint8)}, r"it is uint8 \[0, 16, 3\]"),
        ({"audio": np.zeros(0, np.float32)}, r"it is float32 \[0\]"),
        ({"audio": np.zeros(159, np.float32)}, "the sound lasts 9.94 ms, expected at least 10"),
        ({"audio": np.full(900, np.nan, np.float32)}, "holds samples that are not numbers"),
    ],
    ids=str,
)
def test_what_is_no_text_picture_or_sound_is_refused(run, raw, message):
    with pytest.raises(ConfigError, match=message):
        embed.embed_one(embed.Embedder(run), **raw)


def test_what_is_not_there_is_one_line_and_leaves_no_file(run, tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        cli.main(["embed", "--from", str(tmp_path), "--out", str(tmp_path / "v.parquet")])
    with pytest.raises(SystemExit, match=r"ShardDataset: .* holds no sample of split 'none'; there"):
        cli.main(["embed", "--from", str(run), "--split", "none", "--out", str(tmp_path / "v.parquet")])
    with pytest.raises(SystemExit, match=r"v.xlsx: its suffix is '.xlsx', expected .parquet, .csv, .jsonl"):
        cli.main(["embed", "--from", str(run), "--out", str(tmp_path / "v.xlsx")])
    assert list(tmp_path.iterdir()) == []


def test_data_of_which_nothing_reads_is_refused(run, tmp_path):
    write_tar(tmp_path / "a.tar", {"x.txt": b" ", "y.json": b"{}"})
    with pytest.raises(ConfigError, match=r"embed: none of the 2 samples of .* has any of text, image, audio"):
        embed.write(tmp_path / "v.csv", run, str(tmp_path))
    assert not (tmp_path / "v.csv").exists()


def test_a_path_may_be_text(run, shards, tmp_path):
    """As most programs hold it."""
    out = str(tmp_path)
    assert embed.write(f"{out}/vectors.jsonl", str(run), split="test")
    assert train.pretrain(dataclasses.replace(configs.tiny(), data=str(shards), steps=1), f"{out}/run")
    task = FinetuneConfig(label="category", epochs=1, freeze="encoder")
    finetune(str(run), task, f"{out}/tuned")
    assert predict.write(f"{out}/said.csv", f"{out}/tuned", split="test")
    assert evaluate.evaluate(f"{out}/run")["tasks"]
    loaded = export.from_pretrained(f"{out}/run")
    features.prepare(ShardDataset(str(shards), "test"), loaded.model.front_ends, f"{out}/cache")
    export.export(f"{out}/again.safetensors", loaded, loaded.config)
    assert len(read_index(str(shards))) == 80
    assert len(write_shard(f"{out}/a.tar", [{"__key__": "a", "txt": "a"}])) == 1
    assert synthetic.prepare(f"{out}/set", samples=2, seed=0) == tmp_path / "set"
