"""A procedural text + image + audio set, shipped as code: coloured shapes, captions, and melodies that spell them.

Every modality encodes the same four attributes (count, size, colour, shape), at a length or size that varies from
sample to sample, so that packing and alignment can be tested without a download and with exact ground truth. Numbers
measured on it must be labelled synthetic. Sample i depends only on (seed, i).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmmodel import atomic
from mmmodel.configs import ConfigError
from mmmodel.data.concepts import split_of
from mmmodel.data.media import SAMPLE_RATE, encode_flac, encode_png
from mmmodel.data.shards import write_index, write_shard

LANGUAGE = "xx"  # no language
DROP = 0.15  # share of training samples that lack a given modality
SAMPLES_PER_SHARD = 500

COUNTS = {"one": 1, "two": 2, "three": 3}
SIZES = {"small": 0.45, "medium": 0.7, "large": 0.95}  # of the room each shape has
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 180),
    "orange": (255, 127, 14),
    "black": (20, 20, 20),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "crescent")
TEMPLATES = (
    "{phrase}",
    "a picture of {phrase}",
    "here {is_are} {phrase}",
    "{phrase} on {ground}",
    "you can see {phrase}",
)
GROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 190), "beige": (238, 226, 200)}


def prepare(out: Path | str, *, samples: int, seed: int) -> Path:
    """Write `samples` samples as shards per split under `out`; returns `out`.  Existing shards there are replaced."""
    out = Path(out)
    for name, number, least in (("samples", samples, 1), ("seed", seed, 0)):
        if number < least:
            raise ConfigError(f"synthetic: {name} is {number}, expected at least {least}")
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").exists():
        raise FileExistsError(f"synthetic: {out} holds something else; give a new or an empty folder with --out")
    with atomic.replacing(out.resolve()) as work:  # a link stays, and what it leads to is replaced
        work.mkdir()
        _write(work, samples, seed)
    return out


def _write(work: Path, samples: int, seed: int) -> None:
    by_split: dict[str, list[dict[str, Any]]] = {}
    entries, written = [], dict.fromkeys(("train", "validation", "test"), 0)

    def flush(split: str) -> None:
        path = work / f"synthetic-{split}-{written[split] // SAMPLES_PER_SHARD:05d}.tar"
        entries.extend(write_shard(path, by_split[split]))
        written[split] += len(by_split.pop(split))

    for index in range(samples):
        sample = make_sample(seed, index)
        split = sample["json"]["split"]
        by_split.setdefault(split, []).append(sample)
        if len(by_split[split]) == SAMPLES_PER_SHARD:
            flush(split)
    for split in sorted(by_split):
        flush(split)
    write_index(work, entries)
    manifest = {"data": "synthetic", "samples": samples, "seed": seed, "splits": written}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def make_sample(seed: int, index: int) -> dict[str, Any]:
    """Members of one sample. Its concept, and so its split, is the combination of its attributes."""
    rng = np.random.default_rng([seed, index])
    count, size, colour, shape = (str(rng.choice(list(values))) for values in (COUNTS, SIZES, COLOURS, SHAPES))
    ground = str(rng.choice(list(GROUNDS)))
    concept = describe(count, size, colour, shape)
    split = split_of(concept)
    picture = draw(rng, count, size, colour, shape, ground)
    melody = sing(rng, count, size, colour, shape)
    name = f"synthetic-{index:07d}"
    meta = {"lang": LANGUAGE, "concept": concept, "category": shape, "split": split, "image": name, "data": "synthetic"}
    members = {"txt": caption(rng, concept, ground, count), "png": encode_png(picture), "flac": encode_flac(melody)}
    if split == "train":  # held-out samples are complete, so that every retrieval task can be scored on them
        kept = [extension for extension in members if rng.random() >= DROP]
        members = {extension: members[extension] for extension in kept or members}
    if "png" in members:
        meta["image_size"] = [picture.height, picture.width]
    if "flac" in members:
        meta["audio_samples"] = len(melody)
    return {"__key__": name, **members, "json": meta}


def describe(count: str, size: str, colour: str, shape: str) -> str:
    if count == "one":
        return f"a {size} {colour} {shape}"
    return f"{count} {size} {colour} {'crosses' if shape == 'cross' else f'{shape}s'}"


def caption(rng: np.random.Generator, phrase: str, ground: str, count: str) -> str:
    template = str(rng.choice(TEMPLATES))
    text = template.format(phrase=phrase, ground=ground, is_are="is" if count == "one" else "are")
    return text[0].upper() + text[1:] + "."


def draw(rng: np.random.Generator, count: str, size: str, colour: str, shape: str, ground: str) -> Image.Image:
    """The shapes side by side, or one above the other in a tall picture; 32 to 160 pixels a side."""
    width, height = (int(side) for side in rng.integers(32, 161, size=2))
    number, tall = COUNTS[count], height > width
    scale = 2  # draw larger and shrink: smooth edges
    image = Image.new("RGB", (width * scale, height * scale), GROUNDS[ground])
    pen = ImageDraw.Draw(image)
    room_x, room_y = (width, height / number) if tall else (width / number, height)
    radius = min(room_x, room_y) / 2 * SIZES[size]
    for slot in range(number):
        free_x, free_y = room_x / 2 - radius, room_y / 2 - radius
        x = room_x * (0 if tall else slot) + room_x / 2 + rng.uniform(-free_x, free_x)
        y = room_y * (slot if tall else 0) + room_y / 2 + rng.uniform(-free_y, free_y)
        _draw_shape(pen, shape, x * scale, y * scale, radius * scale, COLOURS[colour], GROUNDS[ground])
    return image.resize((width, height), Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple, ground: tuple) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape in ("circle", "ring", "crescent"):
        pen.ellipse(box, fill=fill)
        if shape == "ring":
            pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=ground)
        elif shape == "crescent":
            pen.ellipse((x - r / 2, y - r, x + r * 1.5, y + r), fill=ground)
    elif shape == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    else:
        corners = {"square": 4, "diamond": 4, "triangle": 3, "star": 10}[shape]
        turn = math.pi / 4 if shape == "square" else -math.pi / 2
        radii = [r * (0.45 if shape == "star" and corner % 2 else 1.0) for corner in range(corners)]
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        points = [(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles, strict=True)]
        pen.polygon(points, fill=fill)


def sing(rng: np.random.Generator, count: str, size: str, colour: str, shape: str) -> np.ndarray:
    """float32 [samples]: one figure per object; colour is pitch, shape the contour, size the octave; tempo is free."""
    pitch = 220.0 * 2 ** (list(COLOURS).index(colour) / len(COLOURS))
    pitch *= {"small": 4.0, "medium": 2.0, "large": 1.0}[size]  # small things squeak
    seconds = rng.uniform(0.2, 0.6)
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    u = t / seconds  # 0 to 1 over a figure
    bend = {
        "circle": lambda: 0 * u,
        "square": lambda: 0.5 * (u > 0.5),
        "triangle": lambda: 0.5 * u,
        "diamond": lambda: 0.5 * (1 - np.abs(2 * u - 1)),
        "star": lambda: 0.5 * ((5 * u) % 1),
        "cross": lambda: 0.25 * np.sign(np.sin(8 * np.pi * u)),
        "ring": lambda: 0.1 * np.sin(2 * np.pi * 8 * t),
        "crescent": lambda: -0.5 * u,
    }[shape]()  # octaves
    phase = 2 * np.pi * np.cumsum(pitch * 2**bend) / SAMPLE_RATE
    figure = (np.sin(phase) + 0.3 * np.sin(2 * phase)) * np.minimum(1, 20 * np.minimum(u, 1 - u))
    pause = np.zeros(int(rng.uniform(0.05, 0.2) * SAMPLE_RATE))
    parts = [pause] + [part for _ in range(COUNTS[count]) for part in (figure, pause)]
    melody = np.concatenate(parts) * rng.uniform(0.2, 0.6)
    return (melody + rng.normal(0, 0.003, len(melody))).astype(np.float32)
