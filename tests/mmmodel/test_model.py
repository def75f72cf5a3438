"""The whole model: packing changes nothing for a sample, isolation makes unimodal views, and no step pads."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from builders import PRESENT, batch_of, learner, samples
from torch.profiler import profile

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.testing import assert_error_rule
from mmmodel import configs
from mmmodel.features import Features, Item
from mmmodel.model import segments_apart


def encode(model, batch, mask):
    with torch.no_grad():
        return model.encode(model.streams(batch), batch.layout, mask)


def views(model):
    text_sees_all = AttentionMask(visible=[[1, 1, 1], [0, 1, 0], [0, 0, 1]])
    return {"joint": None, "isolated": model.isolated(), "text sees all": text_sees_all}


@pytest.mark.parametrize("view", ["joint", "isolated", "text sees all"])
def test_bit_equal_when_only_neighbours_values_change(view):
    _, learned = learner()
    items, features = samples()
    model = learned.model
    mask = views(model)[view]
    batch = batch_of(learned, items, features)
    before, bounds = encode(model, batch, mask), batch.layout.cu_seqlens.tolist()
    for keep, item in enumerate(items):
        flat = {name: values.copy() for name, values in features.flat.items()}
        for name, values in flat.items():
            own = Features(features.flat, features.shapes).get(name, item.rows[name]) if name in item.rows else None
            values[...] = {"text": 9, "image": 200, "audio": np.nan}[name]
            if own is not None:
                Features(flat, features.shapes).get(name, item.rows[name])[...] = own
        after = encode(model, batch_of(learned, items, Features(flat, features.shapes)), mask)
        assert torch.equal(before[bounds[keep] : bounds[keep + 1]], after[bounds[keep] : bounds[keep + 1]]), keep


@pytest.mark.parametrize("view", ["joint", "isolated", "text sees all"])
def test_within_the_error_rule_when_the_batch_changes(view):
    _, learned = learner()
    items, features = samples()
    mask = views(learned.model)[view]
    exact = copy.deepcopy(learned.model).double()
    for module in exact.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    batch = batch_of(learned, items, features)
    together, bounds = encode(learned.model, batch, mask), batch.layout.cu_seqlens.tolist()
    packed, exact_alone, learned_alone = [], [], []
    for i, item in enumerate(items):
        alone = batch_of(learned, [item], features)
        packed.append(together[bounds[i] : bounds[i + 1]])
        exact_alone.append(encode(exact, alone, mask))
        learned_alone.append(encode(learned.model, alone, mask))
    # All samples under one rule: of a few dozen tokens the largest error is chance.
    assert_error_rule("samples", torch.cat(packed), torch.cat(exact_alone), torch.cat(learned_alone))


def long_samples():
    """Segments of 1 to 150 tokens, so that they begin anywhere within a tile and end beyond several."""
    rng = np.random.default_rng(0)
    arrays = {"text": [rng.integers(4, 260, size=n).astype(np.int32) for n in (150, 3, 65, 64)]}
    arrays["image"] = [rng.integers(0, 256, (3, 16 * r, 16 * c), dtype=np.uint8) for r, c in ((9, 11), (1, 1), (7, 13))]
    arrays["audio"] = [rng.normal(size=(frames, 8)).astype(np.float16) for frames in (600, 5, 257, 256)]
    rows = [{"text": 0, "image": 0, "audio": 0}, {"image": 1, "audio": 1}, {"text": 1, "image": 2, "audio": 2}]
    rows += [{"text": 2}, {"text": 3, "audio": 3}]
    items = [Item(f"k{i}", f"g{i}", "", f"c{i}", "train", row) for i, row in enumerate(rows)]
    return items, Features.of(arrays)


@pytest.mark.skipif("not __import__('mmkernels').dispatch.cpp_missing() is None", reason="needs mmkernels._C")
def test_isolated_view_is_bit_equal_to_each_modality_alone(one_thread):
    """All samples with one modality taken out and run with no mask at all: the same bits as in the isolated pass."""
    model = configs.tiny().model
    sizes = {
        "text": dataclasses.replace(model.text, max_tokens=160),
        "image": dataclasses.replace(model.image, max_tokens=128),
        "audio": dataclasses.replace(model.audio, max_seconds=8.0),
    }
    _, learned = learner(width=48, heads=3, **sizes)
    items, features = long_samples()
    batch = batch_of(learned, items, features)
    isolated = encode(learned.model, batch, learned.model.isolated())
    for m, name in enumerate(learned.model.front_ends):
        own = [dataclasses.replace(item, rows={name: item.rows[name]}) for item in items if name in item.rows]
        alone = encode(learned.model, batch_of(learned, own, features), None)
        assert torch.equal(isolated[batch.layout.modality_ids == m], alone), name


def test_two_segments_of_a_modality_still_see_each_other():
    """Isolation is between modalities, not segments: text before and after a picture is one text."""
    _, learned = learner()
    segments = [[(0, 3), (1, (1, 2)), (0, 2)], [(0, 4), (1, (2, 1))]]
    layout = PackedLayout.from_segments(segments, num_modalities=3, special_tokens=learned.model.special_tokens)
    assert segments_apart(layout) is None
    torch.manual_seed(0)
    streams = [torch.randint(4, 260, (9,)), torch.randn(4, 16), torch.randn(0, 16)]
    with torch.no_grad():
        before = learned.model.encode(streams, layout, learned.model.isolated())
        streams[0][4] += 1  # of the second segment of text
        after = learned.model.encode(streams, layout, learned.model.isolated())
    changed = (before != after).any(dim=1)
    text = (layout.modality_ids == 0) & (torch.arange(layout.total_tokens) < layout.cu_seqlens[1])
    assert torch.equal(changed, text)


def test_isolated_view_equals_each_modality_fed_alone():
    """Three unimodal encoders in one pass: the token before each segment belongs to it."""
    _, learned = learner()
    items, features = samples()
    model = learned.model
    batch = batch_of(learned, items, features)
    joint = encode(model, batch, model.isolated())
    bounds = batch.layout.segment_cu_seqlens.tolist()
    segment = 0
    for item, names in zip(items, PRESENT, strict=True):
        for name in names:
            single = batch_of(learned, [dataclasses.replace(item, rows={name: item.rows[name]})], features)
            alone = encode(model, single, None)
            torch.testing.assert_close(joint[bounds[segment] : bounds[segment + 1]], alone, atol=1e-5, rtol=1e-5)
            segment += 1


def test_joint_view_lets_modalities_see_one_another():
    _, learned = learner()
    items, features = samples()
    batch = batch_of(learned, items, features)
    text = batch.layout.modality_ids[: batch.layout.cu_seqlens[1]] == 0
    with_all = encode(learned.model, batch, None)[: len(text)][text]
    without = encode(learned.model, batch, learned.model.isolated())[: len(text)][text]
    assert (with_all - without).abs().max() > 1e-3


def _ours(profiled):
    """Our operators in a profile; an eager call that needs nothing of the dispatcher goes straight to mm_cpp."""
    keys = [event.key.split("::") for event in profiled.key_averages()]
    return {parts[1] for parts in keys if parts[0] in ("mm", "mm_cpp") and len(parts) == 2}


@pytest.mark.skipif("not __import__('mmkernels').dispatch.cpp_missing() is None", reason="needs mmkernels._C")
def test_a_step_runs_through_our_operators_and_pads_nothing():
    """The profile of a step: the four operators, and between the streams and the first block only the embedding."""
    _, learned = learner()
    items, features = samples()
    batch = batch_of(learned, items, features)
    prepared = learned.prepare(batch, np.random.default_rng(0))
    with profile() as whole:
        loss, _ = learned(batch, prepared)
        loss.backward()
    for operator in ("modality_embed", "attention", "gather_rows", "segment_mean"):
        assert any(name.startswith(operator) for name in _ours(whole)), operator
    names = {event.key for event in whole.key_averages()}
    assert not [name for name in names if name.startswith(("aten::pad", "aten::constant_pad", "aten::_pad"))]

    streams = [stream.detach() for stream in learned.model.streams(batch)]
    with profile() as entry:
        x = learned.model.embedding(streams, batch.layout)
        learned.model.blocks[0].qkv(learned.model.blocks[0].norm_attention(x))
    names = {event.key for event in entry.key_averages()}
    assert any(name.startswith("modality_embed") for name in _ours(entry))
    assert not [name for name in names if name.split("::")[-1] in ("cat", "stack", "pad", "constant_pad_nd")]


@pytest.mark.skipif("not __import__('mmkernels').dispatch.cpp_missing() is None", reason="needs mmkernels._C")
def test_the_embedding_operator_calls_no_torch_norm():
    """One pass: where the C++ path runs, the norm is inside it (the eager path is made of torch's own operators)."""
    _, learned = learner()
    items, features = samples()
    batch = batch_of(learned, items, features)
    streams = [stream.detach() for stream in learned.model.streams(batch)]
    with profile() as entry, torch.no_grad():
        learned.model.embedding(streams, batch.layout)
    assert not [e.key for e in entry.key_averages() if "layer_norm" in e.key or "index_select" in e.key]


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="width is 16, expected a multiple of heads, 3"):
        learner(heads=3)
