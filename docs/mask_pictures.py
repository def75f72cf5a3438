"""Draws docs/images/mask-*.png, one per kind of mask: `make pictures`, or python -m docs.mask_pictures [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

from mmkernels import mask_drawing
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan

NAMES = ("text", "image", "audio")
TEXT, IMAGE, AUDIO = range(3)
LAYOUT = PackedLayout.from_segments(
    [[(TEXT, 4), (IMAGE, 8), (TEXT, 4), (AUDIO, 4)], [(TEXT, 3), (AUDIO, 7)]], num_modalities=3
)
# Text queries over the features of another encoder: more keys than queries in one sample, fewer in the other.
QUERIES = PackedLayout.from_segments([[(TEXT, 8)], [(TEXT, 10)]], num_modalities=3)
KEYS = PackedLayout.from_segments([[(IMAGE, 9), (AUDIO, 5)], [(AUDIO, 6)]], num_modalities=3)

# name: (title, mask, key layout, tile shape)
PICTURES = {
    "documents": ("documents: no mask", AttentionMask(), None, None),
    "causal": ("causal=True", AttentionMask(causal=True), None, None),
    "window": ("window=(3, 1)", AttentionMask(window=(3, 1)), None, None),
    "window-all": (
        'bidirectional=(image,), window=(3, -1), scope "all"',
        AttentionMask(causal=True, bidirectional=(IMAGE,), window=(3, -1)),
        None,
        None,
    ),
    "window-causal": (
        'bidirectional=(image,), window=(3, -1), scope "causal"',
        AttentionMask(causal=True, bidirectional=(IMAGE,), window=(3, -1), window_scope="causal"),
        None,
        None,
    ),
    "prefix": ("causal=True, prefix=(7, 3)", AttentionMask(causal=True, prefix=(7, 3)), None, None),
    "bidirectional": (
        "causal=True, bidirectional=(image,)",
        AttentionMask(causal=True, bidirectional=(IMAGE,)),
        None,
        None,
    ),
    "isolated": ("AttentionMask.isolated(3)", AttentionMask.isolated(3), None, None),
    "visible": (
        "visible: text sees all, image and audio see themselves",
        AttentionMask(visible=((True, True, True), (False, True, False), (False, False, True))),
        None,
        None,
    ),
    "cross-bottom-right": ('cross, causal=True, align="bottom_right"', AttentionMask(causal=True), KEYS, None),
    "cross-top-left": (
        'cross, causal=True, align="top_left"',
        AttentionMask(causal=True, align="top_left"),
        KEYS,
        None,
    ),
    "tiles": (
        "causal=True, bidirectional=(image,): 4 x 4 tiles",
        AttentionMask(causal=True, bidirectional=(IMAGE,)),
        None,
        (4, 4),
    ),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, mask, keys, tiles) in PICTURES.items():
        plan = MaskPlan.lower(LAYOUT if keys is None else QUERIES, mask, keys)
        blocks = mask_drawing.tile_blocks(plan, *tiles) if tiles else []
        drawing = mask_drawing.figure(plan, blocks, names=NAMES, title=title)
        # No version in the file, so that drawing again changes no bytes but where the drawing changed.
        drawing.savefig(folder / f"mask-{name}.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
