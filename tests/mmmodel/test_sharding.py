"""A learner split over two processes (FSDP2 on gloo) learns what a whole one does, and its checkpoints are whole."""

import dataclasses
import datetime
import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from builders import assert_same_run, batch_of, learner, samples, weights
from test_distributed import assert_close, run, run_until_stopped
from torch.distributed.tensor import DTensor

from mmmodel import checkpoint, configs, distributed, sharding, train, update
from mmmodel.configs import MaskedConfig, MatchingConfig, ObjectiveConfig, ObjectivesConfig
from mmmodel.pretraining import Pretraining

# Rank 0 has the first two samples: no picture.  No sample has sound: the head of masked_audio has no gradient at all.
PRESENT = (("text",), ("text",), ("text",), ("text", "image"), ("image",), ("text", "image"))
SHARES = slice(0, 2), slice(2, 6)
OBJECTIVES = ObjectivesConfig(
    contrastive=ObjectiveConfig(weight=1.0),
    masked_text=MaskedConfig(weight=0.0),
    masked_audio=MaskedConfig(weight=1.0),
    matching=MatchingConfig(weight=0.0),
)
CPU = torch.device("cpu")


def build():
    config, made = learner()
    config = dataclasses.replace(config, objectives=OBJECTIVES, clip_norm=0.5)
    learned = Pretraining(config, made.model.tokenizer)
    learned.model.front_ends["audio"].requires_grad_(False)  # as a frozen encoder's
    return config, learned


def split():
    config, learned = build()
    sharding.shard(learned, CPU)
    return config, learned, update.make_optimizer(learned, config)


def prepared_batch(learned, which):
    items, features = samples(present=PRESENT)
    batch = batch_of(learned, items[which], features)
    prepared = learned.prepare(batch, np.random.default_rng(0))
    return batch, update.reweighted(prepared, CPU)


def whole(tensors):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for name, t in tensors}


def weights_of(learned):
    return whole(learned.named_parameters())


def gradients_of(learned):
    return whole((name, p.grad) for name, p in learned.named_parameters() if p.grad is not None)


def ranks_step(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(minutes=2)
    )
    config, learned, optimizer = split()
    batch, prepared = prepared_batch(learned, SHARES[rank])
    with distributed.wrapped(learned) as module:
        assert module is learned
        figures, made = update.train_step(module, optimizer, batch, prepared, config)
    held = sum(state["exp_avg"].to_local().numel() for state in optimizer.state.values())
    torch.save((figures, made, gradients_of(learned), weights_of(learned), held), f"{results}.{rank}")
    with mock.patch.object(dist, "broadcast", None):  # it has no buffers: nothing is sent for them
        for _ in range(2):
            update.train_step(learned, optimizer, batch, prepared, config)
    check_ddp_agrees(learned, rank)
    check_one_infinity_stops_both(learned, optimizer, batch, prepared, rank)
    check_checkpoint_reads(store.parent / "checkpoints", learned, optimizer)
    for sharded in (False, True):
        check_buffers_of_a_step_are_rank_0s(rank, sharded)
    dist.destroy_process_group()


def check_ddp_agrees(learned, rank):
    config, other = build()
    optimizer = update.make_optimizer(other, config)
    with distributed.wrapped(other) as module:
        for _ in range(3):
            update.train_step(module, optimizer, *prepared_batch(other, SHARES[rank]), config)
    theirs = weights_of(learned)
    for name, mine in weights_of(other).items():
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, of which AdamW makes steps
            torch.testing.assert_close(mine, theirs[name], rtol=0, atol=1e-5, msg=name)


