"""The Tux Paint stamps as Debian ships them: find or download the package, unpack it without root, list its stamps.

The files are GPL-2, (c) Bill Kendrick and contributors; they are read from the user's machine and never shipped.
"""

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from mmmodel import atomic
from mmmodel.data.concepts import parse_captions
from mmmodel.limits import RunError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")
INSTALLED = (Path("/") / STAMPS, Path("/usr/local/share/tuxpaint/stamps"))

# `_desc` is English, `_desc_<tag>` another language; one file of the package ends in .ogg.ogg, and Portuguese is .wav
_DESCRIPTION = re.compile(r"(?P<stem>.+)_desc(?:_(?P<tag>[A-Za-z]{2,3}(?:[_@][A-Za-z]+)?))?(?:\.(?:ogg|wav|flac))+")


@dataclass(frozen=True)
class Stamp:
    image: str  # path under the tree without suffix: "animals/birds/owl"
    image_file: Path
    captions: dict[str, str]  # language tag -> caption
    speech: dict[str, Path] = field(default_factory=dict)  # language tag -> recording of the caption

    @property
    def category(self) -> str:
        return self.image.split("/", 1)[0]


@dataclass(frozen=True)
class Scan:
    stamps: list[Stamp]  # sorted by image
    skipped: dict[str, list[str]]  # reason -> files left out, so that nothing disappears silently


def scan(tree: Path) -> Scan:
    """List the stamps of a tree: every image with a caption file, PNG before SVG, and its spoken descriptions."""
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    images: dict[str, Path] = {}
    for path in files:
        if path.suffix in (".png", ".svg") and (path.suffix == ".png" or _stem(tree, path) not in images):
            images[_stem(tree, path)] = path

    skipped: dict[str, list[str]] = {
        "image without caption": [],
        "speech without image": [],
        "caption without image": [],
    }
    captions: dict[str, dict[str, str]] = {}
    for path in files:
        if path.suffix == ".txt":
            if (stem := _stem(tree, path)) in images:
                captions[stem] = parse_captions(path.read_text(encoding="utf-8"))
            else:
                skipped["caption without image"].append(str(path.relative_to(tree)))
    speech: dict[str, dict[str, Path]] = {}
    for path in files:
        match = _DESCRIPTION.fullmatch(path.name)
        if match is None:
            continue
        stem = (path.parent / match["stem"]).relative_to(tree).as_posix()
        if stem in captions:
            speech.setdefault(stem, {}).setdefault(match["tag"] or "en", path)
        else:
            skipped["speech without image"].append(str(path.relative_to(tree)))

    stamps = []
    for stem, image_file in sorted(images.items()):
        if "en" in captions.get(stem, {}):
            stamps.append(Stamp(stem, image_file, captions[stem], speech.get(stem, {})))
        else:
            skipped["image without caption"].append(str(image_file.relative_to(tree)))  # the _mirror variants
    return Scan(stamps, {reason: names for reason, names in skipped.items() if names})


def _stem(tree: Path, path: Path) -> str:
    return path.relative_to(tree).with_suffix("").as_posix()


def find_tree(given: Path | None = None) -> Path | None:
    """The stamps folder at `given` (itself, or a prefix it was unpacked into), else an installed one, else None."""
    if given is None:
        return next((tree for tree in INSTALLED if tree.is_dir()), None)
    for tree in (given / STAMPS, given):
        if any(tree.glob("*/**/*.txt")):
            return tree
    raise FileNotFoundError(f"stamps: no captions (*.txt) under {given}, expected {STAMPS} or the stamps folder itself")


def download(into: Path) -> Path:
    """Fetch the package file with apt-get, as any user, and return its path; an earlier download is kept and used."""
    if found := sorted(into.glob(f"{PACKAGE}_*.deb")):
        return found[-1]
    if shutil.which("apt-get") is None:
        raise RunError(
            f"stamps: apt-get is not here. Fetch {PACKAGE} from a Debian mirror and pass it with --deb, "
            "or an unpacked tree with --tree"
        )
    with atomic.private_folder(into, PACKAGE) as partial:
        attempt = _run(["apt-get", "download", PACKAGE], cwd=partial)
        if attempt.returncode != 0:
            # A bare machine has no package lists and we may not be root: keep lists of our own and try once more.
            state = partial / "apt"
            (state / "lists" / "partial").mkdir(parents=True)
            private = [
                "-o",
                f"Dir::State::lists={state / 'lists'}",
                "-o",
                f"Dir::Cache={state}",
                "-o",
                "Acquire::Languages=none",
            ]
            _run(["apt-get", *private, "update"], cwd=partial)
            attempt = _run(["apt-get", *private, "download", PACKAGE], cwd=partial)
        fetched = sorted(partial.glob(f"{PACKAGE}_*.deb"))
        if attempt.returncode != 0 or not fetched:
            raise RunError(
                f"stamps: `apt-get download {PACKAGE}` failed: {_last_words(attempt)}; run `apt-get update` as root "
                "and try again, or pass a package file with --deb or an unpacked tree with --tree"
            )
        return Path(shutil.move(fetched[-1], into / fetched[-1].name.replace("%3a", "_")))


def unpack(deb: Path, into: Path) -> Path:
    """Unpack a package file without root; returns the stamps folder."""
    if shutil.which("dpkg-deb") is None:
        raise RunError("stamps: dpkg-deb is not here; unpack the package elsewhere and pass the folder with --tree")
    result = _run(["dpkg-deb", "-x", str(deb), str(into)])
    if result.returncode != 0:
        raise RunError(f"stamps: {deb} does not unpack (an incomplete download? delete it): {_last_words(result)}")
    return find_tree(into)


def describe(deb: Path) -> dict[str, str]:
    """Name, version and checksum of a package file, for the manifest."""
    version = _run(["dpkg-deb", "-f", str(deb), "Version"]).stdout.strip()
    with deb.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"package": PACKAGE, "version": version, "sha256": digest}


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _last_words(attempt: subprocess.CompletedProcess[str]) -> str:
    return " ".join(attempt.stderr.split())[-400:]
