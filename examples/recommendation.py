"""Recommend by embeddings: from captions that a user liked to pictures that they have not seen.

    python examples/recommendation.py [folder]

Items are the synthetic set of coloured shapes; each user has a favourite colour, which nobody tells the system.  A
shared encoder is pretrained on items without labels; then an item is a point, a user is the mean of the points that
they liked, and the nearest pictures are recommended.  Captions and pictures lie in one space, so a user who only ever
liked texts gets pictures, and an item can be recommended the moment it appears, with no clicks on it.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from mmmodel.configs import ImageConfig, ModelConfig, PretrainConfig, TextConfig
from mmmodel.data import synthetic
from mmmodel.data.loader import ShardDataset
from mmmodel.embed import Embedder
from mmmodel.train import pretrain

LIKED, RECOMMENDED, USERS = 3, 5, 200


def main(folder: Path) -> None:
    items = synthetic.prepare(folder / "items", samples=700, seed=0)
    model = ModelConfig(
        modalities=("text", "image"),
        width=48,
        layers=2,
        heads=2,
        mlp_width=96,
        embed_width=32,
        text=TextConfig(vocab_size=384, max_tokens=32),
        image=ImageConfig(max_tokens=9, channels=(16, 32)),
    )
    pretrain(PretrainConfig(model=model, data=str(items), steps=90, batch_size=32, lr=3e-3), folder / "run")

    # The catalogue: items of combinations that pretraining never saw.
    embedder = Embedder(folder / "run")
    catalogue, features = embedder.prepare(ShardDataset(items, split="test"))
    points = embedder.vectors(catalogue, features)  # per modality [items, P], of unit length
    colours = np.array([colour_of(item.concept) for item in catalogue])

    rng = np.random.default_rng(0)
    hits, chances = [], []
    for _ in range(USERS):
        favourite = rng.choice(np.unique(colours))
        liked = rng.permutation(np.flatnonzero(colours == favourite))[:LIKED]
        unseen = np.setdiff1d(np.arange(len(catalogue)), liked)
        user = points["text"][liked].mean(axis=0)  # from captions ...
        best = unseen[np.argsort(-points["image"][unseen] @ user)[:RECOMMENDED]]  # ... to pictures
        hits.append((colours[best] == favourite).mean())
        chances.append((colours[unseen] == favourite).mean())
    hit, chance = float(np.mean(hits)), float(np.mean(chances))
    print(f"{len(catalogue)} new items; {USERS} users who liked {LIKED} captions each")
    print(f"of {RECOMMENDED} recommended pictures {100 * hit:.0f} % suit them, by chance {100 * chance:.0f} %")
    assert hit > 2 * chance, "recommendations must be far better than chance"


def colour_of(concept: str) -> str:
    """The taste that decides: never shown to the model."""
    return next(word for word in concept.split() if word in synthetic.COLOURS)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
