"""Labelled samples, shared by the tests of fine-tuning and of what comes after it."""

import numpy as np
import pytest

from mmmodel.data.shards import write_index, write_shard


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Captions from which each task's label can be read; 96 samples without pictures, so that epochs take no time."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    made = []
    for i in range(96):
        colour, count = str(rng.choice(["red", "blue", "pink"])), int(rng.integers(1, 4))
        meta = {
            "split": "train" if i < 64 else "validation" if i < 80 else "test",
            "colour": colour,
            "names": [colour, f"n{count}"],
            "size": float(count),
            "about": f"which colour? {colour}",
            "concept": f"{count} {colour}",
        }
        made.append({"__key__": f"s{i:03d}", "txt": " ".join([colour] * count), "json": meta})
    write_index(folder, write_shard(folder / "labelled-00000.tar", made))
    return folder
