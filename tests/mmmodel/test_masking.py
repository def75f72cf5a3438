"""What masking objectives hide cannot be read by any path, and what they ask for is what stood there."""

import numpy as np
import pytest
import torch
from builders import batch_of, objective_learner, samples

from mmkernels import AttentionMask
from mmmodel.features import Features
from mmmodel.objectives import weight_at
from mmmodel.objectives.hiding import draw_hidden

MASKING = tuple(f"objectives.masked_{name}.weight=1" for name in ("text", "image", "audio"))


def prepared_with(learned, items, features):
    batch = batch_of(learned, items, features)
    return batch, learned.prepare(batch, np.random.default_rng(3))


def masked_view(learned, batch, prepared):
    """States of the masked batch and the loss inputs: the rows that the heads read."""
    seen = {}
    views = {}

    def spy(module, args, output):
        views[module.hides] = args[0]

    hooks = [o.register_forward_hook(spy) for o in learned.objectives.values() if hasattr(o, "hides")]
    with torch.no_grad():
        learned(batch, prepared)
    for hook in hooks:
        hook.remove()
    packed = next(iter(views.values())).masked
    for name, rows in prepared.masked.packed_rows.items():
        seen[name] = packed[rows]
    return packed, seen


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_hidden_content_cannot_be_read_by_any_path(name):
    """Whatever is hidden in one modality may change: every state of the joint view stays bit-equal.

    Text tokens that BERT's recipe leaves in place are readable by design and stay as they are here.
    """
    _, learned = objective_learner(*MASKING, "objectives.contrastive.weight=0", "objectives.matching.weight=0")
    items, features = samples()
    batch, prepared = prepared_with(learned, items, features)
    before, heads = masked_view(learned, batch, prepared)
    front_end = learned.model.front_ends[name]
    rows = prepared.masked.stream_rows[name].numpy()
    assert len(rows) >= 3
    if name == "text":
        rows = rows[prepared.masked.inputs["text"][0].numpy()[rows] != batch.inputs["text"][0].numpy()[rows]]

    changed = Features({n: flat.copy() for n, flat in features.flat.items()}, features.shapes)
    rng, start, altered = np.random.default_rng(9), 0, 0
    for i in range(len(features.shapes[name])):
        feature = changed.get(name, i)
        count = int(np.prod(front_end.shape(feature)))
        places = rows[(rows >= start) & (rows < start + count)] - start
        if name == "text":
            feature[places] = 4 + (feature[places] + 17) % 250
        else:  # noise everywhere, then everything but the hidden cells is put back
            original = feature.copy()
            feature[...] = rng.integers(0, 256, feature.shape) if name == "image" else rng.normal(size=feature.shape)
            noise = feature.copy()
            erased = front_end.hide(np.full_like(feature, 1), places) != 1
            feature[...] = np.where(erased, noise, original)
        altered += len(places)
        start += count
    assert altered == len(rows)
    again, prepared_again = prepared_with(learned, items, changed)
    assert not torch.equal(prepared_again.masked.targets[name], prepared.masked.targets[name])
    after, heads_after = masked_view(learned, again, prepared_again)
    assert torch.equal(before, after)
    assert all(torch.equal(heads[n], heads_after[n]) for n in heads)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_what_is_not_hidden_can_be_read(name):
    """The check above can fail: a change anywhere else shows, also in what stands for hidden words."""
    _, learned = objective_learner(*MASKING)
    items, features = samples()
    batch, prepared = prepared_with(learned, items, features)
    before, heads = masked_view(learned, batch, prepared)
    flat = {n: values.copy() for n, values in features.flat.items()}
    flat[name][...] = (flat[name] + 1).astype(flat[name].dtype)
    after, heads_after = masked_view(learned, *prepared_with(learned, items, Features(flat, features.shapes)))
    assert not torch.equal(before, after)
    assert not torch.equal(heads["text"], heads_after["text"])  # the view is joint


@pytest.mark.parametrize("name", ["image", "audio"])
def test_targets_are_the_content_of_the_hidden_cells(name):
    """Cell by cell from the raw features, by another route than the front end's."""
    _, learned = objective_learner(*MASKING)
    items, features = samples()
    _, prepared = prepared_with(learned, items, features)
    rows, targets = prepared.masked.stream_rows[name].tolist(), prepared.masked.targets[name].numpy()
    expected = []
    for i in range(len(features.shapes[name])):
        feature = features.get(name, i).astype(np.float64)
        if name == "audio":
            cells = [feature[t : t + 4].ravel() if t + 4 <= len(feature) else None for t in range(0, len(feature), 4)]
        else:
            _, h, w = feature.shape
            cells = [
                np.array([feature[c, y + 4 * p : y + 4 * p + 4, x + 4 * q : x + 4 * q + 4].mean()
                          for p in range(4) for q in range(4) for c in range(3)]).reshape(16, 3).T.ravel()
                for y in range(0, h, 16) for x in range(0, w, 16)
            ]  # fmt: skip
            cells = [(cell - 127.5) / 64 for cell in cells]
        expected += cells
    np.testing.assert_allclose(targets, np.stack([expected[row] for row in rows]), atol=1e-5)


