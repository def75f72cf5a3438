"""`python -m mmkernels.masks`: draws the mask that was asked for, and mistakes get a line that names them."""

import subprocess
import sys

import numpy as np
import pytest
from file_map import ROOT

from mmkernels import mask_drawing
from mmkernels.layout import PackedLayout
from mmkernels.mask_command import main
from mmkernels.masks import AttentionMask, MaskPlan
from mmkernels.testing import random_layout, reference_mask

MASKS = [
    AttentionMask(),
    AttentionMask(causal=True, bidirectional=(1,)),
    AttentionMask(causal=True, window=(3, -1), visible=((True, False, True), (False, True, False), (False,) * 3)),
]


@pytest.mark.parametrize("mask", MASKS, ids=("documents", "bidirectional", "blind modality"))
def test_seen_pairs_are_the_definition(mask):
    for seed in range(5):
        layout = random_layout(seed, max_length=9)
        seen = mask_drawing.seen_pairs(MaskPlan.lower(layout, mask))
        assert np.array_equal(seen, reference_mask(layout, mask).numpy())


@pytest.mark.parametrize("schedule", ["sample", "token"])
@pytest.mark.parametrize("mask", MASKS, ids=("documents", "bidirectional", "blind modality"))
def test_tile_classes(mask, schedule):
    """Blocks cover what a schedule may read exactly once; an empty one holds no visible pair, a full one no other."""
    layout = random_layout(3, max_length=12)
    plan = MaskPlan.lower(layout, mask)
    seen = mask_drawing.seen_pairs(plan)
    covered = np.zeros(seen.shape, int)
    kinds = set()
    for block in mask_drawing.tile_blocks(plan, 4, 8, schedule):
        inside = seen[block.top : block.bottom, block.left : block.right]
        covered[block.top : block.bottom, block.left : block.right] += 1
        kinds.add(block.kind)
        assert (block.kind == "empty") == (not inside.any())
        assert block.kind != "full" or inside.all()  # partial too, where all are seen but the sample's end cuts it
    assert (covered[seen] == 1).all()
    assert covered.max() == 1
    assert "partial" in kinds


