"""What a step gives its objectives: their options, the states and labels of their loss, and where gradients go."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import batch_of, objective_learner, samples

from mmkernels.ops.packing.api import segment_mean
from mmmodel import distributed, objectives
from mmmodel.configs import ConfigError
from mmmodel.features import Item
from mmmodel.frontends.text import special_ids
from mmmodel.objectives import masked_features, masked_text, matching
from mmmodel.objectives.hiding import draw_hidden

WEIGHTS = {name: f"objectives.{name}.weight=0" for name in ("contrastive", "masked_text", "matching")}


def alone(name, *more):
    """A learner of one objective, and its batch."""
    others = [off for other, off in WEIGHTS.items() if other != name]
    _, learned = objective_learner(*others, f"objectives.{name}.weight=1", *more)
    batch = batch_of(learned, *samples())
    return learned, batch, learned.prepare(batch, np.random.default_rng(3))


def views_of(learned, name, batch, prepared):
    """The views that the objective read, and its figures."""
    seen = []
    hook = learned.objectives[name].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    with torch.no_grad():
        _, figures = learned(batch, prepared)
    hook.remove()
    return seen[0], figures


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_a_masked_loss_is_that_of_the_hidden_rows(name):
    learned, batch, prepared = alone(f"masked_{name}")
    views, figures = views_of(learned, f"masked_{name}", batch, prepared)
    masked, objective = prepared.masked, learned.objectives[f"masked_{name}"]
    layout, rows = masked.layout, masked.packed_rows[name]
    assert layout.special_tokens == batch.layout.special_tokens
    assert torch.equal(layout.source_rows[rows].long(), masked.stream_rows[name])
    assert (layout.modality_ids[rows] == list(learned.model.front_ends).index(name)).all()
    assert not torch.equal(rows, masked.stream_rows[name])
    table = (learned.model.token_table,) if name == "text" else ()
    loss, _ = objective.loss(views.masked[rows], masked.targets[name], *table)
    assert figures[f"masked_{name}/loss"] == loss


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_share_and_span_of_what_is_hidden_are_the_configs(name, monkeypatch):
    asked = []
    module = masked_text if name == "text" else masked_features
    monkeypatch.setattr(module, "draw_hidden", lambda *a: asked.append(a[1:3]) or draw_hidden(*a))
    field = f"objectives.masked_{name}"
    alone(f"masked_{name}", f"{field}.probability=0.7", f"{field}.span=5")
    assert set(asked) == {(0.7, 5)}


@pytest.mark.parametrize("name", ["image", "audio"])
def test_samples_without_what_is_masked_cost_nothing(name):
    _, learned = objective_learner(*WEIGHTS.values(), f"objectives.masked_{name}.weight=1")
    batch = batch_of(learned, *samples(present=(("text",), ("text",))))
    loss, _ = learned(batch, learned.prepare(batch, np.random.default_rng(0)))
    loss.backward()
    assert loss.item() == 0


def test_a_segment_of_one_cell_keeps_it():
    """Nothing stands around it to be read from."""
    learned, _, _ = alone("masked_image")
    images = [np.full((3, 16 * rows, 16), 7, np.uint8) for rows in (1, 2, 1)]
    hidden = learned.objectives["masked_image"].hide(
        images, learned.model.front_ends["image"], np.random.default_rng(0)
    )
    assert [np.array_equal(*pair) for pair in zip(images, hidden.features, strict=True)] == [True, False, True]
    assert set(hidden.rows) <= {1, 2}
    assert len(hidden.rows) == len(hidden.targets) == 1


def test_hidden_words_are_the_tokenizers_mask_and_its_special_tokens_stay():
    learned, _, _ = alone("masked_text", "objectives.masked_text.probability=1")
    tokenizer, objective = learned.model.tokenizer, learned.objectives["masked_text"]
    special = special_ids(tokenizer)
    caption = np.concatenate([special, np.arange(len(special), 200)]).astype(np.int32)
    hidden = objective.hide([caption, caption[:9]], learned.model.front_ends["text"], np.random.default_rng(0))
    assert [len(ids) for ids in hidden.features] == [len(caption), 9]
    assert np.array_equal(hidden.features[0][: len(special)], special)
    assert np.array_equal(hidden.rows[: 200 - len(special)], np.arange(len(special), 200))
    masked = hidden.features[0][len(special) :] == tokenizer.token_to_id("[MASK]")
    assert 0.7 < masked.mean() < 0.9


def test_figures_of_the_masked_losses():
    learned, _, _ = alone("masked_text", "objectives.masked_image.weight=1")
    words, cells = (learned.objectives[name] for name in ("masked_text", "masked_image"))
    with torch.no_grad():
        words.bias[5] = 1e4
    _, figures = words.loss(torch.randn(4, 16), torch.tensor([5, 5, 6, 5]), torch.randn(280, 16))
    assert figures["accuracy"] == 0.75
    targets = torch.randn(5, 48) + 3 * torch.randn(48)
    loss, figures = cells.loss(torch.randn(5, 16), targets)
    constants = targets.sort(dim=0).values[2]  # the middle one of each number has the least mean distance
    torch.testing.assert_close(figures["of_mean"], loss / (targets - constants).abs().mean())


@pytest.mark.parametrize("name", ["contrastive", "masked_text", "masked_image", "masked_audio", "matching"])
def test_each_objective_alone_teaches_the_encoder_and_its_front_ends(name):
    learned, batch, prepared = alone(name)
    loss, _ = learned(batch, prepared)
    loss.backward()
    model = learned.model
    read = ("text",) if name == "masked_text" else model.front_ends
    for part in (learned.objectives[name], model.blocks, *(model.front_ends[m] for m in read)):
        assert all(p.grad is not None for p in part.parameters())
        assert any(p.grad.abs().max() > 0 for p in part.parameters()) or not list(part.parameters())
    if name == "masked_text":  # the token table is its output layer too, so that words of no caption learn
        assert (model.token_table.grad.abs().amax(1) > 0).all()


def test_negatives_are_drawn_by_the_scaled_scores_at_the_configs_hardness(monkeypatch):
    learned, batch, prepared = alone("matching", WEIGHTS["contrastive"][:-1] + "1", "objectives.matching.hardness=0.4")
    asked = []
    draw = matching.draw_pairs
    monkeypatch.setattr(matching, "draw_pairs", lambda *a: asked.append(a) or draw(*a))
    views, _ = views_of(learned, "matching", batch, prepared)
    expected = views.points @ views.points.t() / 0.07
    for (_, scores, hardness), anchors in zip(asked, prepared.inputs["matching"], strict=True):
        np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4)
        assert hardness == 0.4
        assert len(anchors.first)


def test_the_least_share_that_is_masked_is_one_sample():
    _, _, prepared = alone("masked_text", "objectives.masked_share=0.01")
    assert prepared.masked.layout.num_samples == 1


@pytest.mark.parametrize(("share", "most"), [(0.01, 1), (0.5, 3)])  # of six samples
def test_the_true_pairs_are_a_share_of_the_batch(share, most):
    _, _, prepared = alone("matching", f"objectives.matching.share={share}")
    _, _, every = alone("matching", "objectives.matching.share=1")
    for some, all_of in zip(prepared.inputs["matching"], every.inputs["matching"], strict=True):
        assert some.first.tolist() == all_of.first[:most].tolist()
        assert some.second.tolist() == all_of.second[:most].tolist()
    assert len(every.inputs["matching"][0].first) == 2
    assert len(every.inputs["matching"][1].first) == 3


def test_the_matching_loss_is_that_of_each_pair_read_jointly():
    learned, batch, prepared = alone("matching")
    objective, model = learned.objectives["matching"], learned.model
    _, figures = views_of(learned, "matching", batch, prepared)
    pairs = np.concatenate([matching.draw_pairs(anchors, None) for anchors in prepared.inputs["matching"]])
    assert set(pairs[:, 2]) == {0, 1}
    costs = []
    with torch.no_grad():
        for first, second, label in pairs.tolist():
            streams, layout = matching.pair_streams(model.streams(batch), batch, np.array([(first, second)]))
            assert layout.special_tokens == batch.layout.special_tokens
            means = segment_mean(model.encode(streams, layout), layout)
            costs.append(objective.loss(means[:1], means[1:], torch.tensor([float(label)]))[0])
    torch.testing.assert_close(figures["matching/loss"], torch.stack(costs).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["contrastive", "meaning"])
def test_scores_are_fp32_and_of_all_ranks(name, monkeypatch):
    """Under autocast too: a score of 100 has three digits in bf16.  Here the other rank has the same, backwards."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "gathered", lambda *ts: tuple(torch.cat([t, t.flip(0)]) for t in ts))
    meaning = ("objectives.meaning.weight=1", "objectives.meaning.width=6")
    _, learned = objective_learner(*(meaning if name == "meaning" else ()))
    batch, objective = batch_of(learned, *samples()), learned.objectives[name]
    torch.manual_seed(0)
    scale = (torch.tensor(20.0),) if name == "meaning" else ()
    if name == "meaning":
        objective.teach(batch.concept.unique(), torch.randn(len(batch.concept.unique()), 6))
    points = torch.nn.functional.normalize(torch.randn(len(batch.concept), learned.config.model.embed_width), dim=1)
    views = SimpleNamespace(batch=batch, points=points, scale=scale and scale[0], isolated=None)
    if name == "contrastive":
        objective.points = lambda *_: points
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = objective(views, None)
    everyone = distributed.gathered(points, batch.modality, batch.concept)
    assert torch.equal(found, objective.loss(*everyone, *scale)[0])


