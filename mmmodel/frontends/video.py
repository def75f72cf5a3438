"""Video front end: frames through an image front end, with a position in time.   F frames; h, w pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import ImageSequence
from torch import Tensor, nn

from mmmodel.configs import ModelConfig
from mmmodel.data import media
from mmmodel.frontends.image import ImageFrontEnd


class VideoFrontEnd(nn.Module):
    """The stream holds the cells of each frame, row by row, frame after frame; a token's position is (time, row, col).

    Without time positions a token knows its row and column alone: the encoder sees a bag of frames.
    """

    members = ("gif", "apng")  # what pillow decodes; other containers are converted when the shards are made
    special = "[VID]"

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__()
        video = config.video
        image = dataclasses.replace(config.image, max_tokens=video.max_tokens)
        self.frames = ImageFrontEnd(dataclasses.replace(config, image=image), tokenizer)
        self.max_frames = video.max_frames
        self.recipe = f"video 1: {self.max_frames} {self.frames.recipe}"
        time = (self.max_frames + 1,) if video.time_positions else ()  # + 1: the special token
        self.positions = (*time, *self.frames.positions)

    @staticmethod
    def decode(data: bytes) -> np.ndarray:
        """uint8 [F, h, w, 3]."""
        with media.opened(data) as clip:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(clip)])

    def prepare(self, clip: np.ndarray) -> np.ndarray:
        """uint8 [F, h, w, 3] -> uint8 [at most max_frames, 3, 16 rows, 16 cols], frames evenly spaced."""
        count = min(len(clip), self.max_frames)
        chosen = np.linspace(0, len(clip) - 1, count).round().astype(int)
        return np.stack([self.frames.prepare(clip[i]) for i in chosen])

    def shape(self, features: np.ndarray) -> tuple[int, int, int]:
        return len(features), *self.frames.shape(features[0])

    def augment(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Contrast and brightness, the same for all frames.  Not mirrored: that would turn left into right."""
        gain, shift = rng.uniform(0.75, 1.25), rng.uniform(-25, 25)
        return np.clip((features.astype(np.float32) - 128) * gain + 128 + shift, 0, 255).astype(np.uint8)

    def collate(self, features: list[np.ndarray]) -> tuple[Tensor, ...]:
        return self.frames.collate([frame for clip in features for frame in clip])

    def computed_rows(self, *inputs: Tensor) -> int:
        return self.frames.computed_rows(*inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.frames(*inputs)
