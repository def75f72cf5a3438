"""Ablation against what one would compute by hand; dropping what is not there changes no bit."""

import numpy as np
import pytest
import torch
from builders import WORDS, batch_of, learner, samples
from torch.nn import functional as F

from mmmodel.evaluate import embed
from mmmodel.explaining.ablation import searches, word_loss, word_losses
from mmmodel.explaining.sample import Sample, hide_each_word, pieces_of, words_of
from mmmodel.features import Item
from mmmodel.frontends.text import special_ids, train_tokenizer
from mmmodel.pretraining import Corpus


def sample(number):
    items, features = samples()
    return Sample(items[number], features)


def test_dropping_an_absent_modality_changes_nothing():
    _, learned = learner()
    lacks_image = sample(2)
    assert lacks_image.modalities == ("text", "audio")
    assert lacks_image.without("image") == lacks_image
    assert word_loss(learned, lacks_image, ("image",)) == word_loss(learned, lacks_image)
    assert word_loss(learned, sample(3), ("image", "audio")) == word_loss(learned, sample(3))
    before, after = (
        embed(learned, Corpus([s.item], s.features), [s.item]) for s in (lacks_image, lacks_image.without("image"))
    )
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_dropping_a_present_one_does():
    _, learned = learner()
    whole = sample(0)
    assert len({word_loss(learned, whole, drop).nats for drop in ((), ("image",), ("audio",))}) == 3


def test_word_loss_equals_one_piece_at_a_time():
    """All copies in packed batches against each alone, head and softmax written out."""
    _, learned = learner()
    whole = sample(4)  # 11 words, all modalities
    model, head = learned.model, learned.objectives["masked_text"]
    ids = whole.feature("text")
    items, features = hide_each_word(whole, np.arange(1, len(ids)), head.mask_id)
    expected = []
    for position in range(1, len(ids)):
        assert features.get("text", items[position - 1].rows["text"])[position] == head.mask_id
        batch = batch_of(learned, [items[position - 1]], features)
        with torch.no_grad():
            row = model.encode(model.streams(batch), batch.layout)[position]
            hidden = head.norm(F.gelu(head.dense(row), approximate="tanh"))
            expected.append(float(-(model.token_table @ hidden + head.bias).log_softmax(0)[ids[position]]))
    found = word_loss(learned, whole)
    np.testing.assert_allclose(found.nats, expected, atol=2e-5)
    assert found.given == ("image", "audio")
    assert found.mean == pytest.approx(np.mean(expected))


def test_every_subset_is_tried_the_whole_first():
    _, learned = learner()
    given = [loss.given for loss in word_losses(learned, sample(0))]
    assert given == [("image", "audio"), ("image",), ("audio",), ()]


def test_nothing_to_read_gives_nothing():
    _, learned = learner()
    assert word_losses(learned, sample(1)) == []  # a picture alone
    assert word_loss(learned, sample(0), ("text",)) is None


def test_searches_rank_against_other_concepts_only():
    item = Item("k", "g", "", "mine", "test", {"text": 0, "image": 0, "audio": 0})
    own = {"text": np.array([1.0, 0.0]), "image": np.array([0.6, 0.8]), "audio": np.array([0.0, 1.0])}
    pictures = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8], [np.nan, np.nan]])
    gallery = {"image": pictures, "text": pictures * np.nan, "audio": pictures * np.nan}
    concepts = np.array(["other", "other", "other", "mine", "other"])
    found = {(s.target, s.given): s for s in searches(Sample(item, None), own, gallery, concepts)}
    by_text, by_both = found["image", ("text",)], found["image", ("text", "audio")]
    assert (by_text.rank, by_text.choices) == (3, 4)  # two of three wrong ones are nearer to the words
    assert by_text.similarity == pytest.approx(0.6)
    assert by_both.similarity == pytest.approx(1.4 / 2**0.5)
    assert by_both.rank == 2  # [0.8, 0.6] is as near as its own, and a tie counts against it
    assert found["text", ("image",)].choices == 1


def test_searches_never_use_what_the_sample_lacks():
    own = {"text": np.array([1.0, 0.0]), "image": np.array([0.6, 0.8])}
    gallery = {name: np.eye(2) for name in ("text", "image", "audio")}
    found = searches(sample(0), own, gallery, np.array(["x", "y"]))
    assert {(s.target, s.given) for s in found} == {("text", ("image",)), ("image", ("text",))}


def test_words_cover_their_pieces_in_any_script():
    tokenizer = train_tokenizer([" ".join(WORDS)], 280)
    caption = "Two, Ёлка star"
    ids = np.array([0, *tokenizer.encode(caption).ids, 2])  # as a front end that closes with a special token gives it
    positions = pieces_of(ids, special_ids(tokenizer))
    assert positions.tolist() == list(range(1, len(ids) - 1))
    words = words_of(tokenizer, caption, positions)
    assert [text for text, _ in words] == ["Two", ",", "Ёлка", "star"]
    places = [place for _, own in words for place in own]
    assert places == positions.tolist()
    fits = positions[: words[1][1][-1]]
    assert [text for text, _ in words_of(tokenizer, caption, fits)] == ["Two", ","]  # the rest was cut off
