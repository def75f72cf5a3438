"""Your own files as tar shards: a folder of captions, pictures and sounds, or a table that names or holds them.

Files that differ in their suffix alone are one sample, as in a shard; so is a row of a table.  Kinds that a shard does
not hold become one that it does: pictures PNG, sounds 16 kHz mono FLAC.  Nothing else is decoded here; a run says what
it could not read.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mmmodel import atomic
from mmmodel.configs import ConfigError
from mmmodel.data import media, table_rows
from mmmodel.data.concepts import SPLITS
from mmmodel.data.shards import AUDIO, IMAGE, TEXT, VALIDATION, split_name, write_index, write_shard
from mmmodel.limits import listed

logger = logging.getLogger(__name__)

OTHER_IMAGE = ("bmp", "gif", "tif", "tiff")
OTHER_AUDIO = ("mp3", "aif", "aiff", "au", "opus", "w64")
KINDS = {"text": TEXT, "image": (*IMAGE, *OTHER_IMAGE), "audio": (*AUDIO, *OTHER_AUDIO), "fields": ("json",)}
SHOWN = 5  # names of what is left out, at most

Sample = dict[str, Any]  # as write_shard takes it


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.  Those of all others become fields of KEY.json."""

    text: str = "text"
    image: str = "image"
    audio: str = "audio"
    key: str = "key"


def convert(source: Path, out: Path, *, columns: Columns | None = None, per_shard: int = 1000) -> dict[str, Any]:
    """Write the samples of `source`, a folder or a table, as shards into the new folder `out`; what they are.

    Of a folder, a first folder inside that is called train, validation or test says the split where KEY.json does not.
    Of a table, text is the caption, image and audio are files (a path from the table's folder on) or their bytes, and
    key names the sample (left out: its row's number).  The path of an image also is the field `image`.

    Raises ConfigError for a source that holds no sample, a file that is not there, a key or a kind of member that
    comes twice.
    """
    if per_shard < 1:
        raise ConfigError(f"convert: per_shard is {per_shard}, expected at least 1")
    if not source.exists():
        raise ConfigError(f"convert: there is no {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"convert: {out} holds something already; give a new or an empty folder")
    left = Counter()
    if source.is_dir():
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise ConfigError(f"convert: {out} lies in {source}, whose files are read; give a folder elsewhere")
        samples = _of_folder(source, left)
    elif source.suffix.lower() in table_rows.SUFFIXES:
        samples = _of_table(source, columns or Columns(), left)
    else:
        raise ConfigError(f"convert: {source} is neither a folder nor a table ({', '.join(table_rows.SUFFIXES)})")
    found = {"samples": 0, "members": Counter(), "splits": Counter(), "left_out": left}
    with atomic.replacing(out.resolve()) as work:
        work.mkdir()
        entries, counted = [], _counted(samples, found)
        for number in itertools.count():
            if (first := next(counted, None)) is None:
                break
            some = itertools.chain([first], itertools.islice(counted, per_shard - 1))
            entries += write_shard(work / f"part-{number:05d}.tar", some)
        if not entries:
            raise ConfigError(f"convert: {source} holds no sample" + (f": {_words(left)}" if left else ""))
        write_index(work, entries)
        (work / "manifest.json").write_text(json.dumps({"data": "own", **found}, indent=1) + "\n", encoding="utf-8")
    return found


def summary(found: dict[str, Any]) -> str:
    """What `convert` returned, in a line."""
    line = f"{found['samples']} samples; {_words(found['members'])}; {_words(found['splits'])}"
    return line + (f"; left out: {_words(found['left_out'])}" if found["left_out"] else "")


def _words(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _counted(samples: Iterable[Sample], found: dict[str, Any]) -> Iterator[Sample]:
    keys = set()
    for sample in samples:
        if sample["__key__"] in keys:
            raise ConfigError(f"convert: the key {sample['__key__']!r} comes twice")
        keys.add(sample["__key__"])
        found["samples"] += 1
        found["members"].update(_kind(name) for name in sample if name not in ("__key__", "json"))
        found["splits"][split_name(str(sample.get("json", {}).get("split", "train")))] += 1
        yield sample


def _kind(suffix: str) -> str | None:
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), None)


