"""Image front end: a CNN of stride 16 at native aspect ratio.   h, w pixels; rows, cols cells of 16 x 16."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmmodel.configs import ModelConfig
from mmmodel.data import media
from mmmodel.data.shards import IMAGE
from mmmodel.frontends.windows import Conv

CELL = 16
KERNELS = ((7, 4), (3, 2), (3, 2))  # (width, stride) of each convolution
MEAN, DEVIATION = 127.5, 64.0  # of a pixel: what the CNN sees is (pixel - MEAN) / DEVIATION
PATCHES = 4  # a side of a cell in what masked image modelling predicts
MAX_ASPECT = 8.0  # a longer strip is squeezed, or its short side would vanish


class ImageFrontEnd(nn.Module):
    """A 7 x 7 convolution of stride 4 and two 3 x 3 of stride 2, with LayerNorm over the channels of a position.

    Nothing is padded.  On a CPU ragged images go through in groups of equal shape, in chunks of a power of two; on a
    GPU all at once, as matrix products over gathered windows (windows.py): there a call per shape would be thousands of
    small kernels, and the host would take longer to ask for them than the GPU to compute them.
    """

    members = IMAGE
    special = "[IMG]"
    decode = staticmethod(media.decode_image)

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__()
        self.width = config.width
        self.cell = self.build(config)
        self.max_tokens, self.enlarge = config.image.max_tokens, config.image.enlarge
        # What decode and prepare give; names the cache.
        self.recipe = f"image 2: {self.cell} {self.max_tokens} {self.enlarge}"
        side = self.max_tokens + 1  # + 1: the special token sits at position 0
        self.positions = (side, side)
        self.patches = next(side for side in (PATCHES, 2, 1) if self.cell % side == 0)
        self.cell_width = 3 * self.patches**2

    def build(self, config: ModelConfig) -> int:
        """Make the parts that learn; returns the side of a cell in pixels."""
        widths = (3, *config.image.channels, config.width)
        self.stages = nn.ModuleList(
            _Stage(a, b, *shape) for a, b, shape in zip(widths[:-1], widths[1:], KERNELS, strict=True)
        )
        return CELL

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] -> uint8 [3, 16 rows, 16 cols] with rows * cols <= max_tokens."""
        rows, cols = fit_grid(image.shape[0], image.shape[1], self.max_tokens, self.enlarge, self.cell)
        resized = Image.fromarray(image).resize((cols * self.cell, rows * self.cell), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    def shape(self, features: np.ndarray) -> tuple[int, int]:
        return features.shape[1] // self.cell, features.shape[2] // self.cell

    def cells(self, features: np.ndarray) -> np.ndarray:
        """Content of each token's cell: means of 4 x 4 patches, float32 [rows cols, 48], in units of the input."""
        rows, cols = self.shape(features)
        inner = self.cell // self.patches
        pixels = features.reshape(3, rows, self.patches, inner, cols, self.patches, inner)
        means = pixels.mean(axis=(3, 6), dtype=np.float32)  # [3, rows, patches, cols, patches]
        return ((means - MEAN) / DEVIATION).transpose(1, 3, 0, 2, 4).reshape(rows * cols, self.cell_width)

    def hide(self, features: np.ndarray, places: np.ndarray) -> np.ndarray:
        """A copy with the cells at `places` grey."""
        rows, cols = self.shape(features)
        hidden = features.copy()
        grid = hidden.reshape(3, rows, self.cell, cols, self.cell)
        grid[:, places // cols, :, places % cols] = round(MEAN)
        return hidden

    def augment(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mirror, shift by up to half a cell (edges repeat), and change contrast and brightness a little."""
        if rng.random() < 0.5:
            features = features[:, :, ::-1]
        down, right = rng.integers(-self.cell // 2, self.cell // 2 + 1, size=2)
        h, w = features.shape[1:]
        y = np.clip(np.arange(h) + down, 0, h - 1)
        x = np.clip(np.arange(w) + right, 0, w - 1)
        features = features[:, y][:, :, x].astype(np.float32)
        gain, shift = rng.uniform(0.75, 1.25), rng.uniform(-25, 25)
        return np.clip((features - 128) * gain + 128 + shift, 0, 255).astype(np.uint8)

    def collate(self, features: list[np.ndarray]) -> tuple[Tensor, ...]:
        """Row of each output token in the concatenated groups, int64 [N_m]; then one uint8 [n, 3, h, w] per chunk."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(features):
            groups.setdefault(image.shape[1:], []).append(i)
        chunks, starts, start = [], [0] * len(features), 0
        for (h, w), members in sorted(groups.items()):
            tokens = (h // self.cell) * (w // self.cell)
            for chunk in _powers_of_two(members):
                # Pixel after pixel in memory, as both ways through the CNN want them; bytes are a quarter of the work.
                stacked = torch.from_numpy(np.stack([features[i] for i in chunk]))
                chunks.append(stacked.contiguous(memory_format=torch.channels_last))
                for i in chunk:
                    starts[i] = start
                    start += tokens
        sizes = [int(np.prod(self.shape(image))) for image in features]
        rows = [np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]
        order = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64))
        return (order, *chunks)

    def computed_rows(self, order: Tensor, *chunks: Tensor) -> int:
        return len(order)

    def forward(self, order: Tensor, *chunks: Tensor) -> Tensor:
        """[N_m, E], images in sample order, cells row by row."""
        if not chunks:
            return next(self.parameters()).new_zeros(0, self.width)
        states = self.at_once(chunks) if chunks[0].is_cuda else self.by_shape(chunks)
        return states.index_select(0, order)

    def by_shape(self, chunks: Sequence[Tensor]) -> Tensor:
        """[N_m, E], images in the order of the chunks, each of which goes through by itself."""
        return torch.cat([self.encode(chunk).flatten(0, 2) for chunk in chunks])

    def at_once(self, chunks: Sequence[Tensor]) -> Tensor:
        """The same in one go, whatever the shapes.  Calls as many operators for one image as for hundreds."""
        x = self._scaled(torch.cat([chunk.permute(0, 2, 3, 1).reshape(-1, 3) for chunk in chunks]))
        sizes = [chunk.shape[2:] for chunk in chunks for _ in range(len(chunk))]
        for stage in self.stages:
            stride = stage.conv.stride[0]
            sizes = [(h // stride, w // stride) for h, w in sizes]
            x = stage.on_positions(x, sizes)
        return x

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] -> [n, rows, cols, E]."""
        x = self._scaled(images.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        return x.permute(0, 2, 3, 1)

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.stages[0].conv.weight.dtype).sub_(MEAN).div_(DEVIATION)


class _Stage(nn.Module):
    """Convolution, LayerNorm over channels, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, kernel, stride, group=4 if inputs == 3 else 1)  # pixels: 12 bytes at a time
        self.norm = nn.LayerNorm(outputs)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, h, w] -> [n, outputs, h / stride, w / stride]."""
        x = self.conv(x).permute(0, 2, 3, 1)  # channels last in memory, so the norm reads rows
        return self._activated(x).permute(0, 3, 1, 2)

    def on_positions(self, x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """[P_in, C] -> [P_out, outputs], the positions of images that come out with these sizes."""
        if torch.is_autocast_enabled(x.device.type):  # before a position is copied into each window that reads it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._activated(self.conv(self.conv.windows(x, sizes)))

    def _activated(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(x), approximate="tanh")


def fit_grid(h: int, w: int, max_tokens: int, enlarge: bool, cell: int = CELL) -> tuple[int, int]:
    """Cells (rows, cols) that keep the aspect ratio best among the largest with rows * cols <= max_tokens."""
    aspect = min(max(w / h, 1 / MAX_ASPECT), MAX_ASPECT)
    own = (h / cell) * (w / cell)
    tokens = max_tokens if enlarge else min(max_tokens, max(own, 1.0))
    rows, cols = math.sqrt(tokens / aspect), math.sqrt(tokens * aspect)
    candidates = [
        (max(1, r), max(1, c))
        for r in {math.floor(rows), math.ceil(rows)}
        for c in {math.floor(cols), math.ceil(cols)}
        if max(1, r) * max(1, c) <= max_tokens
    ]
    if not candidates:
        return max(1, min(math.floor(rows), max_tokens)), max(1, min(math.floor(cols), max_tokens))
    return min(candidates, key=lambda rc: (abs(math.log(rc[1] / rc[0] / aspect)) - 0.5 * math.log(rc[0] * rc[1]), rc))


def _powers_of_two(members: list[int]) -> list[list[int]]:
    chunks, start = [], 0
    while start < len(members):
        size = 1 << (min(len(members) - start, 16).bit_length() - 1)
        chunks.append(members[start : start + size])
        start += size
    return chunks
