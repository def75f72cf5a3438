"""Two processes on one batch (gloo): their gradients are those of one process, and a stopped run goes on to the bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from builders import assert_same_run, learner, samples

from mmmodel import checkpoint, distributed, metrics, train, update
from mmmodel.batches import collate
from mmmodel.configs import ConfigError, MaskedConfig, ObjectiveConfig, ObjectivesConfig
from mmmodel.pretraining import Pretraining

ROOT = Path(__file__).parents[2]
CONTRASTIVE = ObjectivesConfig(contrastive=ObjectiveConfig(weight=1.0), masked_text=MaskedConfig(weight=0.0))
MASKED = ObjectivesConfig(
    contrastive=ObjectiveConfig(weight=0.0), masked_text=MaskedConfig(weight=1.0), masked_share=1.0
)
SHARES = (slice(0, 2), slice(2, 6))  # uneven: 2 and 4 samples, with 6 and 7 segments


def build(objectives):
    config, made = learner()
    config = dataclasses.replace(config, objectives=objectives)
    return config, Pretraining(config, made.model.tokenizer)


def batch_of(learned, which):
    items, features = samples()
    batch = collate(items[which], features, learned.model.front_ends, learned.model.special_tokens)
    return batch, learned.prepare(batch, np.random.default_rng(which.start or 0))


def gradients_of(learned):
    return {name: p.grad.clone() for name, p in learned.named_parameters() if p.grad is not None}


def ranks_step(rank, store, results, objectives):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config, learned = build(objectives)
    optimizer = update.make_optimizer(learned, config)
    batch, prepared = batch_of(learned, SHARES[rank])
    config = dataclasses.replace(config, clip_norm=0.0)
    with distributed.wrapped(learned) as module:
        figures, made = update.train_step(
            module, optimizer, batch, update.reweighted(prepared, torch.device("cpu")), config
        )
        lines = distributed.everyone(figures)
        torch.save((metrics.merged(lines), gradients_of(learned), made), f"{results}.{rank}")
        # one rank's infinity must stop both, and leave both with the same weights
        if rank == 1:
            with torch.no_grad():
                batch.inputs["audio"][0].fill_(torch.inf)
        before = [p.clone() for p in learned.parameters()]
        _, made = update.train_step(module, optimizer, batch, update.reweighted(prepared, torch.device("cpu")), config)
        assert not made
        assert all(torch.equal(a, b) for a, b in zip(before, learned.parameters(), strict=True))
    dist.destroy_process_group()


def two_ranks(tmp_path, objectives):
    results = tmp_path / "result"
    multiprocessing.spawn(ranks_step, (tmp_path / "store", results, objectives), nprocs=2)
    return [torch.load(f"{results}.{rank}") for rank in range(2)]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_contrastive_gradients_are_one_processs(tmp_path):
    """Negatives come from both ranks: the loss does not split into the ranks' own."""
    _, learned = build(CONTRASTIVE)
    batch, prepared = batch_of(learned, slice(None))
    loss, _ = learned(batch, prepared)
    loss.backward()
    for figures, gradients, made in two_ranks(tmp_path, CONTRASTIVE):
        assert made
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_close(gradients, gradients_of(learned))


def test_masked_gradients_are_the_mean_over_all_hidden_tokens(tmp_path):
    """Ranks hide different numbers of tokens; each token counts the same."""
    _, learned = build(MASKED)
    parts = [batch_of(learned, share) for share in SHARES]
    hidden = [len(prepared.masked.targets["text"]) for _, prepared in parts]
    assert hidden[0] != hidden[1]
    loss = sum(learned(*part)[0] * count for part, count in zip(parts, hidden, strict=True)) / sum(hidden)
    loss.backward()
    for figures, gradients, _ in two_ranks(tmp_path, MASKED):
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_close(gradients, gradients_of(learned))


def command(out, shards, *more):
    fields = ["data=" + str(shards), "steps=8", "checkpoint_every=3", "evaluate_every=4", *more]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "mmmodel"]
    return [*launch, "pretrain", "--preset", "tiny", "--out", str(out), "--set", *fields]


def run(out, shards, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(out, shards, *more), cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=200
    )


def run_until_stopped(out, shards, *more):
    started = command(out, shards, *more)
    with subprocess.Popen(started, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        while not (out / "checkpoints" / "step-00000003").exists():
            assert p.poll() is None
            time.sleep(0.01)
        p.send_signal(signal.SIGTERM)  # torchrun hands it to both
    assert checkpoint.saved(out / "checkpoints")


def test_torchrun_trains_and_resumes_to_the_same_bits(shards, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, shards)
    run_until_stopped(broken, shards)
    run(broken, shards)
    assert_same_run(whole, broken)
    lines = metrics.read(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation/contrastive/loss" in line] == [4, 8]
    assert json.loads((whole / "config.json").read_text())["batch_size"] == 4


def test_a_batch_that_leaves_a_process_without_samples_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 5)
    with pytest.raises(ConfigError, match="batch_size is 4, expected at least a sample for each of the 5 processes"):
        train.pretrain(tiny, tmp_path)


def test_ranks_share_a_batch_and_draw_apart(monkeypatch):
    """Together they have each sample once; rank 0 draws what a single process does."""
    alone = distributed.generator(3, 7).random()
    monkeypatch.setattr(distributed, "size", lambda: 3)
    shares, drawn = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.own(list(range(8))))
        drawn.append(distributed.generator(3, 7).random())
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert drawn[0] == alone
    assert len(set(drawn)) == 3
