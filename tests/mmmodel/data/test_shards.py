"""Shards and their index: round trip, staleness, and folders that others made."""

import gzip
import io
import json
import os
import tarfile

import pytest
from builders import write_tar

from mmmodel.configs import ConfigError
from mmmodel.data.shards import INDEX, Entry, read_index, scan_shard, write_index, write_shard


def sample(key, **members):
    return {"__key__": key, **members}


def test_round_trip_of_entries_and_bytes(tmp_path):
    written = write_shard(
        tmp_path / "a.tar",
        [
            sample("x", txt="été", png=b"\x89PNG", json={"lang": "fr"}),
            sample("y/folder", flac=b"fLaC" * 300),  # longer than a tar block, no text, no metadata
        ],
    )
    write_index(tmp_path, written)
    first, second = read_index(tmp_path)
    assert [first, second] == written
    assert (first.key, first.meta, set(first.members)) == ("x", {"lang": "fr"}, {"txt", "png", "json"})
    assert (second.key, second.meta, set(second.members)) == ("y/folder", {}, {"flac"})
    data = (tmp_path / "a.tar").read_bytes()
    offset, size = first.members["txt"]
    assert data[offset : offset + size].decode() == "été"
    offset, size = second.members["flac"]
    assert data[offset : offset + size] == b"fLaC" * 300


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [sample("x", txt="t", json={"b": 1, "a": 2})])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_index_is_made_for_a_folder_without_one_and_remade_when_shards_change(tmp_path):
    write_shard(tmp_path / "a.tar", [sample("x", txt="1")])
    assert [entry.key for entry in read_index(tmp_path)] == ["x"]
    assert (tmp_path / INDEX).exists()
    write_shard(tmp_path / "b.tar", [sample("y", txt="2")])
    assert [entry.key for entry in read_index(tmp_path)] == ["x", "y"]
    (tmp_path / INDEX).write_text("{broken")
    assert [entry.key for entry in read_index(tmp_path)] == ["x", "y"]


def test_a_rewritten_shard_of_the_same_size_is_read_anew(tmp_path):
    """Labels and places of captions are another's: the index must not be the old one."""
    before = {"x.json": b'{"split": "train", "category": "cat"}', "x.txt": b"short", "y.txt": b"y"}
    write_tar(tmp_path / "a.tar", before)
    size = (tmp_path / "a.tar").stat().st_size
    assert read_index(tmp_path)[0].meta["category"] == "cat"
    after = {**before, "x.json": b'{"split": "test", "category": "dog"}', "x.txt": b"a caption that is longer"}
    time = (tmp_path / "a.tar").stat().st_mtime_ns + 1_000_000
    write_tar(tmp_path / "a.tar", after)
    os.utime(tmp_path / "a.tar", ns=(time, time))
    assert (tmp_path / "a.tar").stat().st_size == size
    x, y = read_index(tmp_path)
    assert x.meta == {"split": "test", "category": "dog"}
    assert (x.members["txt"][1], y.members["txt"][1]) == (len(after["x.txt"]), 1)


def test_captions_of_one_picture_are_of_one_concept_unless_they_name_another():
    of = {"a": {"image": "p"}, "b": {"image": "p"}, "c": {"image": "p", "concept": "sea"}, "d": {}, "e": {"image": ""}}
    concepts = {key: Entry(key, "a.tar", {}, meta).concept for key, meta in of.items()}
    assert concepts == {"a": "p", "b": "p", "c": "sea", "d": "d", "e": "e"}


def test_an_index_of_the_older_form_is_made_anew(tmp_path):
    """It held sizes alone, so it may be that of another shard."""
    write_shard(tmp_path / "a.tar", [sample("x", txt="1")])
    old = {
        "version": 1,
        "shards": {"a.tar": (tmp_path / "a.tar").stat().st_size},
        "samples": [["old", "a.tar", {}, {}]],
    }
    (tmp_path / INDEX).write_text(json.dumps(old))
    assert [entry.key for entry in read_index(tmp_path)] == ["x"]
    assert json.loads((tmp_path / INDEX).read_text())["samples"][0][0] == "x"