def test_runs_have_the_mean_length_of_the_span_and_lie_anywhere():
    """So few of so many tokens that runs hardly meet."""
    rng = np.random.default_rng(0)
    places = [draw_hidden(100_000, 0.01, 4, rng) for _ in range(10)]
    assert all(len(p) == 1000 for p in places)
    runs = np.mean([(np.diff(p) > 1).sum() + 1 for p in places])
    assert 1000 / runs == pytest.approx(4, rel=0.1)
    assert np.mean(places) == pytest.approx(50_000, rel=0.05)


def test_the_points_of_meaning_are_scaled_as_those_of_contrastive():
    _, learned = objective_learner("objectives.meaning.weight=1", "objectives.meaning.width=6")
    batch, objective = batch_of(learned, *samples()), learned.objectives["meaning"]
    concepts = batch.concept.unique()
    objective.teach(concepts, torch.randn(len(concepts), 6))
    prepared = learned.prepare(batch, np.random.default_rng(0))
    only = dataclasses.replace(prepared, weights={"contrastive": 0.0, "meaning": 1.0})
    loss, _ = learned(batch, only)
    loss.backward()
    assert learned.objectives["contrastive"].log_scale.grad.abs() > 0
    views, figures = views_of(learned, "meaning", batch, only)
    assert views.scale == learned.objectives["contrastive"].scale()
    expected, _ = objective.loss(views.points, batch.modality, batch.concept, views.scale)
    torch.testing.assert_close(figures["meaning/loss"], expected)


