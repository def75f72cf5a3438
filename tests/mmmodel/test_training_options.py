"""Options of a step: chunks, checkpointing and compile must not change what is learned, bf16 only a little."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from builders import batch_of, learner, samples

from mmkernels.layout import PackedLayout
from mmmodel import recompute, update
from mmmodel.configs import MatchingConfig, ObjectivesConfig
from mmmodel.flops import StepFlops
from mmmodel.recompute import Recompute

# every objective that shares the encoder: isolated, masked and paired views, hard negatives
OBJECTIVES = ObjectivesConfig(masked_share=1.0, matching=MatchingConfig(weight=0.1, share=1.0))


def step(seed=0, **fields):
    """Loss, gradients and figures of one step under a configuration."""
    config, learned = learner(seed)
    config = dataclasses.replace(config, objectives=OBJECTIVES, **fields)
    learned.config = config
    update.prepare_modules(learned, config)
    optimizer = update.make_optimizer(learned, config)
    batch = batch_of(learned, *samples())
    prepared = learned.prepare(batch, np.random.default_rng(0))
    figures, made = update.train_step(learned, optimizer, batch, prepared, config)
    assert made
    gradients = {name: p.grad.clone() for name, p in learned.named_parameters() if p.grad is not None}
    return figures, gradients


@pytest.fixture(scope="module")
def plain():
    return step()


def assert_same_step(one, two, tolerance):
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        scale = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(two[1][name], gradient, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("tokens", [1, 20, 1000])  # a chunk per sample, several samples to a chunk, one chunk
def test_loss_and_gradients_of_chunks_are_the_whole_batchs(plain, tokens):
    """Contrastive and hard-negative losses too, which look across the batch.  fp32: sums in another order."""
    assert_same_step(plain, step(chunk_tokens=tokens), 1e-5)


def test_checkpointing_changes_nothing(plain):
    assert_same_step(plain, step(checkpointing=True), 1e-6)


def test_recomputed_work_is_not_counted(plain):
    assert step(checkpointing=True)[0]["tflop"] == pytest.approx(plain[0]["tflop"], rel=1e-12)


class Held:
    """Bytes that autograd keeps from forward to backward."""

    def __enter__(self):
        self.bytes = 0

        def pack(tensor):
            self.bytes += tensor.nbytes
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("option", [Recompute(chunk_tokens=16), Recompute(blocks=True)])
def test_what_is_held_for_backward_shrinks(option):
    _, learned = learner()
    batch = batch_of(learned, *samples())
    streams = [stream.detach() if stream.is_floating_point() else stream for stream in learned.model.streams(batch)]
    with Held() as everything:
        learned.model.encode(streams, batch.layout)
    learned.model.recompute = option
    with Held() as less:
        learned.model.encode(streams, batch.layout)
    assert less.bytes < 0.5 * everything.bytes


def test_chunks_are_whole_samples_and_keep_empty_ones():
    layout = PackedLayout.from_counts([[3, 4], [0, 0], [2, 0], [9, 9], [1, 1]], special_tokens=(None, 7))
    cut = list(recompute._cut(layout, 10))
    # special tokens count: 8, 0, 2 | 19, more than fits | 3
    assert [(rows.start, rows.stop) for rows, _ in cut] == [(0, 10), (10, 29), (29, 32)]
    assert [part.num_samples for _, part in cut] == [3, 1, 1]
    assert torch.cat([part.modality_ids for _, part in cut]).equal(layout.modality_ids)


def test_compiled_parts_give_the_same_step(plain, monkeypatch):
    """Dynamo's capture, without the minutes that its code generator takes; the whole is in the extended set."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled(f, dynamic=dynamic, backend="aot_eager"))
    assert_same_step(plain, step(compile=True), 1e-5)


@pytest.mark.extended
def test_compiled_code_gives_the_same_step(plain):
    assert_same_step(plain, step(compile=True), 1e-5)


def test_bf16_is_near_and_keeps_weights_in_fp32(plain):
    figures, gradients = step(precision="bf16")
    # 8 bits of a number are kept; the contrastive scores, up to 100, are products of points rounded so
    assert figures["loss"] == pytest.approx(plain[0]["loss"], rel=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    flat = [torch.cat([g[name].flatten() for name in plain[1]]) for g in (plain[1], gradients)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98


def test_clipping_bounds_the_step():
    _, free = step(clip_norm=0.0)
    figures, clipped = step(clip_norm=0.01)
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-5)  # reported as it was
    assert math.sqrt(sum(float(g.square().sum()) for g in clipped.values())) == pytest.approx(0.01, rel=1e-3)


def test_flops_agree_with_torchs_counter_where_both_count():
    """torch's counter sees every product, so also the last maps of objectives, which are small here and left out."""
    from torch.utils.flop_counter import FlopCounterMode

    _, learned = learner()
    batch = batch_of(learned, *samples())
    prepared = learned.prepare(batch, np.random.default_rng(0))
    with FlopCounterMode(display=False) as counter, StepFlops(learned) as ours:
        loss, _ = learned(batch, prepared)
        loss.backward()
    assert 0.75 * counter.get_total_flops() < ours.total <= 1.001 * counter.get_total_flops()
    assert not any(block._forward_pre_hooks for block in learned.model.blocks)  # nothing is left behind
