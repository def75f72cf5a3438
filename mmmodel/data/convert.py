"""Your own files as tar shards: a folder of captions, pictures and sounds, or a table that names or holds them.

Files that differ in their suffix alone are one sample, as in a shard; so is a row of a table.  Kinds that a shard does
not hold become one that it does: pictures PNG, sounds 16 kHz mono FLAC.  Nothing else is decoded here; a run says what
it could not read.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from mmmodel import atomic
from mmmodel.configs import ConfigError
from mmmodel.data import media, table_rows
from mmmodel.data.concepts import SPLITS
from mmmodel.data.loader import MAX_BROKEN_IN_A_ROW, in_words
from mmmodel.data.shards import AUDIO, DEEPEST, IMAGE, TEXT, VALIDATION, Entry, too_deep, write_index, write_shard
from mmmodel.limits import listed

logger = logging.getLogger(__name__)

OTHER_IMAGE = ("bmp", "gif", "tif", "tiff")
OTHER_AUDIO = ("mp3", "aif", "aiff", "au", "opus", "w64")
KINDS = {"text": TEXT, "image": (*IMAGE, *OTHER_IMAGE), "audio": (*AUDIO, *OTHER_AUDIO), "fields": ("json",)}
READ = ("split", "lang", "concept", "image")  # fields that a run reads as text
SHOWN = 5  # names of columns, at most

Sample = dict[str, Any]  # as write_shard takes it
Members = dict[str, tuple[str, bytes]]  # kind -> suffix, "" where only the bytes can tell, and content


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.  Those of all others become fields of KEY.json."""

    text: str = "text"
    image: str = "image"
    audio: str = "audio"
    key: str = "key"


def convert(source: Path, out: Path, *, columns: Columns | None = None, per_shard: int = 1000) -> dict[str, Any]:
    """Write the samples of `source`, a folder or a table, as shards into the new folder `out`; what they are.

    Of a folder, a first folder inside that is called train, validation or test says the split where KEY.json does not;
    hidden files are not read.  Of a table, text is the caption, image and audio are files (a path from the table's
    folder on) or their bytes, and key names the sample (left out: its row's number).  The path of an image also is the
    field `image`, unless the table has another column of that name.

    Raises ConfigError for a source that holds no sample, a file that is not there, a key or a kind of member that
    comes twice.  What does not decode is left out, logged and counted.
    """
    if per_shard < 1:
        raise ConfigError(f"convert: per_shard is {per_shard}, expected at least 1")
    if not source.exists():
        raise ConfigError(f"convert: there is no {source}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"convert: {out} is a file, expected a new or an empty folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"convert: {out} holds something already, expected a new or an empty folder")
    left = Counter()
    if source.is_dir():
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise ConfigError(f"convert: {out} lies in {source}, whose files are read; give a folder elsewhere")
        samples = _of_folder(source, left)
    elif source.suffix.lower() in table_rows.SUFFIXES:
        samples = _of_table(source, columns or Columns(), left)
    else:
        raise ConfigError(f"convert: {source} is neither a folder nor a table ({', '.join(table_rows.SUFFIXES)})")
    with atomic.replacing(out.resolve()) as work:
        work.mkdir()
        entries, samples = [], _pictures_compared(_each_key_once(samples))
        for number in itertools.count():
            if (first := next(samples, None)) is None:
                break
            some = itertools.chain([first], itertools.islice(samples, per_shard - 1))
            entries += write_shard(work / f"part-{number:05d}.tar", some)
        if not entries:
            raise ConfigError(f"convert: {source} holds no sample" + (f": {_words(left)}" if left else ""))
        write_index(work, entries)
        found = _found(entries, left)
        (work / "manifest.json").write_text(json.dumps({"data": "own", **found}, indent=1) + "\n", encoding="utf-8")
    return found


def summary(found: dict[str, Any]) -> str:
    """What `convert` returned, in a line."""
    line = f"{found['samples']} samples; {_words(found['members'])}; {_words(found['splits'])}"
    return line + (f"; left out: {_words(found['left_out'])}" if found["left_out"] else "")


def _found(entries: list[Entry], left: Counter) -> dict[str, Any]:
    members = Counter(_kind(suffix) for entry in entries for suffix in entry.members if suffix != "json")
    splits = Counter(entry.split for entry in entries)
    return {"samples": len(entries), "members": members, "splits": splits, "left_out": left}


