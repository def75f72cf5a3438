"""`benchmarks attention --host`: the parts add up to the whole, and the stub leaves the operator as it was."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention_host
from benchmarks.__main__ import main
from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.attention import quick


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_host, "ROUNDS", 2)
    monkeypatch.setattr(attention_host, "LAYOUT_SAMPLES", 4)
    load = dispatch.load
    assert main(["attention", "--host", "--device", "cpu", "--json", str(tmp_path / "host.json")]) == 0
    assert dispatch.load is load
    document = json.loads((tmp_path / "host.json").read_text())
    assert set(document) == {"environment", "calls", "layout"}
    us = {row["what"].strip(): row["us"] for row in document["calls"]}
    whole = next(value for what, value in us.items() if what.startswith("forward, no gradient"))
    parts = us["checks, look-up, dispatcher and outputs"] + us["the implementation"]
    assert abs(whole - parts) < 0.1  # of a microsecond: rounding
    assert us["SDPA forward and backward"] > us["SDPA forward, gradient wanted"] > 0
    assert all(row["lower_us"] > 0 and row["tiles_us"] > 0 for row in document["layout"])
    assert "forward and backward" in capsys.readouterr().out


def test_stub_computes_nothing_and_real_calls_compute():
    """The stub must not be what the other rows time: a call outside it fills its output."""
    filled = []

    def call():
        filled.append(dispatch.load("attention", "reference") is attention_host.NOTHING)

    attention_host.best_times({"a stub": (call, False), "a": (call, True)}, 1, torch.device("cpu"))
    assert filled == [True] * attention_host.CALLS + [False] * attention_host.CALLS


def test_the_stub_keeps_no_call(monkeypatch):
    """Where a Triton of another version replays no launch, each call asks it again whether it may be kept."""
    q, layout = torch.zeros(3, 1, 8), PackedLayout.from_segments([[(0, 3)]], num_modalities=1)
    with attention_host.without_implementation():
        quick.remember(q, q, q, layout, None, None, None, "auto", False, ("triton",))
    assert not layout.calls


@pytest.mark.parametrize("option", [["--case", "stamps"], ["--budget-seconds", "5"], ["--shapes", "full"]])
def test_what_it_does_not_heed_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["attention", "--host", *option])
    assert stopped.value.code == 2
    assert "attention --host takes neither --case" in capsys.readouterr().err
