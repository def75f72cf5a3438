"""Features: computed once, shared between languages, kept on disk, and robust to a broken file."""

import dataclasses
import io
import os

import numpy as np
import pytest
import soundfile
from builders import learner, write_tar

from mmmodel import configs, features, pretraining
from mmmodel.configs import ConfigError
from mmmodel.data import media
from mmmodel.data.loader import ShardDataset
from mmmodel.data.shards import write_index, write_shard


def png(rng, side=32):
    from PIL import Image

    return media.encode_png(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))


@pytest.fixture
def folder(tmp_path):
    """Two images in two languages, one broken sound, one sample without a picture."""
    rng = np.random.default_rng(0)
    flac = media.encode_flac(rng.normal(size=4000).astype(np.float32) * 0.1)
    pictures = {"cat": png(rng), "dog": png(rng, 48)}
    rows = [
        {"__key__": f"{image}/{language}", "txt": f"{image} {language}", "png": data, "flac": flac}
        for image, data in pictures.items()
        for language in ("fr", "es")
    ]
    rows[1]["flac"] = b"not a sound"
    rows.append({"__key__": "owl/fr", "txt": "owl"})
    for row in rows:
        image, language = row["__key__"].split("/")
        row["json"] = {"lang": language, "image": image, "concept": image, "split": "train"}
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", rows))
    return tmp_path


def prepared(folder, cache, front_ends=None):
    return features.prepare(ShardDataset(folder), front_ends or learner()[1].model.front_ends, cache, threads=1)


def test_languages_share_a_picture_and_a_broken_sound_is_left_out(folder, tmp_path, caplog):
    items, found = prepared(folder, tmp_path / "cache")
    by_key = {item.key: item for item in items}
    assert by_key["cat/fr"].rows["image"] == by_key["cat/es"].rows["image"] != by_key["dog/fr"].rows["image"]
    assert by_key["cat/fr"].group == by_key["cat/es"].group == "cat"
    assert len(found.shapes["image"]) == 2
    assert set(by_key["cat/es"].rows) == {"text", "image"}
    assert set(by_key["owl/fr"].rows) == {"text"}
    assert "cat/es" in caplog.text


def test_another_picture_under_the_same_name_is_told(tmp_path, caplog):
    """A field `image` of file names that repeat from folder to folder: the first picture would stand for all."""
    rng = np.random.default_rng(0)
    rows = [
        {"__key__": key, "png": data, "json": {"image": "1.png"}}
        for key, data in {"a": png(rng), "b": png(rng), "c": png(rng, 48)}.items()
    ]
    rows[1]["png"] = rows[0]["png"]
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", rows))
    prepared(tmp_path, tmp_path / "cache")
    assert "1 samples name another's `image` but hold a file of another size; the first's is read: c" in caplog.text


def test_features_are_read_back_from_the_cache(folder, tmp_path, monkeypatch):
    items, found = prepared(folder, tmp_path / "cache")
    front_ends = learner()[1].model.front_ends
    for name in ("image", "audio"):
        monkeypatch.setattr(front_ends[name], "prepare", None)  # would fail if called
    again, stored = prepared(folder, tmp_path / "cache", front_ends)
    assert again == items
    for name in ("text", "image", "audio"):
        for row in range(len(found.shapes[name])):
            np.testing.assert_array_equal(found.get(name, row), stored.get(name, row))


def test_a_damaged_file_of_the_cache_is_made_anew(folder, tmp_path, caplog):
    _, found = prepared(folder, tmp_path / "cache")
    found = [found.get("image", row).copy() for row in range(len(found.shapes["image"]))]
    (file,) = (tmp_path / "cache").rglob("image-*.safetensors")
    written = file.read_bytes()
    for part in (written[:-1], b"", written.replace(b'"shapes"', b'"sha\x70ez"')):
        file.unlink()  # not cut in place: who maps it would be ended
        file.write_bytes(part)
        _, again = prepared(folder, tmp_path / "cache")
        assert f"{file}: damaged, its features are made anew" in caplog.messages
        assert all(np.array_equal(again.get("image", row), before) for row, before in enumerate(found))
        caplog.clear()


def test_another_recipe_is_another_file(folder, tmp_path):
    prepared(folder, tmp_path / "cache")
    config, _ = learner()
    image = dataclasses.replace(config.model.image, max_tokens=1)
    _, other = prepared(folder, tmp_path / "cache", learner(image=image)[1].model.front_ends)
    assert other.get("image", 0).shape == (3, 16, 16)