def _words(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _each_key_once(samples: Iterator[Sample]) -> Iterator[Sample]:
    keys = set()
    for sample in samples:
        if sample["__key__"] in keys:
            raise ConfigError(f"convert: the key {sample['__key__']!r} comes twice")
        keys.add(sample["__key__"])
        yield sample


def _pictures_compared(samples: Iterator[Sample]) -> Iterator[Sample]:
    """As they are.  Tells of pictures that differ under one `image`: a run, which compares their sizes, reads one."""
    first: dict[str, bytes] = {}
    unlike = []
    for sample in samples:
        if (data := next((sample[suffix] for suffix in IMAGE if suffix in sample), None)) is not None:
            group = Entry(sample["__key__"], "", {}, sample.get("json", {})).group
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if first.setdefault(group, digest) != digest:
                unlike.append(sample["__key__"])
        yield sample
    if unlike:
        words = "%d samples name another's `image` but hold another picture; a run reads the first's for all: %s"
        logger.warning(words, len(unlike), listed(unlike))


def _kind(suffix: str) -> str | None:
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), None)


def _of_folder(folder: Path, left: Counter) -> Iterator[Sample]:
    by_key: dict[str, dict[str, Path]] = {}
    names: dict[str, str] = {}
    for path in _files(folder):
        kind = _kind(path.suffix[1:].lower())
        if kind is None or not path.is_file():
            left[f"*{path.suffix}" if kind is None else "links to nothing, pipes"] += 1
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        own = by_key.setdefault(key := _undotted(name), {})
        if names.setdefault(key, name) != name:
            raise ConfigError(f"convert: {names[key]} and {name} in {folder} would both have the key {key}")
        if kind in own:
            raise ConfigError(f"convert: {own[kind]} and {path} are both the {kind} of one sample")
        own[kind] = path
    for key, paths in sorted(by_key.items()):
        fields = paths.pop("fields", None)
        meta = _read_fields(fields) if fields and paths else {}
        first = key.split("/")[0].lower()
        if "/" in key and first in (*SPLITS, *VALIDATION) and meta.get("split") in (None, ""):
            meta["split"] = first
        members = {kind: (path.suffix, path.read_bytes()) for kind, path in paths.items()}
        if sample := _sample(key, members, meta, left):
            yield sample


def _files(folder: Path) -> Iterator[Path]:
    """All but hidden ones, links to folders followed, each folder once.  Raises OSError for one that does not read."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if real not in seen and not name.startswith("."))
        seen.add(real)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"convert: {path} does not read as JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"convert: {path} holds a {type(meta).__name__}, expected an object")
    if too_deep(meta):
        raise ConfigError(f"convert: {path} is nested deeper than {DEEPEST} levels")
    return _plain(meta, str(path))


def _undotted(key: str) -> str:
    """Readers of shards end a key at the first dot of its name."""
    folder, slash, last = key.rpartition("/")
    return folder + slash + last.replace(".", "_")


def _sample(key: str, members: Members, meta: dict[str, Any], left: Counter) -> Sample | None:
    """None where nothing is left."""
    sample: Sample = {}
    for kind, (suffix, data) in members.items():
        try:
            suffix, data = _held(kind, suffix.lower().lstrip("."), data)
        except Exception as error:  # decoders raise what they like
            logger.warning("%s: its %s is left out: %s", key, kind, in_words(error))
            left[f"{kind} that does not read"] += 1
            continue
        if data is None:
            left["blank text"] += 1
        else:
            sample[suffix] = data
    if not sample:
        left["samples without text, image and audio"] += 1
        return None
    return {"__key__": key, **sample, **({"json": meta} if meta else {})}


def _held(kind: str, suffix: str, data: bytes) -> tuple[str, bytes | str | None]:
    """Suffix and content as a shard holds them, None for a blank text.  Raises what decoders do."""
    if kind == "text":
        return "txt", media.decode_text(data)
    suffix = suffix or _suffix_of(data, kind)
    if kind == "image" and suffix not in IMAGE:
        with media.opened(data) as image:
            return "png", media.encode_png(media.flatten(media.upright(image)))
    if kind == "audio" and suffix not in AUDIO:
        return "flac", media.encode_flac(media.decode_speech(data))
    return suffix, data


def _suffix_of(data: bytes, kind: str) -> str:
    """By what the bytes are."""
    if kind == "image":
        with media.opened(data) as image:
            return (image.format or "").lower()
    import soundfile

    try:
        return soundfile.info(io.BytesIO(data)).format.lower()
    except soundfile.LibsndfileError as error:  # its message says where the bytes lie in memory
        raise ValueError(f"it does not read as sound: {error.error_string}") from None


def _of_table(path: Path, columns: Columns, left: Counter) -> Iterator[Sample]:
    own = astuple(columns)
    if twice := [name for name, count in Counter(own).items() if count > 1]:
        flags = " and ".join(flag for flag, name in asdict(columns).items() if name == twice[0])
        raise ConfigError(f"convert: {flags} are both the column {twice[0]}, expected one each")
    names, rows = table_rows.read(path, own)
    has = f"convert: {path} has the columns {listed(names, SHOWN)}"
    if not set(own[:3]) & set(names):
        raise ConfigError(
            f"{has}, expected at least one of {', '.join(own[:3])}; --text, --image and --audio name others"
        )
    for name in own:
        if name not in names and name not in astuple(Columns()):
            raise ConfigError(f"{has}, expected {name}")
    in_a_row = 0
    for number, row in enumerate(rows):
        where = f"{path}, row {number + 1}"
        if isinstance(row, table_rows.NotUTF8):
            in_a_row += 1
            if in_a_row > MAX_BROKEN_IN_A_ROW:
                raise ConfigError(f"convert: {in_a_row} rows in a row are not UTF-8; the last: {where}: {row}")
            logger.warning("%s is left out: %s", where, row)
            left["rows that are not UTF-8"] += 1
            continue
        in_a_row = 0
        if too_deep(row):
            raise ConfigError(f"convert: {where} is nested deeper than {DEEPEST} levels")
        key = row.pop(columns.key, None)
        members: Members = {}
        meta = {}
        if isinstance(row.get(columns.image), str) and row[columns.image]:
            meta["image"] = os.path.normpath(row[columns.image])  # captions of one picture
        for name, value in row.items():
            if isinstance(value, bytes) and name in READ and name not in own:
                value = value if (text := _decoded(value)) is None else text
            if value is None or value == "" or value != value:  # NaN: pandas' missing
                continue
            if name == columns.text:
                members["text"] = ("txt", _caption(value, f"{where}: {name}"))
            elif name in (columns.image, columns.audio):
                kind = "image" if name == columns.image else "audio"
                if content := _media(value, kind, path.parent, where):
                    members[kind] = content
            elif _holds_bytes(value):
                left[f"bytes in the column {name}"] += 1
            elif (value := _plain(value, f"{where}: {name}")) is not None:
                meta[name] = value
        if isinstance(key, bytes) and (key := _decoded(raw := key)) is None:
            raise ConfigError(f"convert: {where}: key is {raw!r}, expected UTF-8")
        missing = key in (None, "") or key != key
        key = f"row-{number:07d}" if missing else _checked_key(str(key), where)
        if sample := _sample(key, members, meta, left):
            yield sample


def _decoded(data: bytes) -> str | None:
    """None for what is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _checked_key(key: str, where: str) -> str:
    parts = key.removeprefix("./").split("/")
    if not key.isprintable() or any(part.strip() in ("", ".", "..") for part in parts):
        raise ConfigError(f"convert: {where}: key is {key!r}, expected a name, or names with / between them")
    return _undotted("/".join(parts))


