"""Search pictures by words or by voice, over the vectors that `mmmodel embed` wrote.

python -m mmmodel embed --from runs/demo --split test --out vectors.parquet
python examples/search.py --from runs/demo --vectors vectors.parquet --text "un chat"
python examples/search.py --from runs/demo --vectors vectors.parquet --speech question.wav
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from pyarrow import parquet

from mmmodel.embed import Embedder, embed_one


@dataclass(frozen=True)
class Search:
    """Print the pictures that are nearest to a text or a recording."""

    run_folder: Annotated[Path, tyro.conf.arg(name="from")]
    """The run that made the vectors."""
    vectors: Path
    """What `mmmodel embed` wrote."""
    text: str = ""
    """Words to search for."""
    speech: Path | None = None
    """A recording to search for: WAV, FLAC or OGG."""
    top: int = 5
    """Pictures to print."""


def main(args: list[str] | None = None) -> list[tuple[str, float]]:
    """(key, cosine) of the best pictures, best first; also printed."""
    search = tyro.cli(Search, args=args)
    if bool(search.text) == bool(search.speech):
        raise SystemExit("search: give either --text or --speech")
    embedder = Embedder(search.run_folder)
    query = embed_one(embedder, text=search.text) if search.text else embed_one(embedder, audio=search.speech)
    keys, points = pictures(search.vectors)
    scores = points @ query  # both have unit length
    best = [(keys[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[: search.top]]
    for key, score in best:
        print(f"{score:.3f}  {key}")
    return best


def pictures(path: Path) -> tuple[list[str], np.ndarray]:
    """Keys and points [n, P]; a picture that stands in the data in many languages comes once."""
    table = parquet.read_table(path, filters=[("modality", "==", "image")])
    keys, points = table["key"].to_pylist(), np.stack(table["vector"].to_numpy())
    _, first = np.unique(points, axis=0, return_index=True)
    first.sort()
    return [keys[i] for i in first], points[first]


if __name__ == "__main__":
    main()
