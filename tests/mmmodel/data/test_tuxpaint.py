"""Finding files: names that mislead, and packages that are not there."""

import os
import subprocess

import pytest
from fake_stamps import make_tree

from mmmodel.data import tuxpaint
from mmmodel.limits import RunError


def test_scan_pairs_images_captions_and_descriptions(tmp_path):
    tree = make_tree(tmp_path)
    scan = tuxpaint.scan(tree)
    stamps = {stamp.image: stamp for stamp in scan.stamps}
    assert list(stamps) == [
        "animals/birds/owl",
        "animals/birds/owl_grey",
        "food/pear",
        "food/plum",
        "symbols/a.b",
        "symbols/big",
    ]
    assert stamps["animals/birds/owl"].image_file.suffix == ".png"
    assert stamps["food/pear"].category == "food"
    names = {image: {tag: path.name for tag, path in stamp.speech.items()} for image, stamp in stamps.items()}
    assert names["animals/birds/owl"] == {"en": "owl_desc.ogg", "fr": "owl_desc_fr.ogg", "ru": "owl_desc_ru.ogg"}
    assert names["food/pear"] == {"da": "pear_desc_da.ogg.ogg", "pt_BR": "pear_desc_pt_BR.wav"}
    assert names["animals/birds/owl_grey"] == {}


def test_scan_names_what_it_leaves_out(tmp_path):
    skipped = tuxpaint.scan(make_tree(tmp_path)).skipped
    assert skipped == {
        "image without caption": ["animals/birds/owl_mirror.png"],
        "speech without image": ["food/gift_desc_fr.ogg"],
        "caption without image": ["food/gift.txt"],
    }


def test_find_tree_takes_the_folder_or_its_prefix(tmp_path):
    tree = make_tree(tmp_path)
    assert tuxpaint.find_tree(tmp_path) == tree
    assert tuxpaint.find_tree(tree) == tree
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no captions"):
        tuxpaint.find_tree(tmp_path / "empty")


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """An apt-get that fails until it was updated with private lists, as on a bare machine; logs its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "apt-get"

    def install(after_update):
        script.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> {tmp_path}/calls\n'
            'case "$*" in\n'
            "  *update) touch updated ;;\n"
            f"  *download*) {after_update} ;;\n"
            "esac\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return tmp_path / "calls"

    return install


def test_download_makes_package_lists_of_its_own(tmp_path, fake_apt):
    calls = fake_apt(
        '[ -e updated ] && touch tuxpaint-stamps-default_1_all.deb || { echo "E: Unable to locate" >&2; exit 100; }'
    )
    deb = tuxpaint.download(tmp_path / "cache")
    assert deb == tmp_path / "cache" / "tuxpaint-stamps-default_1_all.deb"
    assert deb.exists()
    assert [line.split()[-1] for line in calls.read_text().splitlines()] == [
        tuxpaint.PACKAGE,
        "update",
        tuxpaint.PACKAGE,
    ]
    assert list((tmp_path / "cache").iterdir()) == [deb]  # nothing else is left behind
    assert tuxpaint.download(tmp_path / "cache") == deb
    assert len(calls.read_text().splitlines()) == 3  # kept, not fetched again


def test_download_failure_says_what_to_run(tmp_path, fake_apt):
    fake_apt('{ echo "E: Unable to locate package" >&2; exit 100; }')
    with pytest.raises(RunError, match=r"^[^\n]*Unable to locate package.*apt-get update.*--deb.*--tree$"):
        tuxpaint.download(tmp_path / "cache")


def test_download_without_apt_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="--deb"):
        tuxpaint.download(tmp_path / "cache")


def test_a_package_file_unpacks_and_a_broken_one_is_named(tmp_path):
    if tuxpaint.shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not here")
    make_tree(tmp_path / "package")
    (tmp_path / "package/DEBIAN").mkdir()
    control = f"Package: {tuxpaint.PACKAGE}\nVersion: 1-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    (tmp_path / "package/DEBIAN/control").write_text(control)
    deb = tmp_path / "x.deb"
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "package"), str(deb)], check=True, capture_output=True)
    assert len(tuxpaint.scan(tuxpaint.unpack(deb, tmp_path / "unpacked")).stamps) == 6
    assert tuxpaint.describe(deb)["version"] == "1-1"
    deb.write_bytes(deb.read_bytes()[:300])
    with pytest.raises(RunError, match=r"x\.deb does not unpack"):
        tuxpaint.unpack(deb, tmp_path / "again")
