"""What is logged before a run starts: all that it reads, and all that it does not."""

import logging

import numpy as np
from builders import learner, write_tar
from PIL import Image

from mmmodel import features
from mmmodel.data import media
from mmmodel.data.loader import ShardDataset

PNG = media.encode_png(Image.new("RGB", (32, 32), "teal"))
FLAC = media.encode_flac(np.random.default_rng(0).normal(size=4000).astype(np.float32) * 0.1)


def logged(folder, cache, caplog, members, **selection):
    write_tar(folder / "a.tar", members)
    with caplog.at_level(logging.INFO):
        features.prepare(ShardDataset(folder, **selection), learner()[1].model.front_ends, cache, threads=1)
    start = f"{folder}: "
    lines = [record.getMessage() for record in caplog.records]
    return [line.removeprefix(start) for line in lines if line.startswith(start)]


def test_all_is_read(tmp_path, caplog):
    members = {"a.txt": b"red", "a.png": PNG, "a.flac": FLAC, "b.txt": b"blue"}
    assert logged(tmp_path, tmp_path / "cache", caplog, members) == [
        "2 samples: train 2",
        "they hold text 2, image 1, audio 1",
    ]


def test_all_that_is_left_out_is_counted(tmp_path, caplog):
    """Also when the features come from the cache."""
    members = {
        "a.txt": b"red",
        "a.png": PNG,
        "a.jpg": PNG,  # the png is read
        "b.txt": b" ",
        "b.png": b"junk",
        "b.flac": FLAC,
        "b.json": b'{"split": "Val"}',
        "c.txt": b"blue",
        "c.gif": b"of a model that reads video",
        "c.json": b'{"split": "holdout"}',
        "d.tif": PNG,
        "e.mp3": b"",
        "f.mp3": b"",
        "IMG.2024.01.txt": b"red",
        "c.png": PNG,
        "h.txt": b"green",
        "h.json": b"{broken",
        "g.txt": b"rot",
        "g.json": b'{"lang": "de"}',
    }
    expected = [
        "4 samples: train 2, validation 1, holdout 1",
        "they hold text 3 (1 left out, broken or blank), image 2 (1 left out, broken or blank), audio 1",
        "left out: 1 samples of other languages or splits",
        "left out: 4 samples with nothing to read",
        "1 KEY.json are empty or do not read: their samples are of train",
        "files that nobody reads: mp3 2, gif 1, jpg 1, tif 1",
        "files that nobody reads: 1 such as IMG.2024.01.txt: a key ends at the first dot of the name",
        "splits that are read only where they are named: holdout 1",
    ]
    assert logged(tmp_path, tmp_path / "cache", caplog, members, languages=("",)) == expected
    caplog.clear()
    assert logged(tmp_path, tmp_path / "cache", caplog, members, languages=("",)) == expected


def test_archives_that_are_not_read_are_named(tmp_path, caplog):
    """Some of their names: a hundred would hide the other lines."""
    for name in ("b.tar.gz", "c.TAR", "d.zip", "a.tar.md5", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for name in ("sub/c.tar", "empty/readme.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    lines = logged(tmp_path, tmp_path / "cache", caplog, {"a.txt": b"red"})
    assert lines[2:] == ["not read: b.tar.gz, c.TAR, d.zip and 1 more"]


def test_what_is_as_long_as_may_be_is_counted(tmp_path, caplog):
    """Also from the cache, which knows how long features are and not how long the sounds were."""
    long = media.encode_flac(np.random.default_rng(0).normal(size=17000).astype(np.float32) * 0.1)
    members = {"a.txt": b"x y " * 40, "b.txt": b"red", "a.flac": long, "b.flac": FLAC, "c.flac": long}
    for _ in range(2):
        lines = logged(tmp_path, tmp_path / "cache", caplog, members)
        assert lines[2:] == ["at the limit where longer ones are cut: text 1 (24 tokens), audio 2 (1 s)"]
        caplog.clear()
