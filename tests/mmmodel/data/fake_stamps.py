"""A tiny tree with the shape and the traps of tuxpaint-stamps-default, made from nothing."""

import numpy as np
import soundfile
from PIL import Image

SVG = '<svg xmlns="http://www.w3.org/2000/svg" {size}><rect x="4" y="4" width="20" height="10" fill="red"/></svg>'


def make_tree(root):
    """Stamps: animals/owl (RGBA, speech), animals/owl_grey (grey + alpha, same French caption), food/pear (SVG sized in
    pt), food/plum (SVG without any size), symbols/big (1,200 x 800 palette), symbols/a.b (a dot in its name).
    """
    tree = root / "usr/share/tuxpaint/stamps"
    for folder in ("animals/birds", "food", "symbols"):
        (tree / folder).mkdir(parents=True)
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[5:15, 5:25] = (255, 0, 0, 255)  # around it transparent black, which must become white
    Image.fromarray(rgba, "RGBA").save(tree / "animals/birds/owl.png")
    (tree / "animals/birds/owl.svg").write_text("not drawn: the PNG goes first")
    Image.fromarray(rgba, "RGBA").save(tree / "animals/birds/owl_mirror.png")  # a variant, without text
    Image.fromarray(rgba[..., [0, 3]], "LA").save(tree / "animals/birds/owl_grey.png")
    (tree / "food/pear.svg").write_text(SVG.format(size='width="30pt" height="15pt"'))
    (tree / "food/plum.svg").write_text(SVG.format(size=""))
    big = Image.fromarray(np.full((800, 1200), 3, np.uint8)).convert("P")
    big.save(tree / "symbols/big.png")
    Image.new("RGB", (8, 9), "blue").save(tree / "symbols/a.b.png")

    texts = {
        "animals/birds/owl": "An owl.\nfr.utf8=Un hibou.\nes.utf8=Un búho.\n",
        "animals/birds/owl_grey": "A grey owl.\nfr.utf8=un hibou.\n",
        "food/pear": "A pear.\nfr.utf8=Une poire.\nda.utf8=En pære.\npt_BR.utf8=Uma pera.\n",
        "food/plum": "A plum.\n",
        "symbols/big": "Big.\n",
        "symbols/a.b": "A, b.\nfr.utf8=A, b.\n",
        "food/gift": "A gift without an image.\n",
    }
    for stem, text in texts.items():
        (tree / f"{stem}.txt").write_text(text, encoding="utf-8")

    speak(tree / "animals/birds/owl_desc.ogg", 44_100, 2, 0.5)
    speak(tree / "animals/birds/owl_desc_fr.ogg", 44_100, 1, 0.8)
    speak(tree / "animals/birds/owl_desc_ru.ogg", 8_000, 1, 0.4)  # no Russian caption: speech and image alone
    speak(tree / "animals/birds/owl.ogg", 44_100, 2, 0.3)  # the sound of an owl, no description
    speak(tree / "animals/birds/owl_fr.ogg", 44_100, 2, 0.3)  # a localised sound, no description
    speak(tree / "food/pear_desc_da.ogg.ogg", 22_050, 2, 0.6)
    speak(tree / "food/pear_desc_pt_BR.wav", 11_025, 1, 0.6)
    speak(tree / "food/gift_desc_fr.ogg", 44_100, 2, 0.3)  # an orphan
    (tree / "symbols/big_desc_fr.ogg").write_bytes(b"OggS but broken")
    return tree


def speak(path, rate, channels, seconds):
    """A 440 Hz tone, in Vorbis or WAV after the name."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    kind = {"format": "OGG", "subtype": "VORBIS"} if path.suffix == ".ogg" else {"format": "WAV"}
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate, **kind)