def test_command_line_draws_text():
    """In a process of its own, as users run it: no warning of the module having been imported already."""
    command = ["-m", "mmkernels.masks", "--segments", "0:2,1:3;0:1", "--causal", "--bidirectional", "1"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "6 queries x 6 keys, 19 pairs visible (52.8 %); 0 queries see nothing"
    assert [line.split("  ", 1)[1] for line in lines if line.startswith(("modality 0", "modality 1"))] == [
        "#....  .",
        "##...  .",
        *["#####  ."] * 3,
        ".....  #",
    ]


def drawn(capsys, *arguments):
    assert main(["--segments", "0:2,1:2;0:2", *arguments]) == 0
    return [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("modality ")]


def test_every_option_reaches_the_mask(capsys):
    assert drawn(capsys)[0] == "####  .."
    assert drawn(capsys, "--causal", "--prefix", "3,0")[0] == "###.  .."
    assert drawn(capsys, "--window", "1,0")[2] == ".##.  .."
    assert drawn(capsys, "--window", "-1,0")[2] == drawn(capsys, "--window=-1,0")[2] == "###.  .."
    assert drawn(capsys, "--isolated")[:3] == ["##..  ..", "##..  ..", "..##  .."]
    assert drawn(capsys, "--visible", "0>1")[:3] == ["..##  ..", "..##  ..", "####  .."]  # 1 is not named: sees all
    assert drawn(capsys, "--visible", "0>")[0] == "....  .."
    assert drawn(capsys, "--k-segments", "0:2,2:0;2:2", "--visible", "0>2")[:3] == ["..  ..", "..  ..", "##  .."]
    scopes = ("--causal", "--bidirectional", "1", "--window", "0,-1", "--window-scope")
    assert drawn(capsys, *scopes, "all")[3] == "...#  .."
    assert drawn(capsys, *scopes, "causal")[3] == "..##  .."
    cross = ("--k-segments", "0:5;1:1", "--causal", "--align")
    assert drawn(capsys, *cross, "bottom_right") == [
        "##...  .",
        "###..  .",
        "####.  .",
        "#####  .",
        ".....  .",
        ".....  #",
    ]
    assert drawn(capsys, *cross, "top_left")[:2] == ["#....  .", "##...  ."]


def test_lengths_may_be_grids(capsys):
    assert main(["--segments", "0:1,1:2x3;1:2x1x2", "--k-segments", "0:2;1:3"]) == 0
    assert capsys.readouterr().out.startswith("11 queries x 5 keys")


def test_tiles_are_counted(capsys):
    assert main(["--segments", "0:8;0:3", "--causal", "--tiles", "4x4"]) == 0
    assert "tiles: 1 empty, 3 partial, 1 full" in capsys.readouterr().out
    assert main(["--segments", "0:8;0:3", "--causal", "--tiles", "4x4", "--schedule", "token"]) == 0
    assert "tiles: 5 empty, 3 partial, 1 full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segments", "0:2,nonsense"], "--segments is '0:2,nonsense'"),
        (["--segments", "0:2x"], "--segments is '0:2x', expected modality:length as in"),
        (["--segments", "0:1x2x3x4"], "sample 0 has length (1, 2, 3, 4), expected n >= 0, (rows, cols) or"),
        (["--segments", "0:2", "--visible", "0"], "--visible is '0'"),
        (["--segments", "0:2,1:2", "--visible", "0>0;0>1"], "--visible is '0>0;0>1', expected query>keys as in"),
        (["--segments", "0:2,1:2", "--visible", "0>5"], "--visible names modality 5, expected 0 to 1, as the segments"),
        (["--segments", "0:2", "--visible", "0>-1"], "--visible names modality -1, expected 0 to 0"),
        (["--segments", "0:2", "--isolated", "--visible", "0>0"], "exclude one another"),
        (["--segments", "0:2", "--window", "a,b"], "--window is 'a,b'"),
        (["--segments", "0:2", "--tiles", "64"], "--tiles is '64'"),
        (["--segments", "0:2", "--prefix", "1"], "causal=True"),  # the mask's own refusals come through
        (["--segments", "0:2", "--k-segments", "0:2;0:3"], "samples"),
        (["--segments", "0:2,1:2", "--names", "text"], "--names has 1"),
        (["--segments", "0:200"], "as text at most"),
        (["--segments", "0:5000", "--out", "x.png"], "5000 queries, expected at most"),
        (["--segments", "", "--out", "x.png"], "nothing to draw"),
        (["--segments", "0:2", "--out", "x.png", "--dpi", "1000000"], "--dpi is 1000000, expected 1 to 1200"),
        (["--segments", "0:2", "--schedule", "token"], "--schedule is token, expected --tiles with it"),
        (["--segments", "0:2", "--dpi", "90"], "--dpi is 90, expected --out with it"),
        (["--segments", "0:2", "--out", "no/such/folder.png"], "--out no/such/folder.png: No such file"),
        (["--segments", "0:2", "--out", "mask"], "--out is mask, expected a name in .png, .svg, .pdf"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--segments", "0:2", "--out", str(tmp_path / "mask.png")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err
    assert main(["--segments", "0:2"]) == 0


def test_picture_shows_the_mask(tmp_path, capsys):
    """The pixel in the middle of each cell has the color of the key's modality where the pair is seen, else not."""
    colors = pytest.importorskip("matplotlib.colors")
    layout = PackedLayout.from_segments([[(0, 3), (1, 4)], [(0, 2)]], num_modalities=2)
    plan = MaskPlan.lower(layout, AttentionMask(causal=True))
    pixels = mask_drawing._pixels(plan, mask_drawing.seen_pairs(plan))
    palette = [colors.to_rgb(mask_drawing.COLORS[m]) for m in range(2)]
    seen = reference_mask(layout, plan.mask).numpy()
    for query, key in np.ndindex(seen.shape):
        is_key_color = tuple(pixels[query, key]) == palette[layout.modality_ids[key]]
        assert is_key_color == seen[query, key]
    path = tmp_path / "mask.png"
    assert main(["--segments", "0:3,1:4;0:2", "--causal", "--tiles", "4x4", "--out", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "wrote" in capsys.readouterr().out


def test_every_picture_of_the_docs_is_there():
    """The files are what `make pictures` draws, by name; their bytes depend on matplotlib's version."""
    pytest.importorskip("matplotlib")
    from docs import mask_pictures

    names = {f"mask-{name}.png" for name in mask_pictures.PICTURES}
    assert names == {path.name for path in (ROOT / "docs" / "images").glob("mask-*.png")}