def _of_folder(folder: Path, left: Counter) -> Iterator[Sample]:
    by_key: dict[str, dict[str, Path]] = {}
    names: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        kind = _kind(path.suffix[1:].lower())
        if kind is None:
            left[f"*{path.suffix}"] += 1
            continue
        name = inside.with_suffix("").as_posix()
        own = by_key.setdefault(key := _key(name), {})
        if names.setdefault(key, name) != name:
            raise ConfigError(f"convert: {names[key]} and {name} in {folder} would both have the key {key}")
        if kind in own:
            raise ConfigError(f"convert: {own[kind]} and {path} are both the {kind} of one sample")
        own[kind] = path
    for key, paths in by_key.items():
        meta = _read_fields(paths.pop("fields", None))
        first = key.split("/")[0].lower()
        if "/" in key and first in (*SPLITS, *VALIDATION):
            meta = {"split": first, **meta}
        members = {kind: (path.suffix, path.read_bytes()) for kind, path in paths.items()}
        if sample := _sample(key, members, meta, left):
            yield sample


def _read_fields(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"convert: {path} does not read as JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"convert: {path} holds a {type(meta).__name__}, expected an object")
    return meta


def _key(name: str) -> str:
    """Readers of shards end a key at the first dot of its name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.replace(".", "_")


def _sample(key: str, members: dict[str, tuple[str, bytes]], meta: dict[str, Any], left: Counter) -> Sample | None:
    """members: kind -> suffix and bytes.  None where nothing is left."""
    sample: Sample = {}
    for kind, (suffix, data) in members.items():
        try:
            suffix, data = _held(kind, suffix.lower().lstrip("."), data)
        except ValueError as error:
            logger.warning("%s: its %s is left out: %s", key, kind, error)
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
    """Suffix and content as a shard holds them, None for a blank text.  Raises ValueError as decoders do."""
    if kind == "text":
        return "txt", media.decode_text(data)
    if kind == "image" and suffix not in IMAGE:
        with media.opened(data) as image:
            return "png", media.encode_png(media.flatten(media.upright(image)))
    if kind == "audio" and suffix not in AUDIO:
        return "flac", media.encode_flac(media.decode_speech(data))
    return suffix, data


def _of_table(path: Path, columns: Columns, left: Counter) -> Iterator[Sample]:
    own = astuple(columns)
    names, rows = table_rows.read(path, own)
    has = f"convert: {path} has the columns {listed(names, SHOWN)}"
    if not set(own[:3]) & set(names):
        raise ConfigError(
            f"{has}, expected at least one of {', '.join(own[:3])}; --text, --image and --audio name others"
        )
    for name in own:
        if name not in names and name not in astuple(Columns()):
            raise ConfigError(f"{has}, expected {name}")
    for number, row in enumerate(rows):
        where = f"{path}, row {number + 1}"
        key = row.pop(columns.key, None)
        members, meta = {}, {}
        for name, value in row.items():
            if value is None or value == "":
                continue
            if name == columns.text:
                members["text"] = ("txt", str(value).encode())
            elif name in (columns.image, columns.audio):
                kind = "image" if name == columns.image else "audio"
                members[kind] = _media(value, kind, path.parent, where)
                if kind == "image" and isinstance(value, str):
                    meta.setdefault("image", value)  # captions of one picture
            elif (value := _field(value, f"{where}: {name}")) is not None:
                meta[name] = value
        sample = _sample(_key(str(key)) if key not in (None, "") else f"row-{number:07d}", members, meta, left)
        if sample:
            yield sample


def _media(value: Any, kind: str, folder: Path, where: str) -> tuple[str, bytes]:
    """(suffix, bytes) of a path, of bytes, or of {"bytes", "path"}, which Hugging Face's data sets have."""
    path = None
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        suffix = Path(path or "").suffix.lower().lstrip(".")
        return (suffix if suffix in KINDS[kind] else _suffix_of(value, kind, where)), value
    if not isinstance(value, str):
        raise ConfigError(f"convert: {where}: {kind} is a {type(value).__name__}, expected a path or bytes")
    file = folder / value
    if file.suffix.lower().lstrip(".") not in KINDS[kind]:
        raise ConfigError(f"convert: {where}: {kind} is {value}, expected one of {', '.join(KINDS[kind])}")
    try:
        return file.suffix, file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"convert: {where}: there is no {file}") from None


def _suffix_of(data: bytes, kind: str, where: str) -> str:
    """By what the bytes are."""
    try:
        if kind == "image":
            with media.opened(data) as image:
                return (image.format or "").lower()
        import soundfile

        return soundfile.info(io.BytesIO(data)).format.lower()
    except (ValueError, RuntimeError):
        raise ConfigError(f"convert: {where}: {kind} holds {len(data)} bytes of no kind that is read") from None


def _field(value: Any, where: str) -> Any:
    """As JSON holds it; None for a float that is no number, as pandas writes what is missing."""
    if isinstance(value, bytes):
        raise ConfigError(f"convert: {where} holds bytes, expected what KEY.json can hold")
    try:
        return json.loads(json.dumps(value, default=str, allow_nan=False))  # a date, a decimal: their text
    except ValueError:
        return None
