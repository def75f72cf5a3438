"""The schema check: accepts what the harness writes and bites on each way a row can be dishonest."""

from __future__ import annotations

import copy

from benchmarks import schema

TIMED = {
    "op": "attention",
    "case": "stamps",
    "direction": "fwd",
    "dtype": "fp32",
    "impl": "mm.torch",
    "median_ms": 1.5,
    "spread": 0.1,
    "rate": 0.04,
    "rate_unit": "TFLOP/s",
    "percent_of_limit": 80.0,
    "speedup_over": {"sdpa_loop": 1.1},
    "samples_ms": [1.4, 1.5, 1.7],
    "checked": True,
}
SKIPPED = {key: TIMED[key] for key in schema.IDENTITY} | {"skipped": "no GPU"}
GOOD = {
    "environment": dict.fromkeys(schema.ENVIRONMENT, "x"),
    "limits": {"copy": {"value": 10.0, "unit": "GB/s"}},
    "rows": [TIMED, SKIPPED],
}


def test_good_document():
    assert schema.errors(GOOD) == []
    no_limit = GOOD | {"rows": [TIMED | {"percent_of_limit": None, "extra": {"fill": 0.9}}]}
    assert schema.errors(no_limit) == []


def test_bad_rows():
    bad = [
        TIMED | {"checked": False},  # timed though wrong
        SKIPPED | {"median_ms": 1.0},  # skipped, yet with a figure
        SKIPPED | {"skipped": ""},  # skipped without a reason
        TIMED | {"median_ms": 0.0},
        TIMED | {"rate": float("nan")},
        TIMED | {"speedup_over": {"sdpa_loop": -1}},
        TIMED | {"direction": "sideways"},
        TIMED | {"surprise": 1},
        TIMED | {"samples_ms": []},  # a median of nothing
        TIMED | {"samples_ms": [1.5, -1.0]},
        TIMED | {"samples_ms": 1.5},
        TIMED | {"speedup_over": 2.0},
        3,
        None,
        {key: value for key, value in TIMED.items() if key != "spread"},
    ]
    for row in bad:
        assert len(schema.errors(GOOD | {"rows": [row]})) == 1, row


def test_bad_document():
    assert schema.errors([])
    assert schema.errors(GOOD | {"more": 1})
    without_commit = copy.deepcopy(GOOD)
    del without_commit["environment"]["commit"]
    assert schema.errors(without_commit) == ["environment: lacks commit"]
    assert schema.errors(GOOD | {"limits": {"copy": {"value": 0.0, "unit": "GB/s"}}})
    after = {"value": 9.0, "unit": "GB/s", "after": 8.0}
    assert schema.errors(GOOD | {"limits": {"copy": after}}) == []
    assert schema.errors(GOOD | {"limits": {"copy": after | {"after": 0.0}}})
    for other in ({"environment": 3}, {"environment": None}, {"limits": []}, {"limits": {"copy": 3}}, {"rows": {}}):
        assert len(schema.errors(GOOD | other)) == 1, other
