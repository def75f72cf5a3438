"""Own files as shards: folders, tables of each kind, what is left out, and what is refused."""

import csv
import datetime
import io
import json
import tracemalloc

import numpy as np
import pyarrow
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from mmmodel.configs import ConfigError
from mmmodel.data import convert, table_rows
from mmmodel.data.loader import ShardDataset
from mmmodel.data.media import SAMPLE_RATE, encode_flac


def picture(kind="PNG", colour="teal"):
    data = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(data, kind)
    return data.getvalue()


def sound(kind="WAV", seconds=0.1):
    data = io.BytesIO()
    soundfile.write(data, np.sin(np.arange(int(seconds * SAMPLE_RATE)) / 9), SAMPLE_RATE, format=kind)
    return data.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def deep(levels):
    return '{"text": "x", "n": ' + "[" * levels + "]" * levels + "}"


def read(folder):
    dataset = ShardDataset(folder)
    return {sample.key: sample for sample in (dataset[i] for i in range(len(dataset)))}


def test_a_folder(tmp_path):
    source = write(
        tmp_path / "mine",
        {
            "train/a.txt": "a teal sea",
            "train/a.JPG": picture("JPEG"),
            "train/a.json": '{"category": "sea"}',
            "Test/b.wav": sound(),
            "Test/b.json": '{"split": "validation"}',
            "c.v2.bmp": picture("BMP", "red"),
            "c.v2.mp3": sound("MP3"),
            ".hidden.txt": "no",
            "notes.pdf": "no",
            "blank.txt": " \n",
            "broken.tiff": "no picture",
        },
    )
    found = convert.convert(source, tmp_path / "out", per_shard=2)
    samples = read(tmp_path / "out")
    assert sorted(samples) == ["Test/b", "c_v2", "train/a"]
    a, b, c = samples["train/a"], samples["Test/b"], samples["c_v2"]
    assert (a.text, a.image.shape, a.waveform) == ("a teal sea", (10, 20, 3), None)
    assert a.meta == {"split": "train", "category": "sea"}
    assert b.meta == {"split": "validation"}
    assert len(b.waveform) == SAMPLE_RATE // 10
    assert c.image[0, 0].tolist() == [255, 0, 0]
    assert len(c.waveform) >= SAMPLE_RATE // 10
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["part-00000.tar", "part-00001.tar"]
    assert convert.summary(found) == (
        "3 samples; audio 2, image 2, text 1; train 2, validation 1; left out: *.pdf 1, blank text 1, "
        "image that does not read 1, samples without text, image and audio 2"
    )


def test_other_pictures_under_one_name_are_told_also_of_equal_size(tmp_path, caplog):
    """A run compares sizes alone, and reads one picture for all samples that name it."""
    same, other = picture(colour="#010203"), picture(colour="#030201")
    assert len(same) == len(other)
    files = {"a/1.png": same, "b/1.png": other, "c/1.png": same, "d/1.png": other}
    files |= {f"{folder}/1.json": '{"image": "1.png"}' for folder in "abc"}  # d's is its own
    convert.convert(write(tmp_path / "mine", files), tmp_path / "out")
    assert (
        "1 samples name another's `image` but hold another picture; a run reads the first's for all: b/1" in caplog.text
    )


ROWS = [
    {"text": "teal", "image": "pictures/a.png", "audio": None, "split": "train", "size": 3, "tags": ["x", "y"]},
    {"text": None, "image": "pictures/a.png", "audio": "b.wav", "split": "val", "size": 4.5, "tags": ["x"]},
    {"text": "1e5", "image": None, "audio": None, "split": "test", "size": None, "tags": None},
]


