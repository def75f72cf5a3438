"""The current GPU, and the tensors'."""

from types import SimpleNamespace

import pytest
import torch

from mmkernels.devices import on_device


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, ["cuda:1"])])
def test_the_tensors_gpu_is_made_the_current_one(index, entered, monkeypatch):
    """Nothing is asked for where it is that already: it would take as long as a short launch."""
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", asked.append)
    on_device(SimpleNamespace(is_cuda=True, get_device=lambda: index, device=f"cuda:{index}"))
    assert asked == entered
    with on_device(torch.zeros(1)):
        pass
