"""What a tuner measured: tuned.json, laid over the built-in table of configs.py.

The file, which `python -m benchmarks tune attention` writes and `read` checks:

    {"format": 1, "entries": [
      {"arch": "sm_90", "dtype": "bf16", "head_dim": 64, "extras": false, "mask": "causal", "lengths": "long",
       "kernel": "fwd",
       "config": {"rows": 128, "cols": 128, "warps": 8, "stages": 3, "tma": true},
       "provenance": {"device": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "commit": "...", "workload": "longtail",
                      "ms": 0.41, "default_ms": 0.47}}]}

head_dim is the widest head of a bucket (32, 64, 128, 256); mask and lengths are classes of `classify`; kernel is
fwd, dkdv, dq or fused; provenance is free but names the device that timed it.  An entry is used where all its keys
match, on every GPU of its architecture, bf16's also for fp16 where that has none of its own; the last of equal entries
wins.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FORMAT = 1
KERNELS = ("fwd", "dkdv", "dq", "fused")
BUCKETS = (32, 64, 128, 256)  # head widths, each up to and including
MASKS = ("document", "causal", "window", "visible")
LENGTHS = ("short", "medium", "long")
KEYS = ("arch", "dtype", "head_dim", "extras", "mask", "lengths", "kernel")
_CHOICES = {
    "dtype": ("bf16", "fp16", "fp32"),
    "head_dim": BUCKETS,
    "extras": (False, True),
    "mask": MASKS,
    "lengths": LENGTHS,
    "kernel": KERNELS,
}
MOST_ROWS = 256  # of a tile, on either side: kernels count them in int32, times the stride of a token
_NUMBERS, _OPTIONAL = ("rows", "cols", "warps", "stages"), {"tma": bool, "late": bool, "registers": int}


def classify(plan) -> tuple[str, str]:
    """Mask and length class of a MaskPlan, by what is known without waiting for a device.

    mask     "visible" where modalities are hidden, else "window", else "causal" (prefix and bidirectional with it),
             else "document"
    lengths  by mean tokens per sample: "short" below 256, "medium" below 2,048, "long" from there
    """
    mask = plan.mask
    if mask.visible is not None:
        kind = "visible"
    elif max(mask.window) >= 0:
        kind = "window"
    else:
        kind = "causal" if mask.causal else "document"
    mean = plan.layout.total_tokens / max(1, plan.layout.num_samples)
    return kind, LENGTHS[(mean >= 256) + (mean >= 2048)]


def tuned_path() -> Path:
    """Where the installed package keeps its measurements."""
    return Path(__file__).with_name("tuned.json")


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file.  Raises ValueError that names the file and the entry that does not fit."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise ValueError(f'{path}: expected {{"format": {FORMAT}, "entries": [...]}}')
    _check(str(path), content["entries"])
    return content["entries"]


def write(entries: list[dict[str, Any]], path: Path) -> None:
    """Writes entries that `read` takes; raises ValueError for others.  One entry a line, so that diffs read well."""
    _check("tuned.write", entries)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.write_text(f'{{"format": {FORMAT}, "entries": [\n{lines}\n]}}\n' if lines else _EMPTY)
    _index.cache_clear()


_EMPTY = f'{{"format": {FORMAT}, "entries": []}}\n'


def lookup(arch: str, dtype: str, head_dim: int, extras: bool, mask: str, lengths: str) -> dict[str, dict]:
    """kernel -> the numbers of its Config, for the kernels that were measured under these keys."""
    index = _index(tuned_path())
    if not index:
        return {}
    found = dict(index.get((arch, "bf16", head_dim, extras, mask, lengths), {})) if dtype == "fp16" else {}
    return found | index.get((arch, dtype, head_dim, extras, mask, lengths), {})


@functools.cache
def _index(path: Path) -> dict[tuple, dict[str, dict]]:
    index: dict[tuple, dict[str, dict]] = {}
    for entry in read(path) if path.exists() else ():
        *key, kernel = (entry[name] for name in KEYS)
        index.setdefault(tuple(key), {})[kernel] = entry["config"]
    return index


def _check(who: str, entries: list[dict[str, Any]]) -> None:
    for number, entry in enumerate(entries):
        wrong = _problem(entry)
        if wrong:
            raise ValueError(f"{who}: entry {number}: {wrong}")


def _problem(entry) -> str | None:
    """What is wrong with an entry, in words; None where nothing is."""
    if not isinstance(entry, dict):
        return f"is {entry!r}, expected an object"
    missing = [name for name in (*KEYS, "config", "provenance") if name not in entry]
    if missing:
        return f"has no {', '.join(missing)}"
    for name, choices in _CHOICES.items():
        if entry[name] not in choices:
            return f"{name} is {entry[name]!r}, expected one of {', '.join(map(str, choices))}"
    numbers = entry["config"]
    kinds = dict.fromkeys(_NUMBERS, int) | _OPTIONAL
    fits = isinstance(numbers, dict) and numbers.keys() <= kinds.keys()
    fits = fits and all(type(value) is kinds[name] and value >= 0 for name, value in numbers.items())
    if not fits or not all(numbers.get(name) for name in _NUMBERS):
        return f"config is {numbers}, expected whole {', '.join(_NUMBERS)} and perhaps {', '.join(_OPTIONAL)}"
    if max(numbers["rows"], numbers["cols"]) > MOST_ROWS:
        return f"config is {numbers}, expected at most {MOST_ROWS} rows and cols"
    if not isinstance(entry["provenance"], dict) or not entry["provenance"].get("device"):
        return "provenance names no device: a number must say where it was measured"
    return None