def write_table(path):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=comma)
            writer.writerow(ROWS[0])
            writer.writerows([json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in ROWS)


@pytest.mark.parametrize("suffix", table_rows.SUFFIXES)
def test_a_table(tmp_path, suffix):
    write(tmp_path, {"pictures/a.png": picture(), "b.wav": sound()})
    write_table(tmp_path / f"t{suffix}")
    found = convert.convert(tmp_path / f"t{suffix}", tmp_path / "out")
    samples = read(tmp_path / "out")
    assert [sample.text for sample in samples.values()] == ["teal", None, "1e5"]
    first, second, third = samples.values()
    assert first.meta == {"split": "train", "size": 3, "tags": ["x", "y"], "image": "pictures/a.png"}
    assert second.meta == {"split": "val", "size": 4.5, "tags": ["x"], "image": "pictures/a.png"}
    assert third.meta == {"split": "test"}
    assert np.array_equal(first.image, second.image)
    assert second.waveform is not None
    assert found["splits"] == {"train": 1, "validation": 1, "test": 1}


def test_a_table_of_bytes_and_columns_of_other_names(tmp_path):
    pictures = [{"bytes": picture("GIF"), "path": None}, {"bytes": picture("JPEG"), "path": "x.jpg"}]
    rows = [
        {"id": 7, "caption": "one", "picture": pictures[0], "sound": sound("FLAC"), "n": 0.5},
        {"id": 8, "caption": "two", "picture": pictures[1], "sound": None, "n": float("nan")},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = convert.Columns(text="caption", image="picture", audio="sound", key="id")
    convert.convert(tmp_path / "t.parquet", tmp_path / "out", columns=columns)
    samples = read(tmp_path / "out")
    assert {key: sample.meta for key, sample in samples.items()} == {"7": {"n": 0.5}, "8": {}}
    assert all(sample.image.shape == (10, 20, 3) for sample in samples.values())
    assert samples["7"].waveform is not None


def test_captions_that_parquet_does_not_call_text(tmp_path):
    table = pyarrow.table({"text": [b"caf\xc3\xa9", b"caf\xe9"], "key": [b"a", b"b"], "audio": [sound("FLAC")] * 2})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = convert.convert(tmp_path / "t.parquet", tmp_path / "out")
    assert {key: sample.text for key, sample in read(tmp_path / "out").items()} == {"a": "café", "b": None}
    assert found["left_out"] == {"text that does not read": 1}


def test_fields_that_parquet_does_not_call_text(tmp_path):
    """A row that is held out stays so."""
    said = {"split": [b"train", b"test"], "lang": [b"en", b"caf\xe9"], "concept": [b"x", b""], "image": [b"1", b"2"]}
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "picture": [picture()] * 2, **said}), tmp_path / "t.parquet")
    columns = convert.Columns(image="picture")
    found = convert.convert(tmp_path / "t.parquet", tmp_path / "out", columns=columns)
    assert found["splits"] == {"train": 1, "test": 1}
    assert found["left_out"] == {"bytes in the column lang": 1}
    metas = [sample.meta for sample in read(tmp_path / "out").values()]
    assert metas == [
        {"split": "train", "lang": "en", "concept": "x", "image": "1"},
        {"split": "test", "image": "2"},
    ]


