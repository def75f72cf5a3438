"""Reading samples: any subset of modalities, selection, broken members, threads and processes."""

import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from mmmodel.configs import ConfigError
from mmmodel.data import media
from mmmodel.data.loader import BrokenSampleError, ShardDataset
from mmmodel.data.shards import write_shard

PNG = media.encode_png(Image.new("RGB", (3, 2), "green"))
FLAC = media.encode_flac(np.zeros(160, np.float32))


def make_shards(folder, broken=(), number=20):
    """`number` samples over two shards; those in `broken` have a png that does not decode."""
    samples = [
        {
            "__key__": f"s{i:03d}",
            "txt": f"text {i}",
            "json": {"split": "train", "lang": "fr" if i % 2 else "en", "i": i},
        }
        for i in range(number)
    ]
    for i, sample in enumerate(samples):
        sample["png"] = b"\x89PNG nonsense" if i in broken else PNG
    write_shard(folder / "a.tar", samples[: number // 2])
    write_shard(folder / "b.tar", samples[number // 2 :])
    return ShardDataset(folder)


def test_any_subset_of_modalities(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [
            {"__key__": "all", "txt": " été \n", "png": PNG, "flac": FLAC, "json": {"lang": "fr"}},
            {"__key__": "none", "json": {}},
            {"__key__": "speech", "flac": FLAC},
        ],
    )
    everything, nothing, speech = (ShardDataset(tmp_path)[i] for i in range(3))
    assert (everything.text, everything.image.shape, len(everything.waveform)) == ("été", (2, 3, 3), 160)
    assert (nothing.text, nothing.image, nothing.waveform, nothing.meta) == (None, None, None, {})
    assert (speech.text, speech.image, len(speech.waveform)) == (None, None, 160)


def test_selection_by_split_and_language(tmp_path):
    make_shards(tmp_path)
    assert len(ShardDataset(tmp_path, split="train", languages=["fr"])) == 10
    assert ShardDataset(tmp_path, languages=["fr"]).metas[0]["i"] == 1
    with pytest.raises(ValueError, match=r"split 'test' and a language in \['fr'\].*\['train'\].*\['en', 'fr'\]"):
        ShardDataset(tmp_path, split="test", languages=["fr"])
    with pytest.raises(ConfigError, match=r"languages is 'fr', expected several: \['fr'\]"):
        ShardDataset(tmp_path, languages="fr")


@pytest.mark.parametrize(
    ("meta", "split"),
    [
        (None, "train"),  # no KEY.json
        ({"lang": "fr"}, "train"),
        ({"split": None}, "train"),
        ({"split": "Train"}, "train"),
        ({"split": "val"}, "validation"),
        ({"split": "VALID"}, "validation"),
        ({"split": "dev "}, "validation"),
        ({"split": "Fold-3"}, "fold-3"),
    ],
)
def test_a_split_has_one_name_however_it_is_written(tmp_path, meta, split):
    write_shard(tmp_path / "a.tar", [{"__key__": "x", "txt": "a", **({} if meta is None else {"json": meta})}])
    (entry,) = ShardDataset(tmp_path, split).entries
    assert entry.split == split
    if meta and meta.get("split"):
        assert len(ShardDataset(tmp_path, meta["split"])) == 1  # and so is who asks for it
    with pytest.raises(ConfigError, match=rf"holds no sample of split 'no'; there are splits \['{split}'\]"):
        ShardDataset(tmp_path, "no")


def test_metadata_that_says_nothing_leaves_the_defaults(tmp_path):
    """Null and a number where a name belongs are what a table's export gives."""
    meta = {"split": None, "lang": None, "concept": None, "image": None}
    numbers = {"concept": 7, "image": 12}
    write_shard(tmp_path / "a.tar", [{"__key__": "x", "json": meta}, {"__key__": "y", "json": numbers}])
    x, y = ShardDataset(tmp_path).entries
    assert (x.language, x.concept, x.group) == ("", "x", "x")
    assert (y.language, y.concept, y.group) == ("", "7", "12")
    with pytest.raises(ConfigError, match=r"languages \[''\] \('': KEY.json has no lang; languages= takes all\)"):
        ShardDataset(tmp_path, languages=("fr",))


def test_a_broken_member_is_named_and_the_others_still_read(tmp_path):
    dataset = make_shards(tmp_path, broken=[3])
    with pytest.raises(BrokenSampleError, match=r"a\.tar: s003\.png: it is no picture"):
        dataset[3]
    assert dataset.read_text(3) == "text 3"


def test_a_truncated_shard_is_named(tmp_path):
    dataset = make_shards(tmp_path)
    with (tmp_path / "b.tar").open("r+b") as file:
        file.truncate(dataset.entries[15].members["png"][0] + 1)
    with pytest.raises(BrokenSampleError, match=r"b\.tar: s015\.png: the shard ends after 1 of"):
        dataset.read_image(15)


def test_dataset_pickles_and_serves_threads(tmp_path):
    dataset = make_shards(tmp_path)
    assert dataset[0].text == "text 0"
    copy = pickle.loads(pickle.dumps(dataset))
    wrong = []

    def read(thread):
        for i in np.random.default_rng(thread).permutation(len(copy)):
            if copy[i].text != f"text {i}":
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
