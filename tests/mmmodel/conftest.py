"""A small synthetic data set, and a labelled one, shared by the tests of the model."""

import dataclasses

import numpy as np
import pytest
import torch

from mmmodel import configs, train
from mmmodel.data import synthetic
from mmmodel.data.shards import write_index, write_shard


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """80 procedural samples, some without text, image or audio."""
    return synthetic.prepare(tmp_path_factory.mktemp("data") / "synthetic", samples=80, seed=0)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Captions from which each task's label can be read; 96 samples without pictures, so that epochs take no time."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    made = []
    for i in range(96):
        colour, count = str(rng.choice(["red", "blue", "pink"])), int(rng.integers(1, 4))
        meta = {
            "split": "train" if i < 64 else "validation" if i < 80 else "test",
            "colour": colour,
            "names": [colour, f"n{count}"],
            "size": float(count),
            "about": f"which colour? {colour}",
            "concept": f"{count} {colour}",
        }
        made.append({"__key__": f"s{i:03d}", "txt": " ".join([colour] * count), "json": meta})
    write_index(folder, write_shard(folder / "labelled-00000.tar", made))
    return folder


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train.pretrain(dataclasses.replace(configs.tiny(), data=str(shards), steps=2), folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMMODEL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def one_thread():
    """With several the BLAS library rounds a product of a dozen rows or fewer in another way than one of more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(shards):
    return dataclasses.replace(configs.tiny(), data=str(shards))


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
    config = dataclasses.replace(configs.tiny(), data=str(shards))
    out = tmp_path_factory.mktemp("unbroken")
    assert train.pretrain(config, out)
    return out