def test_a_caption_that_is_no_number_is_missing(tmp_path):
    write(tmp_path, {"t.jsonl": '{"text": NaN, "image": NaN}\n{"text": "a"}\n{"text": 7}'})
    convert.convert(tmp_path / "t.jsonl", tmp_path / "out")
    assert [sample.text for sample in read(tmp_path / "out").values()] == ["a", "7"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({"a.png": picture(), "a.jpg": picture("JPEG")}, ".", r"a\.jpg and .*a\.png are both the image of one sample"),
        ({"a.v.txt": "x", "a_v.png": picture()}, ".", r"would both have the key a_v"),
        ({"a.pdf": "x"}, ".", r"holds no sample: \*\.pdf 1"),
        ({"a.txt": "x", "a.json": "[1]"}, ".", r"a\.json holds a list, expected an object"),
        ({"a.txt": "x", "a.json": "{"}, ".", r"a\.json does not read as JSON"),
        ({"t.jsonl": '{"audio": {"array": [0.1]}}'}, "t.jsonl", "audio has the fields array, expected bytes or path"),
        ({"t.csv": "caption\nx"}, "t.csv", r"has the columns caption, expected at least one of text, image, audio"),
        ({"t.csv": "text,n\nx"}, "t.csv", "row 1 has more or fewer cells"),
        ({"t.csv": b"text\n\xff"}, "t.csv", "holds no sample: rows that are not UTF-8 1"),
        ({"t.csv": b"text,\xff\na,b"}, "t.csv", "csv: the names of its columns: not UTF-8: byte 0xff after 'text,'"),
        (
            {"t.csv": b"text\na\n" + b"caf\xe9\n" * 11},
            "t.csv",
            "11 rows in a row are not UTF-8; the last: .*t.csv, row 12: not UTF-8: byte 0xe9 after 'caf'",
        ),
        ({"t.csv": "image\nnone.png"}, "t.csv", r"row 1: image is 'none\.png', which does not read: No such file"),
        ({"t.csv": "image\nnone.xyz"}, "t.csv", r"row 1: image is 'none\.xyz', expected one of png"),
        ({"t.csv": "key,text\nk,x\nk,y"}, "t.csv", "the key 'k' comes twice"),
        ({"t.jsonl": "[1]"}, "t.jsonl", r"a line holds \[1\], expected an object"),
        ({"t.jsonl": '{"text": ["a", "b"]}'}, "t.jsonl", "row 1: text is list, expected one text: a row for each"),
        ({"t.jsonl": '{"image": 3}'}, "t.jsonl", "image is int, expected a path or bytes"),
        ({"t.jsonl": '{"text": "\\ud800"}'}, "t.jsonl", "row 1: text does not encode as UTF-8"),
        ({"t.jsonl": '{"text": "x", "n": ["\\ud800"]}'}, "t.jsonl", "row 1: n does not encode as UTF-8"),
        ({"t.jsonl": "[" * 9999}, "t.jsonl", "does not read as jsonl"),
        ({"a.txt": "x", "a.json": deep(500)}, ".", r"a\.json is nested deeper than 100 levels"),
        ({"t.jsonl": '{"text": "a", "n": 1}\n' + deep(500)}, "t.jsonl", "row 2 is nested deeper than 100 levels"),
        ({"t.csv": f"text,n\na,{'[' * 500}{']' * 500}"}, "t.csv", "row 1 is nested deeper than 100 levels"),
        ({"t.csv": "text,text\na,b"}, "t.csv", "does not read as csv: it has the column text twice"),
        ({"t.csv": "text,n"}, "t.csv", "holds no sample$"),
        ({"t.csv": "key,text\n./x,e\nx,f"}, "t.csv", "the key 'x' comes twice"),
        ({"t.csv": "key,text\na/,e"}, "t.csv", r"row 1: key is 'a/', expected a name"),
        ({"t.csv": "key,text\na/../../b,e"}, "t.csv", r"row 1: key is 'a/\.\./\.\./b', expected a name"),
        ({"t.csv": "key,text\n/a,e"}, "t.csv", r"row 1: key is '/a', expected a name"),
        (
            {"t.csv": "image\nd.png", "d.png/x": "x"},
            "t.csv",
            r"row 1: image is 'd\.png', which does not read: Is a",
        ),
        ({"t.parquet": "no"}, "t.parquet", "does not read as parquet"),
        ({"t.xlsx": "no"}, "t.xlsx", "neither a folder nor a table"),
        ({}, "gone", "there is no"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, files, source, message):
    write(tmp_path / "in", files)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        convert.convert(tmp_path / "in" / source, out)
    assert not out.exists()


def test_keys_of_parquet(tmp_path):
    """NaN is pandas' missing; two keys that are not UTF-8 must not become one."""
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "key": [float("nan"), 2.0]}), tmp_path / "t.parquet")
    convert.convert(tmp_path / "t.parquet", tmp_path / "out")
    assert sorted(read(tmp_path / "out")) == ["2_0", "row-0000000"]
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "key": [b"a", b"caf\xe9"]}), tmp_path / "u.parquet")
    with pytest.raises(ConfigError, match=r"u\.parquet, row 2: key is b'caf\\xe9', expected UTF-8"):
        convert.convert(tmp_path / "u.parquet", tmp_path / "other")


