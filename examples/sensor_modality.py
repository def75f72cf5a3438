"""A fourth modality in one file: a car's motion sensor, aligned with what is said and seen at the same moment.

    python examples/sensor_modality.py [FOLDER]

A front end is a module with the methods that mmmodel/frontends/__init__.py lists, and one line that registers it.  All
else then works as for text.  The drives are generated.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmmodel import configs, evaluate, frontends, pretraining, train
from mmmodel.data import shards
from mmmodel.export import from_pretrained

RATE = 4  # readings of turn rate and acceleration in a token, 10 a second
TURNS = {"straight on": 0.0, "a left turn": 1.0, "a right turn": -1.0, "a sharp left turn": 2.5, "a sharp right": -2.5}
SPEEDS = {"accelerating": 1.0, "braking": -1.5, "at constant speed": 0.0}


class MotionFrontEnd(nn.Module):
    members, special, recipe, positions = ("npy",), "[MOT]", "motion 1", (17,)  # 16 tokens after the special one

    def __init__(self, config, tokenizer):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2 * RATE, 32), nn.GELU(), nn.Linear(32, config.width))

    def prepare(self, readings):  # float [n, 2] -> float32 [tokens, 2 RATE]
        tokens = min(len(readings) // RATE, 16)
        return readings[: tokens * RATE].reshape(tokens, 2 * RATE).astype(np.float32)

    decode = staticmethod(lambda data: np.load(io.BytesIO(data), allow_pickle=False))
    shape = computed_rows = staticmethod(len)  # rows of a segment, of a batch
    augment = staticmethod(lambda features, rng: features)

    def collate(self, features):
        return (torch.from_numpy(np.concatenate([*features, np.zeros((0, 2 * RATE), np.float32)])),)

    def forward(self, readings):
        return self.embed(readings)


frontends.FRONT_ENDS["motion"] = MotionFrontEnd  # the one line


def drive(i, rng):
    """One sample: a caption, and readings of 3 to 6 seconds that fit it."""
    (turn, rate), (speed, push) = (list(table.items())[rng.integers(len(table))] for table in (TURNS, SPEEDS))
    time = np.linspace(0, np.pi, rng.integers(30, 61))
    readings = np.stack([rate * np.sin(time), np.full_like(time, push)], axis=1) + rng.normal(0, 0.3, (len(time), 2))
    np.save(file := io.BytesIO(), readings)
    meta = {"concept": f"{turn}, {speed}", "split": "test" if i % 8 == 0 else "train"}
    return {"__key__": f"{i:06d}", "txt": f"The car makes {turn}, {speed}.", "npy": file.getvalue(), "json": meta}


def main(folder):
    (data := folder / "drives").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shards.write_index(data, shards.write_shard(data / "drives-0.tar", [drive(i, rng) for i in range(400)]))
    fields = ("model.modalities=text,motion", "objectives.matching.pairs=motion-text", f"data={data}")
    config = configs.override(configs.quick(), (*fields, "steps=60"))
    train.pretrain(config, folder / "run")
    learner = from_pretrained(folder / "run")
    corpus = pretraining.load_corpus(config, pretraining.open_data(config), learner.model)
    items = corpus.split("test")
    ranks = evaluate.ranks(evaluate.embed(learner, corpus, items), items, {"task": ("motion", "text")})["task", ""]
    found, chance = (ranks.before_hit < 1).mean(), ranks.chance["r1"]
    print(f"motion to text, drives never seen: R@1 {found:.0%}, chance {chance:.0%}")
    assert found > 3 * chance


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
