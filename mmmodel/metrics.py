"""Figures of a step, one JSON object per line, and what they are computed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmmodel import atomic
from mmmodel.batches import Batch


class MetricsFile:
    """`metrics.jsonl`.  Opening it for a resumed run drops lines past the checkpoint: those steps are done again.

    tensorboard: folder to which the figures go as well, as scalars.
    """

    def __init__(self, path: Path, *, from_step: int, tensorboard: Path | None = None) -> None:
        kept = [line for line in read(path) if line["step"] <= from_step]
        with atomic.replacing(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(tensorboard), purge_step=from_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps({key: _rounded(value) for key, value in line.items()}) + "\n")
        self.file.flush()  # kill -9 loses no finished step
        if self.events:
            for name in line.keys() - {"step"}:
                self.events.add_scalar(name, line[name], line["step"])

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, [] if there is none, up to the first that a kill or a power cut spoilt."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text.decode("utf-8"))
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


SUMMED = ("tokens", "tflop", "stop")  # over ranks; other figures are averaged


def merged(lines: list[dict[str, float]]) -> dict[str, float]:
    """One rank's figures, or those of all ranks as one step's.  A figure that some rank lacks is the others' mean."""
    if len(lines) == 1:
        return lines[0]
    names = dict.fromkeys(name for line in lines for name in line)
    values = {name: [line[name] for line in lines if name in line] for name in names}
    return {name: sum(found) if name.startswith(SUMMED) else sum(found) / len(found) for name, found in values.items()}


def timings(line: dict[str, float], seconds: float, waited: float, peak: float) -> dict[str, float]:
    """Figures of a step that took `seconds`, `waited` of them for its batch.  peak: FLOP/s that the machine can do.

    mfu_percent: work on real tokens (see StepFlops) in the whole time of the step, over what `peak` would do in it.
    """
    rates = {f"tokens_per_s/{n.removeprefix('tokens/')}": line[n] / seconds for n in line if n.startswith("tokens/")}
    percent = 100 * line["tflop"] * 1e12 / seconds / peak
    return {**rates, "step_ms": 1e3 * seconds, "data_wait_ms": 1e3 * waited, "mfu_percent": percent}


def batch_figures(batch: Batch, names: tuple[str, ...], computed_rows: dict[str, int]) -> dict[str, float]:
    """Real rows per modality; fill, the share of computed rows that are real; and the padding of the usual layout.

    computed_rows: rows each front end computes, its gaps included.
    """
    real = dict(zip(names, batch.layout.stream_lengths, strict=True))
    longest = [0] * len(names)
    for _, modality, length, _ in batch.layout.segments.tolist():
        longest[modality] = max(longest[modality], length)
    padded = len(batch.segments) * sum(longest)  # each modality padded to its longest, then concatenated
    return {
        **{f"tokens/{name}": count for name, count in real.items()},
        "tokens": batch.layout.total_tokens,
        "fill_percent": 100 * sum(real.values()) / max(1, sum(computed_rows.values())),
        "padding_avoided_percent": 100 * (1 - batch.layout.total_tokens / max(1, padded)),
    }


def _rounded(value: Any) -> Any:
    """Six significant digits: enough to plot, a third of the file."""
    if isinstance(value, float) and np.isfinite(value):
        return float(f"{value:.6g}")
    return value if not isinstance(value, float) else None  # JSON has no NaN