def test_features_are_made_anew_when_one_of_their_shards_was_written(tmp_path):
    """Also when it is not the newest one; a shard that has none of them does not count."""
    rng = np.random.default_rng(0)
    for name, time in (("a", 1), ("b", 2), ("c", 3)):
        members = {"txt": "words"} if name == "c" else {"png": png(rng)}
        write_shard(tmp_path / f"{name}.tar", [{"__key__": name, **members}])
        os.utime(tmp_path / f"{name}.tar", (time, time))
    prepared(tmp_path, tmp_path / "cache")
    kept = set((tmp_path / "cache" / "features").iterdir())
    os.utime(tmp_path / "c.tar", (4, 4))
    prepared(tmp_path, tmp_path / "cache")
    assert set((tmp_path / "cache" / "features").iterdir()) == kept
    os.utime(tmp_path / "a.tar", (1.5, 1.5))
    prepared(tmp_path, tmp_path / "cache")
    assert len(set((tmp_path / "cache" / "features").iterdir()) - kept) == 1


def test_sound_that_decodes_to_nothing_usable_is_left_out_by_name(tmp_path, caplog):
    """A float WAV of NaN is a valid file; no features can be made of it."""
    broken, good = io.BytesIO(), io.BytesIO()
    soundfile.write(broken, np.full(800, np.nan), 16_000, format="WAV", subtype="FLOAT")
    soundfile.write(good, np.sin(np.arange(8000)), 16_000, format="WAV", subtype="FLOAT")
    rows = [{"__key__": key, "txt": "a", "wav": data.getvalue()} for key, data in (("bad", broken), ("fine", good))]
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", rows))
    items, _ = prepared(tmp_path, tmp_path / "cache")
    assert {item.key: set(item.rows) for item in items} == {"bad": {"text"}, "fine": {"text", "audio"}}
    assert "a-00000.tar: bad.wav: the sound holds samples that are not numbers" in caplog.text


def test_captions_that_are_broken_or_blank_are_left_out(tmp_path, caplog):
    """One file in another encoding must not end a run, and blank ones would all be the same text."""
    texts = {
        "bad": "caf\u00e9".encode("latin-1"),
        "blank": b" \n",
        "empty": b"",
        "mark": b"\xef\xbb\xbfsea",
        "fine": "caf\u00e9".encode(),
    }
    picture = png(np.random.default_rng(0))
    write_tar(
        tmp_path / "a.tar", {f"{k}.txt": data for k, data in texts.items()} | {f"{k}.png": picture for k in texts}
    )
    dataset = ShardDataset(tmp_path)
    assert features.read_captions(dataset, "train") == [("fine", "caf\u00e9"), ("mark", "sea")]
    items, _ = prepared(tmp_path, tmp_path / "cache")
    assert {item.key for item in items if "text" in item.rows} == {"fine", "mark"}
    assert all("image" in item.rows for item in items)
    assert len(items) == 5
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "left out: a.tar: bad.txt: it is not UTF-8: byte 0xe9 at 3"
    ]


def test_data_that_never_decodes_stops_the_run(tmp_path):
    rows = [{"__key__": f"k{i}", "txt": "a", "png": b"no"} for i in range(20)]
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", rows))
    with pytest.raises(ConfigError, match="in a row do not decode"):
        prepared(tmp_path, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "cache").touch()  # where a folder belongs
    with pytest.raises(ConfigError, match=r"cache/features/image-.* \(MMMODEL_CACHE names the folder\)"):
        prepared(folder, tmp_path / "cache")


def test_a_tokenizer_learns_from_training_captions_alone(tmp_path):
    """The words of the test set, and those of validation, must stay unseen; a sample without a split is of training."""
    rows = [
        {"__key__": word, "txt": f"{word} {word} {word}", **({"json": {"split": split}} if split else {})}
        for split, word in ((None, "nightingale"), ("val", "woodpecker"), ("test", "hummingbird"))
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", rows))
    config = dataclasses.replace(configs.tiny(), data=str(tmp_path))
    tokenizer = pretraining.make_tokenizer(config, ShardDataset(tmp_path))
    pieces = {word: len(tokenizer.encode(word).ids) for word in ("nightingale", "woodpecker", "hummingbird")}
    assert pieces["nightingale"] < 4 < min(pieces["woodpecker"], pieces["hummingbird"])