def test_masked_features_loss_and_gradients_against_the_plain_definition():
    _, learned = objective_learner(*MASKING)
    objective = learned.objectives["masked_image"].double()
    torch.manual_seed(0)
    hidden = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(5, 48, dtype=torch.float64)
    loss, _ = objective.loss(hidden, targets)
    plain = 0
    for row, target in zip(hidden, targets, strict=True):
        for weight, bias, value in zip(objective.head.weight, objective.head.bias, target, strict=True):
            plain = plain + (weight @ row + bias - value).abs() / targets.numel()
    torch.testing.assert_close(loss, plain)
    leaves = [hidden, *objective.head.parameters()]
    for ours, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, expected)


def test_one_packed_pass_serves_all_masking_objectives_and_all_unimodal_views():
    _, learned = objective_learner(*MASKING, "objectives.matching.weight=1")
    items, features = samples()
    batch, prepared = prepared_with(learned, items, features)
    calls = []
    through_blocks = learned.model.through_blocks
    learned.model.through_blocks = lambda *args: calls.append(args) or through_blocks(*args)
    loss, figures = learned(batch, prepared)
    loss.backward()
    assert len(calls) == 2  # both views, and the pairs, whose negatives need the first
    rows = batch.layout.total_tokens, prepared.masked.layout.total_tokens
    assert len(calls[0][0]) == sum(rows)
    assert {name.split("/")[0] for name in figures} == set(learned.objectives)
    missing = [name for name, p in learned.named_parameters() if p.grad is None]
    assert not missing


def test_views_in_one_pass_are_those_of_passes_of_their_own():
    """The samples of several batches, each seen in its own way; also where one has to go by itself."""
    _, learned = objective_learner(*MASKING)
    model = learned.model
    batch = batch_of(learned, *samples())
    streams, layout = model.streams(batch), batch.layout
    text_sees_all = AttentionMask(visible=[[1, 1, 1], [0, 1, 0], [0, 0, 1]])
    for masks in ((model.isolated(), None), (None,), (None, text_sees_all)):
        views = [(streams, layout, mask) for mask in masks]
        for found, view in zip(model.encode_views(views), views, strict=True):
            torch.testing.assert_close(found, model.encode(*view), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("n", "probability", "span"), [(1, 0.3, 1), (2, 0.9, 3), (40, 0.3, 1), (40, 0.3, 4), (0, 0.5, 2)]
)
def test_hidden_places_are_as_many_as_asked(n, probability, span):
    for seed in range(50):
        places = draw_hidden(n, probability, span, np.random.default_rng(seed))
        assert len(places) == (0 if n == 0 else max(1, round(n * probability)))
        assert (np.diff(places) > 0).all()
        assert ((places >= 0) & (places < n)).all()


def test_spans_are_runs():
    """Runs of mean length 4 against single tokens: far fewer beginnings for as many hidden."""
    rng = np.random.default_rng(0)
    beginnings = {
        span: np.mean([(np.diff(draw_hidden(100, 0.3, span, rng)) > 1).sum() + 1 for _ in range(300)])
        for span in (1, 4)
    }
    assert beginnings[1] == pytest.approx(
        30 * 0.7 + 0.3, rel=0.05
    )  # a token begins a run unless the one before is hidden
    assert beginnings[4] < 0.5 * beginnings[1]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ((), [2, 2, 2, 2, 2, 2, 2, 2]),
        (("begin=0.5",), [0, 0, 0, 0, 2, 2, 2, 2]),
        (("ramp=0.5",), [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        (("begin=0.25", "ramp=0.25"), [0, 0, 1, 2, 2, 2, 2, 2]),
        (("every=3",), [2, 0, 0, 2, 0, 0, 2, 0]),
    ],
)
def test_schedules(assignments, expected):
    config, learned = objective_learner(
        "objectives.masked_text.weight=2", *(f"objectives.masked_text.{a}" for a in assignments)
    )
    assert [weight_at(config.objectives.masked_text, step, 8) for step in range(8)] == expected
    items, features = samples()
    batch = batch_of(learned, items, features)
    for step in range(8):
        prepared = learned.prepare(batch, np.random.default_rng(0), step)
        assert prepared.weights.get("masked_text", 0) == expected[step]
        assert (prepared.masked is None) == (expected[step] == 0)


def test_total_is_the_weighted_sum():
    _, learned = objective_learner(*MASKING, "objectives.masked_audio.weight=0.25", "objectives.matching.weight=3")
    items, features = samples()
    batch, prepared = prepared_with(learned, items, features)
    total, figures = learned(batch, prepared)
    weights = {"contrastive": 1, "masked_text": 1, "masked_image": 1, "masked_audio": 0.25, "matching": 3}
    expected = sum(weight * figures[f"{name}/loss"] for name, weight in weights.items())
    torch.testing.assert_close(total.detach(), expected)