def test_index_of_a_read_only_folder_is_not_kept(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", [sample("x", txt="1")])

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr("mmmodel.data.shards.write_index", refuse)
    assert [entry.key for entry in read_index(tmp_path)] == ["x"]


# not JSON; JSON, but not an object; deeper than a reader goes; half of a surrogate pair, which no file in UTF-8 holds
@pytest.mark.parametrize("broken", [b"{nonsense", b"[1, 2]", b'{"a":' + b"[" * 100_000, b'{"lang": "\\ud800"}'])
def test_tars_made_by_others(tmp_path, broken):
    """Directory members, a leading ./, upper-case suffixes, as `tar` over a camera's folder gives; broken JSON."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in (
            ("./d/x.JPG", b"jpg"),
            ("./d/x.txt", b"t"),
            ("./d/x.json", broken),
            ("./README", b"r"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (entry,) = scan_shard(tmp_path / "a.tar")
    assert entry.key == "d/x"
    assert set(entry.members) == {"jpg", "txt", "json"}
    assert entry.meta == {}
    assert [other.key for other in read_index(tmp_path)] == ["d/x"]


@pytest.mark.parametrize("again", ["x.txt", "x.TXT"])  # as `tar -r` appends it; the same to us
def test_a_member_that_a_shard_holds_twice_is_an_error(tmp_path, again):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("x.txt", "x.png", again):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ConfigError, match=r"a\.tar holds x\.txt twice"):
        read_index(tmp_path)


def whole(folder):
    write_tar(folder / "whole", {f"{i}.txt": bytes(700) for i in range(3)})  # 1,536 bytes each, with the header
    return (folder / "whole").read_bytes()


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: b"junk " * 1000, "invalid header"),
        (gzip.compress, "it is packed by gzip, expected it uncompressed"),
        (lambda data: data[:1800], "it is cut"),  # within a header
        (lambda data: data[:2200], "unexpected end of data"),  # within a member
        (lambda data: data[:1536] + b"junk" * 1000, "something follows its end"),
        (lambda data: data + data, "something follows its end, as where tars were joined"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, made, reason):
    (tmp_path / "a.tar").write_bytes(made(whole(tmp_path)))
    with pytest.raises(ConfigError, match=rf"a\.tar does not read as a tar: .*{reason}"):
        read_index(tmp_path)
    assert not (tmp_path / INDEX).exists()


def test_a_tar_without_an_end_mark_is_read_and_logged(tmp_path, caplog):
    """Some writers leave it out; or it was cut just there."""
    (tmp_path / "a.tar").write_bytes(whole(tmp_path)[: 2 * 1536])
    assert [entry.key for entry in read_index(tmp_path)] == ["0", "1"]
    assert "a.tar: no end mark" in caplog.text


def test_links_are_counted(tmp_path, caplog):
    """A second name of a file that tar has already written is a link; the bytes lie elsewhere, or nowhere."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("x.txt", tarfile.REGTYPE), ("y.txt", tarfile.LNKTYPE), ("z.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.txt"
            archive.addfile(info)
    assert [entry.key for entry in read_index(tmp_path)] == ["x"]
    assert "left out: 2 links" in caplog.text


def test_a_key_that_readers_would_cut_is_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [sample("v1.2/x", txt="1")])
    with pytest.raises(ValueError, match=r"key 'v1\.2/x\.y' holds a dot"):
        write_shard(tmp_path / "b.tar", [sample("v1.2/x.y", txt="1")])


def test_a_key_is_the_same_however_tar_was_called_and_in_one_shard_alone(tmp_path):
    """`tar -cf a.tar *.txt` and `tar -cf a.tar .`: keys are matched with tables of one's own."""
    write_tar(tmp_path / "a.tar", {"./x.txt": b"1", "./in/y.txt": b"2", "z.txt": b"3"})
    assert [entry.key for entry in read_index(tmp_path)] == ["in/y", "x", "z"]
    write_tar(tmp_path / "b.tar", {"./z.txt": b"3"})
    with pytest.raises(ConfigError, match=r"key 'z' is in both a\.tar and b\.tar"):
        read_index(tmp_path)


def test_a_shard_that_was_not_written_to_its_end_is_not_there(tmp_path):
    """A short one would be read as if it were all.  Bytes are written as they are."""
    whole = sample("x", txt="é".encode(), json=b'{"n": 1}')
    for wrong in (sample("y", png="a path"), sample("y.z", txt="1"), sample("x", txt="twice")):
        with pytest.raises(ValueError, match=r"doesn't map to a bytes|holds a dot|twice, expected"):
            write_shard(tmp_path / "a.tar", [whole, wrong])
        assert not list(tmp_path.iterdir())
    (entry,) = write_shard(tmp_path / "a.tar", [whole])
    assert (entry.shard, entry.meta, entry.members["txt"][1]) == ("a.tar", {"n": 1}, 2)


def test_names_that_are_not_utf_8_stay_apart(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name in ("caf\xe9.txt", "caf\xe8.txt"):
            archive.addfile(tarfile.TarInfo(name))
    assert [entry.key for entry in read_index(tmp_path)] == ["caf\\xe8", "caf\\xe9"]
    assert len(read_index(tmp_path)) == 2  # from the index


def test_a_folder_of_loose_files_is_told_by_some_of_their_names(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"but a\.png, b\.png, c\.png and 1 more: uncompressed"):
        read_index(tmp_path)


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar in .*, which is empty; prepare"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"):
        read_index(tmp_path / "none")
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "a.tar", [sample("x", txt="1")])
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar in .*, but folder train: uncompressed \*\.tar of"):
        read_index(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar in .*, but a\.tar\.gz, folder train: uncompressed"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a\.tar is a file, expected the folder that holds the \*\.tar"):
        read_index(tmp_path / "train" / "a.tar")


@pytest.mark.parametrize("levels", [100, 500, *range(880, 1000, 10)])
def test_fields_however_deep_are_left_out_or_read_again(tmp_path, levels):
    """Where Python ends a recursion depends on who called: an index must be read wherever it was written."""
    write_tar(tmp_path / "a.tar", {"x.txt": b"t", "x.json": b'{"n": ' + b"[" * levels + b"]" * levels + b"}"})
    assert [entry.meta for entry in read_index(tmp_path)] == [{}]
    write_tar(tmp_path / "a.tar", {"x.txt": b"t", "x.json": b'{"n": ' + b"[" * 99 + b"]" * 99 + b"}"})
    (before,), (again,) = read_index(tmp_path), read_index(tmp_path)
    assert before.meta == again.meta != {}


def test_an_index_that_is_deeper_than_it_is_read_is_made_anew(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.txt": b"t"})
    write_index(tmp_path, scan_shard(tmp_path / "a.tar"))
    content = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(content.replace("{}", "[" * 5000 + "]" * 5000))
    assert [entry.meta for entry in read_index(tmp_path)] == [{}]


def test_index_is_json_without_surprises(tmp_path):
    write_index(tmp_path, write_shard(tmp_path / "a.tar", [sample("x", txt="1")]))
    status = (tmp_path / "a.tar").stat()
    stamp = [status.st_size, status.st_mtime_ns]
    assert json.loads((tmp_path / INDEX).read_text())["shards"] == {"a.tar": stamp}
