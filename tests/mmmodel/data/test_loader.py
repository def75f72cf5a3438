"""Reading samples and batches: any subset of modalities, broken members, workers, and resume to the very next batch."""

import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from mmmodel.data import media
from mmmodel.data.loader import BatchLoader, BrokenSampleError, ShardDataset, TooManyBrokenSamplesError
from mmmodel.data.plan import BatchPlan
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


def keys(batch):
    return [sample.key for sample in batch]


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


def test_a_broken_member_is_named_and_the_others_still_read(tmp_path):
    dataset = make_shards(tmp_path, broken=[3])
    with pytest.raises(BrokenSampleError, match=r"s003\.png: UnidentifiedImageError"):
        dataset[3]
    assert dataset.read_text(3) == "text 3"


def test_a_truncated_shard_is_named(tmp_path):
    dataset = make_shards(tmp_path)
    with (tmp_path / "b.tar").open("r+b") as file:
        file.truncate(dataset.entries[15].members["png"][0] + 1)
    with pytest.raises(BrokenSampleError, match=r"s015\.png: ValueError: b\.tar ends after 1 of"):
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


@pytest.mark.parametrize("workers", [0, 2])  # read ahead by workers must not move the plan
def test_resume_gives_the_very_next_batch(tmp_path, workers):
    dataset = make_shards(tmp_path)

    def loader():
        return BatchLoader(dataset, BatchPlan(20, max_samples=3, seed=5), collate=keys, workers=workers)

    unbroken = take(loader(), 12)  # into the second epoch: 7 batches each
    for stop in (1, 6, 7, 9) if workers == 0 else (6,):  # inside, before and at the end of an epoch
        first = loader()
        assert take(first, stop) == unbroken[:stop]
        second = loader()
        second.load_state_dict(first.state_dict())
        assert take(second, 12 - stop) == unbroken[stop:]


def take(loader, number):
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == number:
            return batches
    return batches


def test_broken_samples_are_counted_logged_and_left_out(tmp_path, caplog):
    dataset = make_shards(tmp_path, broken=[3, 4, 12])
    loader = BatchLoader(dataset, BatchPlan(20, max_samples=4, seed=0, shuffle=False, epochs=2), collate=keys)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [3, 3, 4, 3, 4] * 2
    assert set(loader.broken) == {"s003", "s004", "s012"}
    assert [record.message for record in caplog.records if "s003" in record.message]
    assert len(caplog.records) == 3  # once, not once an epoch


def test_a_batch_of_broken_samples_only_is_passed_over(tmp_path):
    dataset = make_shards(tmp_path, broken=[4, 5])
    loader = BatchLoader(dataset, BatchPlan(20, max_samples=2, seed=0, shuffle=False, epochs=1), collate=keys)
    assert len(list(loader)) == 9
    assert (loader.plan.epoch, loader.plan.batch) == (1, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_in_a_row_stop(tmp_path, workers):
    dataset = make_shards(tmp_path, broken=range(5, 10))

    def loader(limit):
        plan = BatchPlan(20, max_samples=4, seed=0, shuffle=False, epochs=1)
        return BatchLoader(dataset, plan, max_consecutive_failures=limit, workers=workers)

    with pytest.raises(TooManyBrokenSamplesError, match=r"5 samples in a row.*s009\.png"):
        list(loader(4))
    assert sum(map(len, loader(5))) == 15


def test_plan_and_dataset_must_agree(tmp_path):
    with pytest.raises(ValueError, match="plan is for 19 samples, expected the dataset's 20"):
        BatchLoader(make_shards(tmp_path), BatchPlan(19, max_samples=2, seed=0))
