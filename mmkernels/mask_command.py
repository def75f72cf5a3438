"""`python -m mmkernels.masks`: its options, as the plan of a mask that is then drawn.   M modalities.

    python -m mmkernels.masks --segments "0:5,1:12;0:3" --causal --bidirectional 1 --out mask.png

Without --out the drawing is text.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mmkernels.layout import PackedLayout
from mmkernels.mask_drawing import describe, figure, text, tile_blocks
from mmkernels.masks import ALIGN, SCHEDULES, AttentionMask, MaskPlan

PICTURES = (".png", ".svg", ".pdf")
DPI, MAX_DPI = 120, 1200  # the most: a picture of 400 MB while it is drawn


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        for name, of in (("schedule", "tiles"), ("dpi", "out")):
            if getattr(options, name) is not None and getattr(options, of) is None:
                raise ValueError(f"mask drawing: --{name} is {getattr(options, name)}, expected --{of} with it")
        plan = _plan(options)
        names = _names(options.names, plan)
        schedule = options.schedule or "sample"
        blocks = [] if options.tiles is None else tile_blocks(plan, *_tile_shape(options.tiles), schedule)
        print(describe(plan, blocks))
        if options.out is None:
            print(text(plan, names))
        else:
            if options.out.suffix.lower() not in PICTURES:  # matplotlib would add one, to another name than we print
                raise ValueError(f"mask drawing: --out is {options.out}, expected a name in {', '.join(PICTURES)}")
            dpi = DPI if options.dpi is None else options.dpi
            if not 1 <= dpi <= MAX_DPI:
                raise ValueError(f"mask drawing: --dpi is {dpi}, expected 1 to {MAX_DPI}")
            figure(plan, blocks, names=names).savefig(options.out, dpi=dpi)
            print(f"wrote {options.out}")
    except OSError as error:
        print(f"mask drawing: --out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, NotImplementedError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _joined(argv: Sequence[str]) -> list[str]:
    """ "--window -1,0" as "--window=-1,0": argparse takes a value that begins with a sign for an option."""
    joined: list[str] = []
    for word in argv:
        if re.match(r"-\d", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmkernels.masks", description="Draws what a mask lets through")
    parser.add_argument(
        "--segments", required=True, help='samples of modality:length, such as "0:5,1:12;0:3"; 1:3x4 is a grid'
    )
    parser.add_argument("--k-segments", help="samples of the keys, for cross-attention; default: self-attention")
    parser.add_argument("--causal", action="store_true", help="a query sees the keys at or before it")
    parser.add_argument("--window", default="-1,-1", help="left,right in tokens; negative: unlimited (default -1,-1)")
    parser.add_argument("--window-scope", default="all", choices=("all", "causal"), help="what the window limits")
    parser.add_argument("--prefix", help="per sample, tokens that all of it sees, such as 3,0 (with --causal)")
    parser.add_argument("--bidirectional", default="", help="modalities whose segments are seen whole, such as 1,2")
    parser.add_argument("--visible", help='"0>0,1;1>1": what each modality sees; one that is not named sees all')
    parser.add_argument("--isolated", action="store_true", help="each modality sees itself alone")
    parser.add_argument("--align", default="bottom_right", choices=ALIGN, help="cross-attention: where queries stand")
    parser.add_argument("--names", help="of the modalities, such as text,image,audio")
    parser.add_argument("--tiles", help="ROWSxCOLS, such as 64x64: outline the tiles of a forward kernel")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of --tiles; default sample")
    parser.add_argument("--out", type=Path, help=f"picture to write ({', '.join(PICTURES)}); default: draw as text")
    parser.add_argument("--dpi", type=int, help=f"of a .png; default {DPI}")
    return parser


def _plan(options: argparse.Namespace) -> MaskPlan:
    samples = _samples("--segments", options.segments)
    k_samples = None if options.k_segments is None else _samples("--k-segments", options.k_segments)
    visible = None if options.visible is None else _visible_pairs(options.visible)
    M = max((m for side in (samples, k_samples or []) for sample in side for m, _ in sample), default=0) + 1
    for m in (m for query, keys in (visible or {}).items() for m in (query, *keys)):
        if not 0 <= m < M:
            raise ValueError(
                f"mask drawing: --visible names modality {m}, expected 0 to {M - 1}, as the segments have; with {M}:0 "
                "among them there is one more, without tokens"
            )
    if options.isolated and visible is not None:
        raise ValueError("mask drawing: --isolated and --visible exclude one another")
    if options.isolated:
        visible = {m: [m] for m in range(M)}
    mask = AttentionMask(
        causal=options.causal,
        window=_integers("--window", options.window),
        window_scope=options.window_scope,
        prefix=None if options.prefix is None else _integers("--prefix", options.prefix),
        bidirectional=_integers("--bidirectional", options.bidirectional),
        visible=None if visible is None else [[k in visible.get(q, range(M)) for k in range(M)] for q in range(M)],
        align=options.align,
    )
    layout = PackedLayout.from_segments(samples, num_modalities=M)
    keys = None if k_samples is None else PackedLayout.from_segments(k_samples, num_modalities=M)
    return MaskPlan.lower(layout, mask, keys)


def _samples(option: str, value: str) -> list[list[tuple[int, tuple[int, ...]]]]:
    """ "0:5,1:3x4;0:3" as [[(0, (5,)), (1, (3, 4))], [(0, (3,))]]; a sample may be empty."""
    try:
        return [
            [
                (int(m), tuple(int(n) for n in length.split("x")))
                for m, length in (part.split(":") for part in sample.split(",") if part.strip())
            ]
            for sample in value.split(";")
        ]
    except ValueError:
        raise ValueError(
            f'mask drawing: {option} is {value!r}, expected modality:length as in "0:5,1:3x4;0:3"'
        ) from None


def _visible_pairs(value: str) -> dict[int, list[int]]:
    rules = [rule.split(">") for rule in value.split(";")]
    try:
        seen = {int(query): [int(k) for k in keys.split(",") if k.strip()] for query, keys in rules}
    except ValueError:
        seen = {}
    if len(seen) < len(rules):
        raise ValueError(
            f'mask drawing: --visible is {value!r}, expected query>keys as in "0>0,1;1>1", each query once'
        )
    return seen


def _integers(option: str, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"mask drawing: {option} is {value!r}, expected integers with commas between") from None


def _tile_shape(value: str) -> tuple[int, int]:
    rows, _, cols = value.partition("x")
    if not (rows.isdigit() and cols.isdigit() and int(rows) and int(cols)):
        raise ValueError(f"mask drawing: --tiles is {value!r}, expected ROWSxCOLS such as 64x64")
    return int(rows), int(cols)


def _names(value: str | None, plan: MaskPlan) -> list[str]:
    M = plan.layout.num_modalities
    names = value.split(",") if value else [f"modality {m}" for m in range(M)]
    if len(names) < M:
        raise ValueError(f"mask drawing: --names has {len(names)} names, expected one per modality: {M}")
    return names
