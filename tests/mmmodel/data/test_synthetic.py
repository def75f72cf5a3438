"""The procedural set: the same for everybody, complete where it is scored, ragged where it is trained on."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from mmmodel import pretraining
from mmmodel.data import synthetic
from mmmodel.data.loader import ShardDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic.prepare(tmp_path_factory.mktemp("synthetic") / "set", samples=300, seed=7)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_same_seed_same_bytes(tmp_path):
    first, again, other = (
        synthetic.prepare(tmp_path / n, samples=30, seed=s) for n, s in (("a", 7), ("b", 7), ("c", 8))
    )
    assert digests(first) == digests(again)
    assert digests(first) != digests(other)


def test_a_sample_depends_only_on_seed_and_number(folder):
    dataset = ShardDataset(folder)
    index = dataset.keys.index("synthetic-0000123")
    members = synthetic.make_sample(7, 123)
    assert dataset.metas[index] == members["json"]
    assert dataset.read_text(index) == members.get("txt")


def test_held_out_combinations_are_disjoint_and_complete(folder):
    concepts = {}
    for entry in ShardDataset(folder).entries:
        concepts.setdefault(entry.meta["split"], set()).add(entry.meta["concept"])
        if entry.meta["split"] != "train":
            assert {"txt", "png", "flac"} <= set(entry.members)
    assert set(concepts) == {"train", "validation", "test"}
    assert not concepts["train"] & concepts["test"]
    # each attribute value occurs in training: only combinations are new
    words = {word for concept in concepts["train"] for word in concept.split()}
    assert {word for concept in concepts["test"] for word in concept.split()} <= words


def test_training_samples_lack_modalities_at_random(folder):
    missing = Counter()
    for entry in ShardDataset(folder, split="train").entries:
        kinds = set(entry.members) - {"json"}
        assert kinds
        missing.update({"txt", "png", "flac"} - kinds)
    total = len(ShardDataset(folder, split="train"))
    assert all(0.05 * total < missing[kind] < 0.3 * total for kind in ("txt", "png", "flac"))


def test_lengths_vary_and_metadata_tells_them(folder):
    dataset = ShardDataset(folder, split="test")
    samples = [dataset[i] for i in range(20)]
    for sample in samples:
        assert sample.meta["image_size"] == list(sample.image.shape[:2])
        assert sample.meta["audio_samples"] == len(sample.waveform)
        assert (sample.meta["data"], sample.meta["lang"]) == ("synthetic", "xx")
    assert len({sample.image.shape for sample in samples}) > 15
    assert max(len(s.waveform) for s in samples) > 2 * min(len(s.waveform) for s in samples)


@pytest.mark.parametrize("shape", synthetic.SHAPES)  # every shape draws, every contour sings
def test_picture_and_melody_show_the_attributes(shape):
    rng = np.random.default_rng(3)
    pixels = np.asarray(synthetic.draw(rng, "one", "large", "red", shape, "white"))
    assert (pixels == synthetic.COLOURS["red"]).all(axis=-1).mean() > 0.05
    assert (pixels == 255).all(axis=-1).mean() > 0.05
    one, three = (synthetic.sing(np.random.default_rng(3), n, "small", "red", shape) for n in ("one", "three"))
    assert len(three) > 2 * len(one)
    assert np.isfinite(one).all()
    assert np.abs(one).max() < 1


def test_pictures_of_different_shapes_differ():
    drawn = {
        synthetic.draw(np.random.default_rng(3), "one", "large", "red", s, "white").tobytes() for s in synthetic.SHAPES
    }
    assert len(drawn) == len(synthetic.SHAPES)


def test_preparing_again_replaces_its_own_folder_only(folder, tmp_path):
    out = tmp_path / "set"
    synthetic.prepare(out, samples=5, seed=0)
    assert len(ShardDataset(synthetic.prepare(out, samples=3, seed=0))) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds something else"):
        synthetic.prepare(tmp_path / "mine", samples=3, seed=0)
    assert (tmp_path / "mine/thesis.txt").exists()
    with pytest.raises(ValueError, match="samples is 0"):
        synthetic.prepare(out, samples=0, seed=0)


def test_a_link_to_a_folder_stays_one(tmp_path):
    """Data often lie on another disk than the name that they are used by."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to("disk")
    synthetic.prepare(tmp_path / "set", samples=3, seed=0)
    assert (tmp_path / "set").is_symlink()
    assert len(ShardDataset(tmp_path / "disk")) == 3


def test_two_processes_that_prepare_the_set_do_not_take_it_from_each_other(tmp_path, monkeypatch):
    """The slower one finds the other's shards, perhaps being read, and leaves them as they are."""
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path))
    monkeypatch.setattr(pretraining, "SYNTHETIC_SAMPLES", 20)
    real, folder = synthetic.write_index, tmp_path / "synthetic-20"

    def write_index(*arguments):
        monkeypatch.setattr(synthetic, "write_index", real)
        (synthetic.prepare(folder, samples=20, seed=0) / "of the rival").touch()
        real(*arguments)

    monkeypatch.setattr(synthetic, "write_index", write_index)
    assert pretraining.find_data("synthetic") == folder
    assert (folder / "of the rival").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic-20"]
    assert len(ShardDataset(folder)) == 20
