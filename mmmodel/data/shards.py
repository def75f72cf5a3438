"""WebDataset tar shards on disk: write them, and index them so that any sample can be read at random.

A sample is the members that share a key: `KEY.txt`, `KEY.png|jpg`, `KEY.flac|ogg|wav`, `KEY.json`, any subset of them.
The index (`index.json` beside the shards) holds the byte offset of each member and the sample's metadata, so opening a
data set reads one file, and reading a sample is one `pread` per member, safe in any number of worker processes. It
also has size and time of each shard: an index of shards that were written since, or of an older form, is made anew.
"""

import json
import logging
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmodel import atomic
from mmmodel.configs import ConfigError
from mmmodel.limits import listed

logger = logging.getLogger(__name__)

TEXT = ("txt",)
IMAGE = ("png", "jpg", "jpeg", "webp")
AUDIO = ("flac", "ogg", "wav")
INDEX = "index.json"
INDEX_VERSION = 3
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4|z))?|tgz|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE)
SHOWN = 3  # names of what is not read, at most
DEEPEST = 100  # levels of lists and objects in a KEY.json: readers and writers of JSON recurse, and Python ends that
VALIDATION = ("val", "valid", "dev")  # what others call the split "validation"


@dataclass(frozen=True)
class Entry:
    """Where a sample lies."""

    key: str
    shard: str  # file name within the folder
    members: dict[str, tuple[int, int]]  # extension -> offset, size in bytes
    meta: dict[str, Any]  # KEY.json, or empty

    @property
    def split(self) -> str:
        return split_name(self._said("split", "train"))

    @property
    def language(self) -> str:
        return self._said("lang", "")

    @property
    def concept(self) -> str:
        return self._said("concept", self.group)

    @property
    def group(self) -> str:
        """Samples of a group show the same picture."""
        return self._said("image", self.key)

    def _said(self, field: str, otherwise: str) -> str:
        value = self.meta.get(field)
        return otherwise if value in (None, "") else str(value)

    def member(self, extensions: Iterable[str]) -> tuple[int, int] | None:
        return next((self.members[extension] for extension in extensions if extension in self.members), None)


def split_name(said: str) -> str:
    """One name for each split, however it is written: "Train" is train; "val", "valid" and "dev" are validation."""
    name = said.strip().lower()
    return "validation" if name in VALIDATION else name


