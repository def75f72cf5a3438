"""Draws docs/images/packs-*.png, how full packs are: `make pictures`, or python -m docs.pack_pictures [FOLDER].

Drawn from seeded lengths, so that everyone gets the same pictures; benchmarks/planner.py says how they are drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.planner import BUDGET, DISTRIBUTIONS, TIGHT
from mmkernels.packs import plan_packs

ITEMS = 20_000
POLICIES = ("in order", "stream", "first_fit", "best_fit")
COLORS = dict(zip(POLICIES, ("#b0b0b0", "#7fa8d1", "#e0a458", "#2f6690"), strict=True))
LABELS = {
    "mixed": "mixed\n16 a pack",
    "lognormal": "lognormal\n7 a pack",
    "halves": "halves\n2 a pack",
    "trimodal": "trimodal, 3 budgets\n10 a pack",
}


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"packs-{name}.png", dpi=110)
        print(f"wrote {folder / f'packs-{name}.png'}")
    return 0


def fill_by_policy():
    """Bars: the share of the fullest budget that is used."""
    figure, axes = _figure(8, 3.6)
    for place, name in enumerate(LABELS):
        lengths, budgets = _lengths(name), TIGHT if name == "trimodal" else (BUDGET,)
        for shift, policy in enumerate(POLICIES):
            loads = _loads(lengths, budgets, policy)
            fill = 100 * (loads.sum(0) / np.array(budgets)).max() / len(loads)
            x = place + 0.2 * (shift - 1.5)
            axes.bar(x, fill, 0.18, color=COLORS[policy], label=policy if place == 0 else None)
            axes.text(x, fill + 0.4, f"{fill:.1f}", ha="center", fontsize=7)
    axes.set_xticks(range(len(LABELS)), LABELS.values(), fontsize=8)
    axes.set_ylim(60, 103)
    axes.set_ylabel("fill of the fullest budget, %")
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def per_pack():
    """Tokens of each pack by policy; and the work of each pack with and without costs."""
    figure, (tokens, work) = _figure(9, 3.4, columns=2)
    for policy in ("in order", "stream", "best_fit"):
        loads = _loads(_lengths("lognormal"), (BUDGET,), policy)
        ordered = np.sort(loads[:, 0])[::-1]
        tokens.plot(np.linspace(0, 100, len(ordered)), ordered, color=COLORS[policy], label=policy)
    tokens.axhline(BUDGET, color="black", lw=0.8, ls=":")
    tokens.set(xlabel="packs, fullest first, %", ylabel="tokens of a pack (lognormal)", ylim=(0, 1.05 * BUDGET))
    tokens.legend(fontsize=8, frameon=False)

    lengths = _lengths("mixed")
    costs = lengths + lengths.astype(np.float64) ** 2 / 4096
    for label, color, options in (
        ("without costs", COLORS["in order"], {}),
        ("with costs", COLORS["best_fit"], {"costs": costs}),
    ):
        plan = plan_packs(lengths, BUDGET, **options)
        sums = np.add.reduceat(costs[plan.order], plan.offsets[:-1])
        share = np.sort(sums / sums.mean())[::-1]
        work.plot(np.linspace(0, 100, len(share)), share, color=color, label=label)
    work.axhline(1, color="black", lw=0.8, ls=":")
    work.set(xlabel="packs, costliest first, %", ylabel="l + l\N{SUPERSCRIPT TWO}/4096 over the mean", ylim=(0.85, 1.1))
    work.legend(fontsize=8, frameon=False)
    return figure


PICTURES = {"fill": fill_by_policy, "tokens": per_pack}


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _lengths(name: str) -> np.ndarray:
    return DISTRIBUTIONS[name](np.random.default_rng(0), ITEMS).astype(np.int32)


def _loads(lengths: np.ndarray, budgets: tuple[int, ...], policy: str) -> np.ndarray:
    """Load [packs, K]."""
    columns = lengths.reshape(len(lengths), -1).astype(np.int64)
    if policy != "in order":
        plan = plan_packs(columns, budgets, policy=policy)
        return np.add.reduceat(columns[plan.order], plan.offsets[:-1])
    loads = [np.zeros(len(budgets), np.int64)]
    for item in columns:  # a pack ends where the next item does not fit
        if (loads[-1] + item > budgets).any():
            loads.append(np.zeros(len(budgets), np.int64))
        loads[-1] = loads[-1] + item
    return np.array(loads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
