"""A small synthetic data set, shared by the tests of the model."""

import dataclasses

import pytest
import torch

from mmmodel import configs, train
from mmmodel.data import synthetic


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """80 procedural samples, some without text, image or audio."""
    return synthetic.prepare(tmp_path_factory.mktemp("data") / "synthetic", samples=80, seed=0)


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
