"""curves.png: how a run went."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmmodel import metrics

WINDOW = 15  # steps in the running mean
VALIDATION = "validation/"  # before the name of a figure: the same, on the split validation
DOTTED = "; dots: validation"


def plot_run(run: Path) -> Path | None:
    """Losses, accuracies or scores, tokens per second, gradient norm and rate of a run; None if it has no steps yet.

    A fine-tuning has validation scores, and a line per epoch; what a run does not have is left out.
    """
    lines = metrics.read(run / "metrics.jsonl")
    if not lines:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([line["step"] for line in lines])
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    names = sorted({name for line in lines for name in line if not name.startswith(VALIDATION)})
    _panel(
        axes[0, 0], "loss (nats)", steps, lines, ["loss", *(n for n in names if n.endswith("/loss") or "/loss/" in n)]
    )
    if "epoch" in names:
        scores = [n for n in names if n not in ("step", "epoch", "loss", "lr", "seconds")]
        _panel(axes[0, 1], "validation", steps, lines, scores)
    else:
        accuracies = [n for n in names if "/top1/" in n or n.endswith("/accuracy")]
        _panel(axes[0, 1], "in-batch accuracy", steps, lines, accuracies)
    _panel(axes[1, 0], "tokens per second", steps, lines, [n for n in names if n.startswith("tokens_per_s/")])
    _panel(axes[1, 1], "gradient norm before clipping", steps, lines, [n for n in names if n == "grad_norm"])
    axes[1, 1].set_ylim(auto=True)
    if "grad_norm" in names:
        axes[1, 1].set_yscale("log")  # the first steps are a hundred times larger
    rate = axes[1, 1].twinx()
    rate.plot(steps, [line["lr"] for line in lines], color="tab:gray", linestyle="--", linewidth=1)
    rate.set_ylabel("learning rate (dashed)")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(str(run))
    path = run / "curves.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _panel(axis, title: str, steps: np.ndarray, lines: list[dict], names: list[str]) -> None:
    if not names:
        axis.set_yticks([])  # an empty frame, in which the rate may still be drawn
        return
    for name in names:
        values = np.array([np.nan if line.get(name) is None else line[name] for line in lines], float)
        (curve,) = axis.plot(steps, values, alpha=0.2, linewidth=0.8)
        axis.plot(steps, _running_mean(values), color=curve.get_color(), linewidth=1.6, label=_label(name))
        if looks := [
            (line["step"], line[VALIDATION + name]) for line in lines if line.get(VALIDATION + name) is not None
        ]:
            axis.plot(*zip(*looks, strict=True), "o--", color=curve.get_color(), linewidth=1, markersize=4)
            title = title.removesuffix(DOTTED) + DOTTED
    axis.set_title(title)
    if axis.dataLim.ymin >= 0:  # an R2 may be negative
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _label(name: str) -> str:
    for prefix in ("contrastive/loss/", "contrastive/top1/", "tokens_per_s/"):
        name = name.removeprefix(prefix)
    return name


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Over the last WINDOW steps, shorter at the start; a missing value is left out, NaN where all are missing."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - WINDOW)
    known = counts[ends] - counts[starts]
    return np.where(known > 0, sums[ends] - sums[starts], np.nan) / np.maximum(1, known)
