"""Which samples make a batch, and how they are packed."""

import numpy as np
import pytest
import torch
from builders import batch_of, learner, samples

from mmmodel.batches import Sampler, collate
from mmmodel.configs import ConfigError
from mmmodel.features import Item


def corpus(images=10, languages=("es", "fr", "ru")):
    """Every image in every language, but the first has only the last language."""
    return [
        Item(f"{image}/{language}", f"image{image}", language, f"c{image}", "train", {"text": 0})
        for image in range(images)
        for language in languages
        if image or language == languages[-1]
    ]


def test_a_batch_has_distinct_images_in_one_language_where_it_can():
    items = corpus()
    sampler = Sampler(items, batch_size=4, seed=0)
    seen = set()
    for step in range(30):
        batch = [items[i] for i in sampler.batch(step)]
        assert len({item.group for item in batch}) == 4
        languages = [item.language for item in batch if item.group != "image0"]
        assert len(set(languages)) == 1
        seen.add(languages[0])
    assert seen == {"es", "fr", "ru"}


def test_an_epoch_visits_every_image_at_most_once_and_epochs_differ():
    items = corpus()
    sampler = Sampler(items, batch_size=5, seed=0)
    epochs = [[items[i].group for step in (2 * e, 2 * e + 1) for i in sampler.batch(step)] for e in range(2)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step():
    items = corpus()
    one, two, other = (Sampler(items, batch_size=4, seed=seed) for seed in (3, 3, 4))
    assert [one.batch(s) for s in range(6)] == [two.batch(s) for s in reversed(range(6))][::-1]
    assert [one.batch(s) for s in range(6)] != [other.batch(s) for s in range(6)]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 11, expected at most the 10"):
        Sampler(corpus(), batch_size=11, seed=0)


def test_collate_leaves_missing_modalities_out():
    _, learned = learner()
    items, features = samples()
    batch = batch_of(learned, items, features)
    assert [[m for m, _ in parts] for parts in batch.segments] == [[0, 1, 2], [1], [0, 2], [0], [0, 1, 2], [2]]
    assert batch.layout.num_segments == len(batch.modality) == len(batch.concept) == 11
    assert batch.modality.tolist() == batch.layout.segments[:, 1].tolist()
    streams = learned.model.streams(batch)
    assert tuple(len(stream) for stream in streams) == batch.layout.stream_lengths
    # concepts c0 to c3, and samples 4 and 5 repeat the first two; a number stands for one concept, in any batch
    number = dict(zip((item.concept for item in items), batch.concept[[0, 3, 4, 6, 7, 10]].tolist(), strict=True))
    assert len(set(number.values())) == len(number) == 4
    c0, c1, c2, c3 = (number[f"c{i}"] for i in range(4))
    assert batch.concept.tolist() == [c0, c0, c0, c1, c2, c2, c3, c0, c0, c0, c1]
    assert batch_of(learned, items[1:2], features).concept.tolist() == [c1]


def test_augmentation_follows_its_generator():
    _, learned = learner()
    items, features = samples()
    front_ends, special = learned.model.front_ends, learned.model.special_tokens
    one, two, other = (collate(items, features, front_ends, special, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one.inputs["audio"], two.inputs["audio"], strict=True))
    assert one.inputs["audio"][0].shape != other.inputs["audio"][0].shape


def test_a_batch_is_shown_in_a_line_and_read_by_calling_the_model():
    _, learned = learner()
    batch = batch_of(learned, *samples())
    assert "samples" in repr(batch)
    assert len(repr(batch)) < 200
    model = learned.model.eval()
    assert (model(batch.to("cpu")) == model.encode(model.streams(batch), batch.layout)).all()


def test_a_batch_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    """From other memory the host may wait for the GPU.  Without one a copy is what is pinned, and nothing moves."""
    batch, pinned, sent = batch_of(learner()[1], *samples()), [], []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: any(self is t for t in pinned))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: sent.append((self, options)) or self)
    moved = batch.to("cuda")
    tensors = [t for ts in batch.inputs.values() for t in ts]
    assert len(sent) == len(pinned) == len(tensors) + 1  # the layout is one buffer
    assert all(t.is_pinned() and options == {"non_blocking": True} for t, options in sent)
    assert all(torch.equal(a, b) for a, b in zip(tensors, (t for ts in moved.inputs.values() for t in ts), strict=True))