def check_buffers_of_a_step_are_rank_0s(rank, sharded):
    """Those of a BatchNorm, of two dtypes.  Validation goes past DDP, and reads each rank's own."""
    config, learned = build()
    norm = learned.model.front_ends["image"].norm = torch.nn.BatchNorm1d(3, affine=False)
    if sharded:
        sharding.shard(learned, CPU)
    optimizer = update.make_optimizer(learned, config)
    batch, prepared = prepared_batch(learned, SHARES[rank])
    with distributed.wrapped(learned) as module:
        for step in range(2):
            norm.running_var.fill_(3 + rank)
            norm.num_batches_tracked.fill_(step + 5 * rank)
            update.train_step(module, optimizer, batch, prepared, config)
            assert norm.running_var.tolist() == [3, 3, 3]
            assert norm.num_batches_tracked.item() == step
        norm.running_var.fill_(3 + rank)
        learned.eval()
        with torch.no_grad(), sharding.whole(learned):
            learned(batch, prepared)
        assert norm.running_var.tolist() == [3 + rank] * 3


def check_one_infinity_stops_both(learned, optimizer, batch, prepared, rank):
    before = weights_of(learned)
    wrong = dataclasses.replace(prepared, weights=prepared.weights | ({"contrastive": math.inf} if rank else {}))
    _, made = update.train_step(learned, optimizer, batch, wrong, learned.config)
    assert not made
    assert all(torch.equal(before[name], after) for name, after in weights_of(learned).items())


def check_checkpoint_reads(folder, learned, optimizer):
    """Into a learner of other weights, each rank its part."""
    state = checkpoint.state(learned, optimizer)
    if not distributed.rank():
        checkpoint.write(folder, 3, state, {"step": 3}, keep=1)
    distributed.wait()
    _, other, other_optimizer = split()
    assert checkpoint.load(folder / "step-00000003", other, other_optimizer, {"step": 0}) == {"step": 3}
    expected, found = weights_of(learned), weights_of(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(other_optimizer.state) == len(optimizer.state)
    for one, two in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name].to_local(), two[name].to_local()) for name in ("exp_avg", "exp_avg_sq"))


def test_a_split_learner_takes_the_step_of_a_whole_one(tmp_path, one_thread):
    """Also where a modality is on one rank alone or on none: what no rank's loss reaches stays as it is."""
    config, learned = build()
    start = weights_of(learned)
    optimizer = update.make_optimizer(learned, config)
    figures, _ = update.train_step(learned, optimizer, *prepared_batch(learned, slice(None)), config)
    expected = gradients_of(learned)
    unreached = start.keys() - expected.keys()
    assert "objectives.masked_audio.head.weight" in unreached
    multiprocessing.spawn(ranks_step, (tmp_path / "store", tmp_path / "result"), nprocs=2)
    results = [torch.load(f"{tmp_path}/result.{rank}") for rank in range(2)]
    for theirs, made, gradients, parameters, _ in results:
        assert made
        assert theirs["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-5)
        assert_close(gradients, expected)
        assert all(torch.equal(parameters[name], start[name]) for name in unreached)
    held = [numbers for *_, numbers in results]
    assert sum(held) == sum(gradient.numel() for gradient in expected.values())
    assert max(held) < 0.6 * sum(held)


def test_torchrun_splits_and_resumes_to_the_same_bits(shards, tmp_path, caplog):
    """And goes on from its checkpoint in one process, unsplit."""
    unbroken, broken, alone = (tmp_path / name for name in ("unbroken", "broken", "alone"))
    run(unbroken, shards, "sharded=true")
    run_until_stopped(broken, shards, "sharded=true")
    shutil.copytree(broken, alone)
    run(broken, shards, "sharded=true")
    assert_same_run(unbroken, broken)
    fields = ("steps=8", "checkpoint_every=3", "evaluate_every=4")
    caplog.set_level("INFO", logger="mmmodel.train")
    assert train.pretrain(dataclasses.replace(configs.override(configs.tiny(), fields), data=str(shards)), alone)
    assert "continuing at step" in caplog.text
    shapes = [{name: tensor.shape for name, tensor in weights(out).items()} for out in (unbroken, alone)]
    assert shapes[0] == shapes[1]
