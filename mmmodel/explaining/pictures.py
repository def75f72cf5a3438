"""The pictures of an explanation: small enough for a phone, one fact each, axes with units.   L layers, H heads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager, ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mmmodel.explaining.ablation import Search, WordLoss

WIDTH = 3.6  # inches: 360 CSS pixels on the page
DPI = 220
COLOURS = ("#3b6fb6", "#d1782f", "#3d8b57", "#8a5aa5", "#7a7a7a")  # modalities in the model's order
NUMBERS_UP_TO = 36  # cells of a heat map that are still written out
FONTS = (  # of Chinese, Japanese and Korean letters, which matplotlib's own font lacks: what systems come with
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "IPAexGothic", "Hiragino Sans", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
WORDS_SHOWN, WORDS_ON_IMAGE = 24, 6


def mass(path: Path, reader: str, values: np.ndarray, names: Sequence[str], shares: Sequence[float]) -> None:
    """One map per modality that is read.  values [L, H, modalities]; shares: what looking evenly would give."""
    layers, heads = values.shape[:2]
    figure = _figure(1.0 + min(3.2, 0.24 * layers + 0.35))
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for i, (axis, name) in enumerate(zip(axes, names, strict=True)):
        image = axis.imshow(values[:, :, i], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(f"at {name}\n({100 * shares[i]:.0f} %)", fontsize=8)
        axis.set_xlabel("head")
        axis.set_xticks(_some(heads), [str(h + 1) for h in _some(heads)])
        axis.set_yticks(_some(layers), [str(n + 1) for n in _some(layers)] if i == 0 else [])
        if layers * heads <= NUMBERS_UP_TO:
            for (y, x), value in np.ndenumerate(values[:, :, i]):
                colour = "white" if value < 0.6 else "black"
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
    axes[0].set_ylabel("layer")
    figure.suptitle(f"Where {reader} tokens look\n(in brackets: if they looked evenly)", fontsize=8)
    bar = figure.colorbar(image, ax=axes, format=ticker.PercentFormatter(1.0), fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    _save(figure, path)


def on_image(path: Path, pixels: np.ndarray, maps: Mapping[str, np.ndarray], title: str) -> None:
    """The picture, then one heat map over its cells per reader.  pixels uint8 [h, w, 3]; maps [rows, cols], mean 1."""
    columns = 2 if len(maps) == 3 else min(3, 1 + len(maps))
    lines = -(-(1 + len(maps)) // columns)
    ratio = float(np.clip(pixels.shape[0] / pixels.shape[1], 0.3, 2.0))
    figure = _figure(0.3 + lines * (WIDTH / columns * 0.78 * ratio + 0.42))
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    axes[0].imshow(pixels)
    axes[0].set_title("the picture", fontsize=7)
    for axis, (name, values) in zip(axes[1:], maps.items(), strict=False):
        axis.imshow(pixels, alpha=0.35, extent=(0, values.shape[1], values.shape[0], 0))
        heat = axis.imshow(values, cmap="inferno", alpha=0.75, extent=(0, values.shape[1], values.shape[0], 0))
        axis.set_title(_short(name, 16), fontsize=7)
        bar = figure.colorbar(heat, ax=axis, fraction=0.06, pad=0.03)
        bar.locator = ticker.MaxNLocator(3)
        bar.ax.tick_params(labelsize=6)
        bar.update_ticks()
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(f"{title}\n(colour: influence, average cell = 1)", fontsize=8)
    _save(figure, path)


def on_words(path: Path, words: Sequence[str], readers: Mapping[str, np.ndarray]) -> None:
    """Bars per word and reader.  readers: values per word, the average piece = 1."""
    shown = list(words[:WORDS_SHOWN])
    figure = _figure(0.95 + len(shown) * (0.12 + 0.1 * len(readers)))
    axis = figure.subplots()
    height = 0.8 / len(readers)
    place = np.arange(len(shown))
    for i, (name, values) in enumerate(readers.items()):
        axis.barh(place + (i - (len(readers) - 1) / 2) * height, values[: len(shown)], height, label=f"by {name}",
                  color=COLOURS[i % len(COLOURS)])  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(place, [_short(word, 18) for word in shown])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlabel("influence (dotted: average word piece = 1)")
    figure.legend(loc="outside upper center", ncols=len(readers), fontsize=7, title="Words read ...", title_fontsize=8)
    _save(figure, path)


def on_sound(path: Path, sound: np.ndarray, seconds: float, readers: Mapping[str, np.ndarray]) -> None:
    """The sound, and under it influence over time.  sound: log-mel [frames, mels] or [samples]; readers: per token."""
    figure = _figure(2.9)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.1))
    if sound.ndim == 2:
        extent = (0, seconds, 0, sound.shape[1])
        top.imshow(sound.astype(np.float32).T, origin="lower", aspect="auto", cmap="magma", extent=extent)
        top.set_ylabel("mel band")
    else:
        top.plot(np.linspace(0, seconds, len(sound)), sound, linewidth=0.4, color=COLOURS[-1])
        top.set_ylabel("pressure")
    top.set_title("Sound read ...", fontsize=8)
    for i, (name, values) in enumerate(readers.items()):
        edges = np.linspace(0, seconds, len(values) + 1)
        below.stairs(values, edges, baseline=None, label=f"by {name}", color=COLOURS[i % len(COLOURS)], linewidth=1.2)
    below.axhline(1, color="black", linewidth=0.8, linestyle=":")
    below.set_ylabel("influence\n(average = 1)")
    below.set_xlabel("seconds (silence at both ends cut)")
    figure.legend(loc="outside lower center", ncols=len(readers), fontsize=7)
    _save(figure, path)


def losses(path: Path, found: Sequence[WordLoss]) -> None:
    """Loss on hidden words with each subset of the other modalities; whiskers are one standard error over pieces."""
    figure = _figure(0.75 + 0.3 * len(found))
    axis = figure.subplots()
    labels = [" + ".join(("text", *loss.given)) for loss in found]
    means = [loss.mean for loss in found]
    axis.barh(labels, means, xerr=[loss.error for loss in found], color=COLOURS[0], error_kw={"linewidth": 0.8})
    axis.invert_yaxis()
    axis.set_xlabel("nats per hidden word piece (less is better)")
    axis.set_title("Reading hidden words", fontsize=9)
    _save(figure, path)


def ranks(path: Path, found: Sequence[Search]) -> None:
    """Rank of the right one, logarithmic, by what is searched with."""
    figure = _figure(0.85 + 0.3 * len(found))
    axis = figure.subplots()
    targets = list(dict.fromkeys(search.target for search in found))
    labels = [f"{search.target} by {' + '.join(search.given)}" for search in found]
    most = max(search.choices for search in found)
    colours = [COLOURS[targets.index(search.target) % len(COLOURS)] for search in found]
    axis.barh(labels, [search.rank for search in found], left=0.8, color=colours)
    for y, search in enumerate(found):
        axis.text((search.rank + 0.8) * 1.08, y, str(search.rank), va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(0.8, most * 2.2)
    axis.xaxis.set_major_locator(ticker.LogLocator(base=10))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.invert_yaxis()
    axis.set_xlabel(f"rank (1 is best; of up to {most})")
    axis.set_title("Finding the sample's own", fontsize=9)
    _save(figure, path)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, nothing left open
    return figure


def _save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.tick_params(labelsize=7)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    installed = set(font_manager.get_font_names())  # of each other one matplotlib would say that it is not there
    for text in figure.findobj(Text):
        text.set_family(["DejaVu Sans", *(name for name in FONTS if name in installed)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")  # a box says it, in its place
        figure.savefig(path)


def _some(count: int) -> list[int]:
    """At most seven of the numbers below count, evenly."""
    return list(range(0, count, -(-count // 7)))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
