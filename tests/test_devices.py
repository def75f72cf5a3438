"""The current GPU, and the tensors'."""

from types import SimpleNamespace

import pytest
import torch

from mmkernels.devices import on_device, ready


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


def test_only_memory_of_the_host_is_pinned_and_only_for_a_gpu(monkeypatch):
    """Without a GPU nothing can be pinned, so a copy stands for it."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: any(self is t for t in pinned))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    tensor, elsewhere = torch.arange(3), torch.zeros(3, device="meta")
    assert ready("it", tensor, torch.device("cpu")) is tensor
    assert ready("it", elsewhere, torch.device("cuda:1")) is elsewhere
    found = ready("it", tensor, torch.device("cuda"))
    assert torch.equal(found, tensor)
    assert len(pinned) == 1
    assert ready("it", found, torch.device("cuda")) is found is pinned[0]

    for asked in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, asked, lambda: True)
    assert ready("it", found, torch.device("cuda")) is found  # who pinned it keeps it
    assert ready("it", elsewhere, torch.device("cuda")) is elsewhere
    with pytest.raises(ValueError, match="its parts are on the host, from where a graph"):
        ready("its parts", tensor, torch.device("cuda"))
    assert len(pinned) == 1