def test_objectives_that_cannot_be_built_are_named():
    with pytest.raises(ConfigError, match="objectives: all weights are 0, nothing to learn"):
        objective_learner(*WEIGHTS.values())
    fields = ("model.modalities=text,image", "objectives.matching.pairs=image-text", "objectives.masked_audio.weight=1")
    with pytest.raises(ConfigError, match="masked_audio needs audio, which the model does not read"):
        objective_learner(*fields)


def test_an_objective_that_begins_late_is_not_idle():
    _, learned = objective_learner("objectives.matching.begin=0.9")
    assert objectives.idle(learned.objectives, samples()[0], 10, 4) == {}


def test_alignment_needs_two_modalities_that_a_batch_can_hold():
    """Of a group, the samples of one picture, a batch holds one."""
    contrastive = objective_learner()[1].objectives["contrastive"]

    def item(modalities, group, concept="c"):
        return Item(f"{group}{modalities}", group, "", concept, "train", dict.fromkeys(modalities, 0))

    text, image = ("text",), ("image",)
    for found, items in (
        (True, [item(("text", "image"), "p")]),
        (True, [item(text, "p"), item(image, "q")]),
        (True, [item(text, "p"), item(image, "p"), item(text, "q")]),
        (False, [item(text, "p"), item(image, "p")]),
        (False, [item(text, "p"), item(text, "q")]),
        (False, [item(text, "p", "c"), item(image, "q", "d")]),
    ):
        assert contrastive.finds(items) == found, items


def test_objectives_that_compare_samples_are_idle_on_one_at_a_time():
    _, learned = objective_learner("objectives.meaning.weight=1")
    items, _ = samples()
    assert objectives.idle(learned.objectives, items, 10, 2) == {}
    why = "compares the samples of a batch, and batch_size is 1"
    compared = dict.fromkeys(("contrastive", "meaning", "matching"), why)
    assert objectives.idle(learned.objectives, items, 10, 1) == compared


def test_an_objective_without_its_modality_is_idle():
    _, learned = objective_learner("objectives.masked_audio.weight=1")
    items, _ = samples(present=(("text", "image"), ("text", "image")))
    assert objectives.idle(learned.objectives, items, 10, 4) == {"masked_audio": "needs audio"}
