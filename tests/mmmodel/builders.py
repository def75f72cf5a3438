"""A tiny learner and hand-made batches for it, shards as others write them, a pickle that runs.  M = 3 modalities."""

import dataclasses
import io
import os
import tarfile

import numpy as np
import torch
from safetensors.torch import load_file

from mmmodel import configs, metrics
from mmmodel.batches import collate
from mmmodel.features import Features, Item
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.frontends.text import train_tokenizer
from mmmodel.pretraining import Pretraining

WORDS = ("red", "blue", "circle", "square", "two", "big", "star")

# modalities of each sample: complete ones, one of each alone, and a pair
PRESENT = (("text", "image", "audio"), ("image",), ("text", "audio"), ("text",), ("text", "image", "audio"), ("audio",))
GRIDS = ((1, 2), (2, 1), (1, 1), (2, 3), (1, 2), (3, 2))  # cells of 16 x 16 pixels
FRAMES = (5, 1, 40, 4, 17, 9)

QUICK_FINETUNING = FinetuneConfig(
    epochs=12, patience=0, lr=1e-2, layer_decay=1.0, augment=False, dropout=0.0, warmup_share=0.05
)


def learner(seed=0, **fields):
    config = dataclasses.replace(configs.tiny(), seed=seed)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    return config, Pretraining(config, train_tokenizer([" ".join(WORDS)], 280))


def objective_learner(*assignments, seed=0):
    """The learner of `tiny` with fields set from "objectives.masked_image.weight=1" and the like."""
    config = configs.override(dataclasses.replace(configs.tiny(), seed=seed), assignments)
    return config, Pretraining(config, train_tokenizer([" ".join(WORDS)], 280))


def samples(seed=0, present=PRESENT):
    """Items and their features; concepts repeat, so that some have several positives."""
    rng = np.random.default_rng(seed)
    arrays = {"text": [], "image": [], "audio": []}
    items = []
    for i, names in enumerate(present):
        rows = {}
        for name in names:
            rows[name] = len(arrays[name])
            arrays[name].append(_feature(name, i, rng))
        items.append(Item(f"k{i}", f"g{i}", "xx", f"c{i % 4}", "train", rows))
    return items, Features.of(arrays)


def write_tar(path, members):
    """File name -> bytes, as `tar` writes them: in that order, filled up to 10 KiB."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _feature(name, i, rng):
    if name == "text":
        return np.array([0, *rng.integers(4, 260, size=3 + 2 * i)], np.int32)
    if name == "image":
        rows, cols = GRIDS[i]
        return rng.integers(0, 256, (3, 16 * rows, 16 * cols), dtype=np.uint8)
    return rng.normal(size=(FRAMES[i], 8)).astype(np.float16)


def batch_of(learner, items, features):
    return collate(items, features, learner.model.front_ends, learner.model.special_tokens)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def weights(run):
    return load_file(run / "model.safetensors")


def assert_same_run(one, two):
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for left, right in zip(metrics.read(one / "metrics.jsonl"), metrics.read(two / "metrics.jsonl"), strict=True):
        timed = {name for name in left if name.endswith("_ms") or "per_s" in name or name == "mfu_percent"}
        assert {k: v for k, v in left.items() if k not in timed} == {k: v for k, v in right.items() if k not in timed}