def test_what_does_not_decode_is_left_out_whatever_its_decoder_raises(tmp_path, monkeypatch):
    files = {"a.txt": "x", "a.bmp": picture("BMP")[:200], "b.txt": "y", "b.gif": picture("GIF")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # a picture of 200 is a bomb
    found = convert.convert(write(tmp_path / "in", files), tmp_path / "out")
    assert found["left_out"] == {"image that does not read": 2}
    rows = [{"text": "x", "image": b"no picture"}, {"text": "y", "image": {"bytes": None, "path": None}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "t.parquet")
    assert convert.convert(tmp_path / "t.parquet", tmp_path / "t")["left_out"] == {"image that does not read": 1}
    parquet.write_table(pyarrow.Table.from_pylist(rows[1:]), tmp_path / "u.parquet")
    assert not convert.convert(tmp_path / "u.parquet", tmp_path / "u")["left_out"]


def test_fields_that_json_cannot_hold(tmp_path):
    mask, day = {"bytes": b"png", "path": None}, datetime.date(2026, 1, 2)
    rows = [
        {"text": "x", "mask": mask, "n": [1.0, float("nan")], "day": day},
        {"text": "y", "mask": None, "n": None, "day": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = convert.convert(tmp_path / "t.parquet", tmp_path / "out")
    assert [sample.meta for sample in read(tmp_path / "out").values()] == [{"n": [1.0, None], "day": "2026-01-02"}, {}]
    assert found["left_out"] == {"bytes in the column mask": 1}


def test_a_split_that_says_nothing_is_the_folders(tmp_path):
    files = {"test/a.txt": "x", "test/a.json": '{"split": null}', "annotations.json": "[1]"}
    found = convert.convert(write(tmp_path / "in", files), tmp_path / "out")
    assert found["splits"] == {"test": 1}
    assert found["left_out"] == {"samples without text, image and audio": 1}  # annotations.json describes no sample


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    source = write(tmp_path / "in", {"a.txt": "x", "b/c.txt": "y"})
    write(tmp_path / "elsewhere", {"d.txt": "z"})
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "b" / "loop").symlink_to(source)
    (source / "gone.txt").symlink_to(tmp_path / "nothing")
    found = convert.convert(source, tmp_path / "out")
    assert sorted(read(tmp_path / "out")) == ["a", "b/c", "link/d"]
    assert found["left_out"] == {"links to nothing, pipes": 1}


def test_csv_as_people_write_it(tmp_path):
    long = "long " * 40_000
    write(tmp_path, {"t.csv": f'\ufefftext, n, m\r\n"{long}", 007, {"[" * 9999}\r\n"two\nlines", 1.5, 1\r\n'})
    convert.convert(tmp_path / "t.csv", tmp_path / "out")
    first, second = read(tmp_path / "out").values()
    assert (first.text, first.meta) == (long.strip(), {"n": "007", "m": "[" * 9999})
    assert (second.text, second.meta) == ("two\nlines", {"n": "1.5", "m": "1"})


def test_a_number_that_no_float_holds_is_text(tmp_path):
    write(tmp_path, {"t.csv": f"text,n\na,{'9' * 400}\nb,1"})
    convert.convert(tmp_path / "t.csv", tmp_path / "out")
    assert [sample.meta["n"] for sample in read(tmp_path / "out").values()] == ["9" * 400, "1"]


def test_csvs_own_limit_is_raised_for_no_other_reader(tmp_path):
    before = csv.field_size_limit()
    source = write(tmp_path, {"t.csv": "text\n\na\n" + "b" * 2 * before}) / "t.csv"
    _, rows = table_rows.read(source, ("text",))
    assert next(rows) == {"text": "a"}
    assert csv.field_size_limit() == before  # while ours waits for its next row
    assert len(next(rows)["text"]) == 2 * before
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("table", ["t.csv", "t.jsonl"])
def test_a_row_that_is_not_utf_8_is_left_out(tmp_path, caplog, table):
    """The others keep their number in the table, and a column its kind."""
    rows = ["text,n\n", "teal,1\n", '"caf\xe9",x\n', '"na\xefve",y\n', "sea,2\n"]
    if table == "t.jsonl":
        rows = ['{"text": "teal", "n": 1}\n', '{"text": "caf\xe9"}\n', '{"a": "na\xefve"}\n', '{"text": "sea", "n": 2}']
    found = convert.convert(write(tmp_path, {table: "".join(rows).encode("latin-1")}) / table, tmp_path / "out")
    assert {key: (sample.text, sample.meta) for key, sample in read(tmp_path / "out").items()} == {
        "row-0000000": ("teal", {"n": 1}),
        "row-0000003": ("sea", {"n": 2}),
    }
    assert found["left_out"] == {"rows that are not UTF-8": 2}
    assert caplog.messages[0].startswith(f"{tmp_path / table}, row 2 is left out: not UTF-8: byte 0xe9 after ")


@pytest.mark.parametrize("table", ["t.csv", "t.jsonl"])
def test_a_table_is_not_held_in_memory(tmp_path, table):
    """8 MB of it, each row another text."""
    texts = (f"{i:08d}" + "x" * 8000 for i in range(1000))
    lines = [f'{{"text": "{text}"}}' if table == "t.jsonl" else text for text in texts]
    source = write(tmp_path, {table: "\n".join(lines if table == "t.jsonl" else ["text", *lines])}) / table
    del lines
    tracemalloc.start()
    _, rows = table_rows.read(source, ("text",))
    assert sum(len(row["text"]) for row in rows) == 8_008_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000


def test_a_column_that_was_named_must_be_there(tmp_path):
    source = write(tmp_path / "in", {"t.csv": "text,n\nx,1"}) / "t.csv"
    with pytest.raises(ConfigError, match="has the columns text, n, expected picture"):
        convert.convert(source, tmp_path / "out", columns=convert.Columns(image="picture"))


def test_a_column_is_of_one_kind(tmp_path):
    """The picture was taken for the caption, and its text for the name of a picture."""
    source = write(tmp_path, {"t.csv": "body,file\nx,a.png\n"}) / "t.csv"
    with pytest.raises(ConfigError, match="text and image are both the column body, expected one each"):
        convert.convert(source, tmp_path / "out", columns=convert.Columns(text="body", image="body"))


def test_what_is_there_is_not_replaced(tmp_path):
    source = write(tmp_path / "in", {"a.txt": "x"})
    write(tmp_path / "out", {"kept": "x"})
    with pytest.raises(ConfigError, match="holds something already"):
        convert.convert(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="kept is a file, expected a new or an empty folder"):
        convert.convert(source, tmp_path / "out" / "kept")
    with pytest.raises(ConfigError, match="lies in"):
        convert.convert(source, source / "shards")


def test_the_sound_of_a_shard_is_kept_as_it_is(tmp_path):
    flac = encode_flac(np.zeros(100, np.float32))
    convert.convert(write(tmp_path / "in", {"a.flac": flac}), tmp_path / "out")
    offset, size = ShardDataset(tmp_path / "out").entries[0].members["flac"]
    assert (tmp_path / "out" / "part-00000.tar").read_bytes()[offset : offset + size] == flac
