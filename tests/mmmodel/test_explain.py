"""The command from run to page: what it writes, for any subset of modalities, and what it refuses."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from builders import PRESENT, learner, samples
from PIL import Image

from mmmodel import cli, configs, explain
from mmmodel.data import media
from mmmodel.data.loader import ShardDataset
from mmmodel.data.shards import write_index, write_shard
from mmmodel.explaining import page
from mmmodel.explaining.sample import Sample
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.run import finetune
from mmmodel.pretraining import Corpus


class Page(HTMLParser):
    """Tags, what they refer to, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize("members", [("png", "txt", "flac"), ("png", "txt"), ("flac",)], ids="-".join)
def test_writes_a_page_with_everything_inside(run, shards, tmp_path, members):
    """For samples with all modalities, two, or one; the synthetic set has them all."""
    entry = next(e for e in ShardDataset(shards).entries if set(e.members) == {*members, "json"})
    cli.main(["explain", "--from", str(run), "--key", entry.key, "--out", str(tmp_path)])
    read = Page((tmp_path / "index.html").read_text())
    drawn = sorted(tmp_path.glob("*.png"))
    assert read.tags.count("img") == len(drawn)
    assert all(link.startswith("data:image/png;base64,") for link in read.links)  # self-contained
    assert "script" not in read.tags
    assert entry.key in read.words
    for path in drawn:  # drawn, and not over the whole width of a phone
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 5
        assert pixels.shape[1] == round(3.6 * 220)
    summary = json.loads((tmp_path / "explanation.json").read_text())
    assert sum(summary["token_shares"].values()) == pytest.approx(1)
    for rows in summary["mass"].values():
        np.testing.assert_allclose(np.sum([rows[name] for name in rows], axis=0), 1, atol=1e-5)
    assert ("hidden-words.png" in {p.name for p in drawn}) == ("txt" in members)
    assert ("ranks.png" in {p.name for p in drawn}) == (len(members) > 1)


def test_a_page_that_cannot_be_made_leaves_the_one_before(run, tmp_path, monkeypatch):
    key = ShardDataset(json.loads((run / "config.json").read_text())["data"], "test").keys[0]
    explain.explain(str(run), str(tmp_path), key=key)
    before = (tmp_path / "index.html").read_text()
    monkeypatch.setattr(page, "render", lambda *parts: "half a page \ud800 of which the rest cannot be written")
    with pytest.raises(UnicodeEncodeError):
        explain.explain(run, tmp_path, key=key)
    assert (tmp_path / "index.html").read_text() == before


@pytest.mark.parametrize(
    ("task", "label", "has_search"), [("classification", "category", False), ("retrieval", "concept", True)]
)
def test_the_encoder_of_a_fine_tuned_run_is_explained(run, tmp_path, task, label, has_search):
    finetune(run, FinetuneConfig(task=task, label=label, epochs=1), tmp_path / "tuned")
    cli.main(["explain", "--from", str(tmp_path / "tuned"), "--out", str(tmp_path / "page")])
    summary = json.loads((tmp_path / "page" / "explanation.json").read_text())
    assert set(summary["mass"]) == {"text", "image", "audio"}
    assert summary["hidden_words"] == []
    assert bool(summary["searches"]) == has_search


def test_without_a_key_the_first_complete_sample_of_the_split(run, shards, tmp_path):
    found = explain.explain(run, tmp_path, split="validation")
    assert found.sample.item.split == "validation"
    assert found.sample.modalities == ("text", "image", "audio")
    assert found.sample.caption
    assert all(search.choices > 1 for search in found.searches)


@pytest.mark.parametrize(("languages", "expected"), [(("ru", "fr"), "fr"), (("el",), "be"), ((), "be")])
def test_a_language_of_the_run_is_preferred_in_other_data(tmp_path, languages, expected):
    """The first complete sample of data in many languages may be in one that the model cannot read."""
    picture = media.encode_png(Image.new("RGB", (32, 32), "teal"))
    sound = media.encode_flac(np.random.default_rng(0).normal(size=4000).astype(np.float32) * 0.1)
    rows = [
        {"__key__": f"owl/{tag}", "txt": "owl", "png": picture, "flac": sound, "json": {"split": "test", "lang": tag}}
        for tag in ("be", "fr", "ru")
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", rows))
    _, learned = learner()
    learned.config = dataclasses.replace(learned.config, languages=languages)
    sample, _ = explain._open(learned, tmp_path, (), "", "test")
    assert sample.item.language == expected


def test_without_a_key_in_data_that_lacks_a_modality(labelled, tmp_path):
    """Captions alone: no sample has everything that the model reads."""
    _, learned = learner()
    sample, _ = explain._open(learned, labelled, (), "", "test")
    assert sample.modalities == ("text",)
    meta = {"__key__": "a", "txt": "owl", "json": {"split": "train"}}
    write_index(tmp_path, write_shard(tmp_path / "a-00000.tar", [meta]))
    with pytest.raises(configs.ConfigError, match="has no sample of split 'test' that the model reads; name a key"):
        explain._open(learned, tmp_path, (), "", "test")


def test_an_unknown_key_is_one_line_with_suggestions(run, tmp_path):
    with pytest.raises(SystemExit, match=r"has no sample 'synthetic-000000'; near it are synthetic-0\d+"):
        cli.main(["explain", "--from", str(run), "--key", "synthetic-000000", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no such file; `mmmodel pretrain` writes"):
        cli.main(["explain", "--from", str(tmp_path / "none"), "--out", str(tmp_path)])


@pytest.mark.parametrize("number", range(len(PRESENT)))
def test_influence_is_relative_to_the_average_part(number):
    _, learned = learner()
    items, features = samples()
    found = explain.look(learned, Sample(items[number], features), Corpus(items, features))
    assert set(found.influence) == set(found.shares) == set(PRESENT[number])
    for per_reader in found.influence.values():
        for values in per_reader.values():
            assert values.mean() == pytest.approx(1)
            assert (values >= 0).all()


def test_the_data_cannot_write_into_the_page():
    """A caption is text, whatever it holds."""
    text = page.render("<b>k", [("caption", "<script>alert(1)</script>")], [page.Section("a & b", "<i>")], "\"'<")
    assert not re.search(r"<script|<b>|<i>", text)
    assert "&lt;script&gt;" in text
