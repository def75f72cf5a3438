"""The whole model: packing changes nothing for a sample, isolation makes unimodal views, and no step pads."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from builders import PRESENT, batch_of, learner, samples
from torch.profiler import profile

from mmkernels.masks import AttentionMask
from mmkernels.testing import assert_error_rule
from mmmodel.features import Features


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
