"""Preparation end to end on a tree made here, and the published counts where a real cache exists."""

import json

import numpy as np
import pytest
import webdataset
from fake_stamps import make_tree

from mmmodel import settings
from mmmodel.data import stamps
from mmmodel.data.concepts import split_of
from mmmodel.data.loader import ShardDataset

REAL_CACHE = settings.current().cache  # at import: tests run with a cache of their own, and this one is only read


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("stamps")
    make_tree(root / "tree")
    folder = stamps.prepare(cache=root / "cache", tree=root / "tree", workers=2, progress=False)
    return root, folder


def test_samples_are_image_and_language_pairs_with_what_there_is(prepared):
    _, folder = prepared
    dataset = ShardDataset(folder)
    kinds = {entry.key: set(entry.members) - {"json"} for entry in dataset.entries}
    everything = {"txt", "png", "flac"}
    assert kinds == {
        "animals/birds/owl/en": everything,
        "animals/birds/owl/fr": everything,
        "animals/birds/owl/es": {"txt", "png"},
        "animals/birds/owl/ru": {"png", "flac"},
        "animals/birds/owl_grey/en": {"txt", "png"},
        "animals/birds/owl_grey/fr": {"txt", "png"},
        "food/pear/en": {"txt", "png"},
        "food/pear/fr": {"txt", "png"},
        "food/pear/da": everything,
        "food/plum/en": {"txt", "png"},
        "symbols/a-b/en": {"txt", "png"},
        "symbols/a-b/fr": {"txt", "png"},
        "symbols/big/en": {"txt", "png"},
    }


def test_samples_hold_what_their_metadata_says(prepared):
    _, folder = prepared
    dataset = ShardDataset(folder)
    by_key = {key: dataset[i] for i, key in enumerate(dataset.keys)}
    owl = by_key["animals/birds/owl/fr"]
    assert owl.text == "Un hibou."
    assert owl.image.shape == (20, 30, 3)
    assert owl.image[0, 0].tolist() == [255, 255, 255]
    assert owl.image[10, 10].tolist() == [255, 0, 0]
    assert abs(len(owl.waveform) - 0.8 * 16_000) <= 400  # Vorbis may pad
    assert owl.meta == {
        "lang": "fr",
        "concept": "a grey owl.",  # the smallest English caption of the two owls, joined by their French one
        "category": "animals",
        "split": split_of("a grey owl."),
        "image": "animals/birds/owl",
        "data": "stamps",
        "image_size": [20, 30],
        "audio_samples": len(owl.waveform),
    }
    assert by_key["symbols/big/en"].image.shape == (418, 627, 3)  # 512 x 512 pixels at 3 : 2
    assert by_key["food/pear/en"].image.shape == (20, 40, 3)  # 30 x 15 pt at 96 dpi
    assert (by_key["food/plum/en"].image[..., 1] < 255).any()  # an SVG without a size is drawn at its bounding box


def test_manifest_counts_and_names_what_is_missing(prepared):
    _, folder = prepared
    assert stamps.is_stamps(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["samples"] == 13
    assert manifest["counts"]["images"] == 6
    assert manifest["counts"]["concepts"] == 5
    assert manifest["counts"]["with_speech"] == 4
    assert manifest["counts"]["triples"] == {"en": 1, "fr": 1, "da": 1}
    assert manifest["left_out"] == {"image without caption": 1, "speech without image": 1, "caption without image": 1}
    assert len(manifest["broken"]) == 1
    assert "big_desc_fr.ogg" in manifest["broken"][0]
    assert sum(split["images"] for split in manifest["counts"]["splits"].values()) == 6


def test_concepts_do_not_straddle_splits(prepared):
    splits = {}
    for meta in ShardDataset(prepared[1]).metas:
        splits.setdefault(meta["concept"], set()).add(meta["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_shards_are_plain_webdataset(prepared):
    _, folder = prepared
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len(read) == 13
    assert read["animals/birds/owl/fr"]["txt"] == b"Un hibou."


def test_second_call_returns_at_once_and_leaves_no_rest(prepared, monkeypatch, caplog):
    root, folder = prepared
    monkeypatch.setattr(stamps.tuxpaint, "scan", None)  # any work would fail
    assert stamps.prepare(cache=root / "cache") == folder
    assert [path.name for path in (root / "cache").iterdir()] == ["stamps"]
    assert not caplog.messages


@pytest.mark.parametrize("source", ["deb", "tree"])
def test_second_call_says_that_it_does_not_read_what_it_is_given(prepared, caplog, source):
    root, folder = prepared
    assert stamps.prepare(cache=root / "cache", **{source: root / "other"}) == folder
    assert caplog.messages == [
        f"stamps: {root}/other is not read: {folder} is there already; delete it to make it anew"
    ]


def test_other_languages_go_to_another_folder(prepared):
    root, folder = prepared
    other = stamps.prepare(cache=root / "cache", tree=root / "tree", languages=["pt_BR"], workers=0, progress=False)
    assert other != folder
    assert ShardDataset(other).keys == ["food/pear/pt_BR"]
    assert ShardDataset(other)[0].waveform is not None


def test_a_broken_run_leaves_nothing_that_looks_prepared(tmp_path, monkeypatch):
    make_tree(tmp_path / "tree")

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stamps, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        stamps.prepare(cache=tmp_path / "cache", tree=tmp_path / "tree", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_set_of_another_recipe_is_replaced(tmp_path, monkeypatch):
    make_tree(tmp_path / "tree")
    options = {"cache": tmp_path / "cache", "tree": tmp_path / "tree", "workers": 0, "progress": False}
    monkeypatch.setattr(stamps, "RECIPE", 0)
    (stamps.prepare(**options) / "old").touch()
    monkeypatch.undo()
    assert not (stamps.prepare(**options) / "old").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["stamps"]


def test_verify_tells_other_data_apart(prepared):
    assert stamps.verify(prepared[1])["images"] == (6, 950)


def test_real_stamps_have_the_published_counts():
    folder = REAL_CACHE / "stamps"
    if stamps.read_manifest(folder) is None:
        pytest.skip("the real stamps are not prepared here (mmmodel data stamps)")
    assert {name: found for name, (found, _) in stamps.verify(folder).items()} == {
        "images": 950,
        "concepts": 729,
        "test images": 219,
        "validation images": 90,
        "train images": 641,
    }
    dataset = ShardDataset(folder, split="test", languages=["fr", "es", "ru"])
    sample = dataset[len(dataset) // 2]
    assert sample.text
    assert sample.image.shape[:2] == tuple(sample.meta["image_size"])
    if sample.waveform is not None:
        assert len(sample.waveform) == sample.meta["audio_samples"]
        assert np.abs(sample.waveform).max() > 0
