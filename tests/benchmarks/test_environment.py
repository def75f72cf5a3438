"""What a figure was measured on: the GPU that torch uses, of several."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks import environment

PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=140 << 30,
    L2_cache_size=60 << 20,
    uuid="1234-abcd",
)


def test_clocks_are_of_the_gpu_that_torch_uses(monkeypatch):
    """With CUDA_VISIBLE_DEVICES=3 torch's first GPU is nvidia-smi's fourth."""
    known = {"GPU-1234-abcd": "580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31, Enabled", "0": "580.1"}
    monkeypatch.setattr(environment, "_output", lambda *command: known.get(command[-1], ""))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    facts = environment._gpu(torch.device("cuda"))
    assert facts["clocks.mem"] == "3201 MHz"
    assert facts["persistence_mode"] == "Enabled"
    del known["GPU-1234-abcd"]  # a part of a GPU: nothing but the driver is known for sure
    facts = environment._gpu(torch.device("cuda"))
    assert facts["driver_version"] == "580.1"
    assert "clocks.sm" not in facts
    known.clear()
    assert "driver_version" not in environment._gpu(torch.device("cuda"))