def _caption(value: Any, where: str) -> bytes:
    if isinstance(value, bytes):  # of a parquet file whose writer did not say that they are text
        return value
    if isinstance(value, list | dict):
        raise ConfigError(f"convert: {where} is {type(value).__name__}, expected one text: a row for each caption")
    return _encoded(str(value), where)


def _media(value: Any, kind: str, folder: Path, where: str) -> tuple[str, bytes] | None:
    """(suffix, bytes) of a path, of bytes, or of {"bytes", "path"}, which Hugging Face's data sets have."""
    path = None
    if isinstance(value, dict):
        if not value.keys() & {"bytes", "path"}:  # such as a decoded recording: {"array", "sampling_rate"}
            fields = listed(sorted(value), SHOWN)
            raise ConfigError(f"convert: {where}: {kind} has the fields {fields}, expected bytes or path")
        path, value = value.get("path"), value.get("bytes") or value.get("path")
    if value is None:
        return None
    if isinstance(value, bytes):
        suffix = Path(path or "").suffix.lower().lstrip(".")
        return (suffix if suffix in KINDS[kind] else ""), value
    if not isinstance(value, str):
        raise ConfigError(f"convert: {where}: {kind} is {type(value).__name__}, expected a path or bytes")
    file = folder / value
    if file.suffix.lower().lstrip(".") not in KINDS[kind]:
        raise ConfigError(f"convert: {where}: {kind} is {value!r}, expected one of {', '.join(KINDS[kind])}")
    try:
        return file.suffix, file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"convert: {where}: {kind} is {value!r}, which does not read: {reason}") from None


def _holds_bytes(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, bytes) or any(map(_holds_bytes, values))


def _plain(value: Any, where: str) -> Any:
    """As JSON holds it: of a date or a decimal the text, of a float that is no number, pandas' missing, None."""
    if isinstance(value, dict):
        return {name: _plain(part, where) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, where) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int | None):
        return value
    _encoded(str(value), where)
    return str(value)


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"convert: {where} does not encode as UTF-8: {error.reason}") from None
