"""The stopwatch: turns rotate, a slow call does not starve the others, results are compared strictly."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from benchmarks import harness, limits

CPU = torch.device("cpu")


def test_turns_change(monkeypatch):
    """Each call is first in turn and follows each other one: whoever always followed the same one met its cache."""
    monkeypatch.setattr(harness, "MIN_ROUNDS", 24)
    monkeypatch.setattr(harness, "SETTLED", -1.0)
    order = []
    calls = {name: lambda n=name: (order.append(n), time.sleep(0.002)) for name in "abcd"}
    samples = harness.time_calls(calls, 0.0, CPU)
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abcd", 24)
    turns = order[-3 * 4 * 24 :: 3]  # two calls before the one that counts
    rounds = [turns[i : i + 4] for i in range(0, 4 * 24, 4)]
    assert all(sorted(turns) == list("abcd") for turns in rounds)
    assert [turns[0] for turns in rounds] == list("abcd") * 6
    followed = {pair for turns in rounds for pair in itertools.pairwise(turns)}
    assert followed == {(a, b) for a in "abcd" for b in "abcd" if a != b}


def test_what_another_left_does_not_count():
    """A call that is slow while caches and the allocator are as another left them, and the call after it."""
    last = []

    def call(name):
        last[:] = [*(n for n in last if n == name), name]
        time.sleep(0.02 if len(last) < 3 else 0.001)

    samples = harness.time_calls({name: lambda n=name: call(n) for name in "ab"}, 0.0, CPU)
    assert max(samples["a"] + samples["b"]) < 10


def test_whether_calls_come_before_a_sample_is_decided_once(monkeypatch):
    """Not by a call that another made slow: of who allocates more, some samples would be such calls."""
    monkeypatch.setattr(harness, "LONG_MS", 12.0)
    last = []

    def call(name):
        last[:] = [*(n for n in last if n == name), name]
        time.sleep(0.015 if len(last) < 3 else 0.003)

    monkeypatch.setattr(harness, "warm_up", lambda call, device: 3.0)
    samples = harness.time_calls({name: lambda n=name: call(n) for name in "ab"}, 0.0, CPU)
    assert max(samples["a"] + samples["b"]) < 12


def test_forward_is_timed_without_autograd():
    """Under no_grad for forward, recording for the others, and as before afterwards."""
    seen = {}
    leaf = torch.ones(2, requires_grad=True)

    class Problem:
        op, case, dtype, directions = "op", "case", "fp32", ("fwd", "bwd")

        def implementations(self):
            def forward():
                seen.setdefault(torch.is_grad_enabled(), 0)
                return leaf * 2

            return [harness.Implementation("mm.cpp", forward, [leaf], torch.ones(2))]

        def check(self, direction, results):
            assert results[0].requires_grad is False
            return None

        def work(self, direction):
            return harness.Work(1, "GB/s", 9, None)

    for _ in harness.run_problem(Problem(), {}, 0.0, CPU):
        assert torch.is_grad_enabled()
    assert seen.keys() == {False, True}


@pytest.mark.parametrize("good", [1, 2, 5])  # its check alone; its warm-up too; a sample as well
def test_who_fails_while_it_is_timed_costs_no_other(good):
    calls = itertools.count(1)

    def fails():
        if next(calls) > good:
            raise MemoryError("no memory\nbeside the others")
        time.sleep(0.002)

    class Problem:
        op, case, dtype, directions = "op", "case", "fp32", ("fwd",)

        def implementations(self):
            return [harness.Implementation(*row) for row in (("mm.cpp", lambda: time.sleep(0.002)), ("peer", fails))]

        def check(self, direction, results):
            return None

        def work(self, direction):
            return harness.Work(1, "GB/s", 9, None)

    rows = {row["impl"]: row for row in harness.run_problem(Problem(), {}, 0.0, CPU)}
    assert rows["peer"]["skipped"] == "failed: MemoryError: no memory"
    assert len(rows["mm.cpp"]["samples_ms"]) == harness.MIN_ROUNDS
    assert rows["mm.cpp"]["speedup_over"] == {}


def test_slow_call_sits_out(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.0)
    calls = {"slow": lambda: time.sleep(0.05), "fast": lambda: time.sleep(0.002)}
    samples = harness.time_calls(calls, 0.06, CPU)
    assert len(samples["slow"]) == harness.MIN_SLOW_ROUNDS
    assert len(samples["fast"]) >= harness.MIN_ROUNDS
    assert all(ms >= 50 for ms in samples["slow"])


def test_short_calls_are_repeated_within_a_sample():
    """Milliseconds are of one call, however many made up the sample."""
    counter = [0]

    def call():
        counter[0] += 1

    samples = harness.time_calls({"short": call}, 0.0, CPU)["short"]
    assert counter[0] > 20 * len(samples)
    assert max(samples) < harness.MIN_SAMPLE_MS


def test_settled_medians_end_the_rounds(monkeypatch):
    """Equal samples need no 200 rounds; samples that scatter go on until the time is spent."""
    sampled = {"same": lambda n: 1.0, "scattered": lambda n: 1.0 + n % 2}
    for name, ms in sampled.items():
        counter = iter(range(1000))
        times = lambda calls, n=counter, ms=ms: [(name, ms(next(n))) for name, *_ in calls]  # noqa: E731
        monkeypatch.setattr(harness, "_sample_cpu", times)
        samples = harness.time_calls({name: lambda: None}, 600.0, CPU)[name]
        assert len(samples) == (harness.SETTLED_EVERY if name == "same" else harness.MAX_ROUNDS)


def test_close():
    reference = torch.randn(50, 4, dtype=torch.float64)
    same = reference.float()
    assert harness.close([same], [reference]) is None
    assert "relative error" in harness.close([same * 1.001], [reference])
    assert "shape" in harness.close([same[:-1]], [reference])
    broken = same.clone()
    broken[3, 2] = float("nan")
    assert "relative error nan" in harness.close([broken], [reference])
    assert harness.close([same.bfloat16()], [reference]) is None  # its own rounding is allowed
    assert harness.close([same.bfloat16()], [same], 0.0) is not None  # but not where only bits are moved
    assert harness.close([torch.empty(0, 4)], [torch.empty(0, 4)]) is None


def test_a_limit_of_products_is_no_less_than_in_fp32(monkeypatch):
    """A CPU without instructions for bf16 takes a hundred times as long over torch's product of it."""
    rates = {torch.float32: 2.0, torch.bfloat16: 0.02, torch.float16: 3.0}
    monkeypatch.setattr(limits, "_gemm", lambda device, dtype, seconds: rates[dtype])
    found = limits.measure(CPU, ["fp32", "bf16", "fp16"], known=["copy"])
    assert {name: limit["value"] for name, limit in found.items()} == {"gemm_fp32": 2, "gemm_bf16": 2, "gemm_fp16": 3}
