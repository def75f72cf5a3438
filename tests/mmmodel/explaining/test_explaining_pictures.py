"""Words in letters that matplotlib's own font lacks."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder  # matplotlib needs it too
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from mmmodel.explaining import pictures

WORD = "\u6d77"  # sea


@pytest.fixture
def font(tmp_path):
    """A font of that one letter, a square, by a name that we look for."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "sea"])
    builder.setupCharacterMap({ord(WORD): "sea"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "sea": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "sea": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": pictures.FONTS[-1], "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "sea.ttf")
    listed = list(font_manager.fontManager.ttflist)
    yield lambda: font_manager.fontManager.addfont(tmp_path / "sea.ttf")
    font_manager.fontManager.ttflist[:] = listed


def test_a_font_that_has_the_letters_is_used_and_without_one_nothing_is_said(font, tmp_path, monkeypatch, caplog):
    drawn = []
    monkeypatch.setattr(pictures, "FONTS", pictures.FONTS[-1:])  # whatever this machine has
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for install in (lambda: None, font):
            install()
            pictures.on_words(tmp_path / "words.png", [WORD], {"image": np.ones(1)})
            drawn.append(np.asarray(Image.open(tmp_path / "words.png").convert("L")))
    assert not caplog.messages
    black = [(pixels < 60).sum() for pixels in drawn]
    assert black[1] > black[0] + 200  # a full square in the place of an empty box