def write_shard(path: Path | str, samples: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Write samples (`{"__key__": str, "json": dict, "txt": str, "png": bytes, ...}`) as one tar; their entries.

    Bytes are written as they are.  The file appears whole or not at all.  Raises ValueError for a key with a dot after
    its last slash, where readers would end it, and for other kinds of values.
    """
    from webdataset import TarWriter  # imports torch, which a worker that only converts should not wait for

    # No times in the archive: the same samples give the same bytes.
    with atomic.replacing(Path(path)) as partial:
        with TarWriter(str(partial), encoder=_encode, mtime=0) as writer:
            for sample in samples:
                if "." in (key := sample["__key__"]).rpartition("/")[2]:
                    raise ValueError(
                        f"write_shard: key {key!r} holds a dot, expected none: a reader would end it there"
                    )
                writer.write(sample)
        return scan_shard(partial)


def _encode(sample: dict[str, Any]) -> dict[str, Any]:
    encoded = dict(sample)
    if isinstance(sample.get("txt"), str):
        encoded["txt"] = sample["txt"].encode()
    if not isinstance(sample.get("json", b""), bytes):
        encoded["json"] = json.dumps(sample["json"], ensure_ascii=False).encode()
    return encoded


def scan_shard(path: Path) -> list[Entry]:
    """Entries of one tar, in order.  A KEY.json that is not an object leaves the metadata empty and is logged.

    Raises ConfigError for a file that is no tar, is compressed or cut, or that holds a member twice.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    for info in _files(path):
        folder, _, name = info.name.removeprefix("./").rpartition("/")  # `tar -C FOLDER .` writes ./x.txt
        stem, dot, extension = name.partition(".")
        if not (stem and dot):
            continue
        key = f"{folder}/{stem}" if folder else stem
        own = members.setdefault(key, {})
        if extension.lower() in own:
            raise ConfigError(f"shards: {path} holds {key}.{extension.lower()} twice, expected one member of each kind")
        own[extension.lower()] = (info.offset_data, info.size)
    entries = []
    with path.open("rb") as file:
        for key, where in members.items():
            meta = {}
            if "json" in where:
                file.seek(where["json"][0])
                try:
                    read = json.loads(file.read(where["json"][1]))
                    if not isinstance(read, dict):
                        raise ValueError(f"it holds a {type(read).__name__}, expected an object")
                    if too_deep(read):
                        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
                    json.dumps(read, ensure_ascii=False).encode()  # half of a surrogate pair: no index could hold it
                    meta = read
                except (ValueError, RecursionError) as error:
                    logger.warning("%s: %s.json is left out: %s", path.name, key, error)
            entries.append(Entry(key, path.name, where, meta))
    return entries


def too_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether lists and objects in one another are more than `levels`."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return parts is not None and (levels == 0 or any(too_deep(part, levels - 1) for part in parts))


def _files(path: Path) -> list[tarfile.TarInfo]:
    """Its ordinary files.  To tarfile a tar that is cut within a header, or the first of several joined, is whole."""
    try:
        with tarfile.open(path, "r:", errors="backslashreplace") as archive:  # names in another encoding stay apart
            members = list(archive)
            archive.fileobj.seek(archive.offset)
            if not (end := archive.fileobj.read(2 * tarfile.RECORDSIZE)):
                logger.warning("%s: no end mark: is it cut?  It is read as far as it goes", path)
            elif end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is cut, or something follows its end, as where tars were joined")
    except tarfile.TarError as error:
        with path.open("rb") as file:
            start = file.read(6)
        packed = next((name for mark, name in COMPRESSED.items() if start.startswith(mark)), "")
        reason = f"it is packed by {packed}, expected it uncompressed: members are read at random" if packed else error
        raise ConfigError(f"shards: {path} does not read as a tar: {reason}") from error
    if links := sum(info.islnk() or info.issym() for info in members):
        logger.warning("%s: left out: %d links; tar -h --hard-dereference writes files in their place", path, links)
    return [info for info in members if info.isfile()]


def write_index(folder: Path, entries: Iterable[Entry], stamps: dict[str, list[int]] | None = None) -> None:
    """Write `index.json`, atomically.  stamps: of the shards that the entries were read from; by default as of now."""
    entries = sorted(entries, key=lambda entry: (entry.shard, entry.key))
    rows = [[entry.key, entry.shard, entry.members, entry.meta] for entry in entries]
    content = {"version": INDEX_VERSION, "shards": stamps or shard_stamps(folder), "samples": rows}
    with atomic.replacing(folder / INDEX) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def read_index(folder: Path | str) -> list[Entry]:
    """Entries of all `*.tar` in a folder, by shard and key; a missing or stale index is made, and kept if it can be.

    Raises FileNotFoundError if the folder has no shards, ConfigError if two samples share a key, or as scan_shard does.
    """
    folder = Path(folder)
    stamps = shard_stamps(folder)
    if not stamps:
        raise FileNotFoundError(
            f"shards: {_without_shards(folder)}; prepare a data set first (mmmodel data --help; your own: docs/faq.md)"
        )
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if content["version"] == INDEX_VERSION and content["shards"] == stamps:
            return [
                Entry(key, shard, {extension: (offset, size) for extension, (offset, size) in members.items()}, meta)
                for key, shard, members, meta in content["samples"]
            ]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass
    entries = [entry for shard in sorted(stamps) for entry in sorted(scan_shard(folder / shard), key=lambda e: e.key)]
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.key in seen:
            raise ConfigError(f"shards: key {entry.key!r} is in both {seen[entry.key]} and {entry.shard}")
        seen[entry.key] = entry.shard
    try:
        write_index(folder, entries, stamps)
    except OSError as error:
        logger.info("%s: index not kept: %s", folder, error)
    return entries


def _without_shards(folder: Path) -> str:
    """Why a folder has no shards, in words."""
    if folder.is_file():
        return f"{folder} is a file, expected the folder that holds the *.tar"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if found := unread(folder) or sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        return f"no *.tar in {folder}, but {listed(found, SHOWN)}: uncompressed *.tar of one folder are read"
    return f"no *.tar in {folder}, which is empty"


def unread(folder: Path) -> list[str]:
    """What of a folder looks like data and is not read: archives that are no *.tar, and folders that hold archives."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if any(ARCHIVE.search(inner.name) for inner in path.glob("*")):  # forbidden: as empty
                names.append(f"folder {path.name}")
        elif ARCHIVE.search(path.name) and path.suffix != ".tar":
            names.append(path.name)
    return names


def shard_stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of each shard.  The size alone says little: tar fills its files up to a multiple of 10 KiB."""
    found = {path.name: path.stat() for path in sorted(folder.glob("*.tar"))}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
