"""Runs that are whole, only on less memory and shorter."""

import pytest

from benchmarks import attention_host, environment, limits, run


@pytest.fixture
def small_limits(monkeypatch):
    """The limits are measured for real."""
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(limits.GEMM_SIZE, "cpu", 128)
    monkeypatch.setattr(run, "MAX_SECONDS_PER_DIRECTION", 0.02)


@pytest.fixture
def small_stages(small_limits, monkeypatch):
    monkeypatch.setattr(attention_host, "ROUNDS", 2)
    monkeypatch.setattr(environment, "sources", lambda: "the same")  # whoever edits meanwhile
