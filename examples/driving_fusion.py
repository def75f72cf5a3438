"""Keep, follow or brake?  Camera, radar and motion sensors in one packed transformer, with sensors that drop out.

    python examples/driving_fusion.py

The kernels alone, without mmmodel: how to bring sensor streams of any length and rate into one sequence.  Scenes are
generated, so that the right action is known:
    brake   something stands ahead (camera), it comes closer (radar), and the car does not turn away (motion)
    follow  the same, but it does not come closer
    keep    all else
No sensor knows the answer alone.  In training each sensor is missing from some scenes: it then has no tokens.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels import PackedLayout, attention
from mmkernels.modules import ModalityEmbedding
from mmkernels.ops.packing.api import segment_mean

CAMERA, RADAR, MOTION = 0, 1, 2
FEATURES = (4, 3, 2)  # of a camera cell, a radar echo (range, speed, angle) and a motion reading (turn rate, thrust)
ACTIONS = ("keep", "follow", "brake")
MISSING = 0.15  # of the training scenes lack a given sensor
STEPS, SCENES = 150, 48  # per step

Scene = tuple[dict[int, np.ndarray], int]  # readings by sensor: camera [rows, cols, 4], others [n, features]; action


class Fusion(nn.Module):
    """Two layers of attention over all readings of a scene, and one linear map of their mean to the actions."""

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.ModuleList(nn.Linear(features, width) for features in FEATURES)
        # e_m = W_m + x, and a position: row and column for the camera, place in time for the others
        self.embedding = ModalityEmbedding(width, len(FEATURES), positions=[(8, 8), 32, 64])
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.action = nn.Linear(width, len(ACTIONS))

    def forward(self, streams: list[Tensor], layout: PackedLayout) -> Tensor:
        """streams: per sensor the readings of all scenes, [N_m, features] -> [scenes, actions]."""
        x = self.embedding([linear(stream) for linear, stream in zip(self.inputs, streams, strict=True)], layout)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(F.layer_norm(x, x.shape[-1:])).view(len(x), 3, self.heads, -1).unbind(1)
            x = x + attention(q, k, v, layout=layout).flatten(1)
            x = x + mlp(x)
        # The mean of each sensor first, or the camera's many cells would drown the rest.
        means, scene = segment_mean(x, layout), torch.from_numpy(layout.segments[:, 0].astype(np.int64))
        return self.action(x.new_zeros(layout.num_samples, x.shape[1]).index_add(0, scene, means))


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Fusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(STEPS):
        scenes = [without(make_scene(rng), *np.flatnonzero(rng.random(3) < MISSING)) for _ in range(SCENES)]
        loss = F.cross_entropy(model(*pack(scenes)), torch.tensor([action for _, action in scenes]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - (step + 1) / STEPS)

    scenes = [make_scene(rng) for _ in range(600)]
    found = {
        "all sensors": accuracy(model, scenes),
        "no camera": accuracy(model, [without(scene, CAMERA) for scene in scenes]),
        "no radar": accuracy(model, [without(scene, RADAR) for scene in scenes]),
        "no motion": accuracy(model, [without(scene, MOTION) for scene in scenes]),
    }
    always = max(np.bincount([action for _, action in scenes])) / len(scenes)
    print(f"accuracy on {len(scenes)} new scenes; the most frequent action alone gives {always:.2f}")
    for name, value in found.items():
        print(f"  {name:<12} {value:.2f}")
    whole = found["all sensors"]
    assert whole > always + 0.3, "all sensors together must be far better than the most frequent action"
    assert all(value < whole - 0.05 for name, value in found.items() if name != "all sensors"), "each sensor must count"
    assert found["no radar"] > always + 0.1, "without radar, the others must still be of use"


@torch.no_grad()
def accuracy(model: Fusion, scenes: list[Scene]) -> float:
    return float((model(*pack(scenes)).argmax(1) == torch.tensor([action for _, action in scenes])).float().mean())


def pack(scenes: list[Scene]) -> tuple[list[Tensor], PackedLayout]:
    """Per sensor one stream with the readings of all scenes, and the layout that says whose they are."""
    segments = [
        [(sensor, values.shape[:2] if sensor == CAMERA else len(values)) for sensor, values in readings.items()]
        for readings, _ in scenes
    ]
    layout = PackedLayout.from_segments(segments, num_modalities=len(FEATURES))
    streams = []
    for sensor, features in enumerate(FEATURES):
        rows = [readings[sensor].reshape(-1, features) for readings, _ in scenes if sensor in readings]
        streams.append(torch.from_numpy(np.concatenate([*rows, np.zeros((0, features), np.float32)])))
    return streams, layout


def without(scene: Scene, *sensors: int) -> Scene:
    """The scene without these sensors; one always stays."""
    readings, action = scene
    kept = {sensor: values for sensor, values in readings.items() if sensor not in sensors}
    return kept or {MOTION: readings[MOTION]}, action


def make_scene(rng: np.random.Generator) -> Scene:
    ahead, closing, turning = rng.random() < 0.7, rng.random() < 0.5, rng.random() < 0.3
    action = 0 if not ahead or turning else 2 if closing else 1

    rows, cols = rng.integers(2, 5), rng.integers(3, 7)
    camera = rng.normal(0, 0.5, (rows, cols, 4))
    if ahead:  # something dark in a middle column, in one row
        camera[rng.integers(rows), cols // 2] += (2.0, -2.0, 1.0, 0.0)

    echoes = rng.integers(5, 20)
    speed = rng.normal(-1.0 if closing else 1.0, 0.7, echoes)  # relative; whatever is in front of the car or beside it
    radar = np.stack([rng.uniform(0, 1, echoes), speed, rng.uniform(-1, 1, echoes)], axis=1)

    readings = rng.integers(10, 40)
    turn = (1.0 if turning else 0.0) * rng.choice([-1, 1]) + rng.normal(0, 0.4, readings)
    motion = np.stack([turn, rng.normal(0, 1, readings)], axis=1)
    return {
        CAMERA: camera.astype(np.float32),
        RADAR: radar.astype(np.float32),
        MOTION: motion.astype(np.float32),
    }, action


if __name__ == "__main__":
    main()
