"""Random cases for the Triton kernels in the interpreter: everything follows from a seed.

Few tokens and one or two heads, because the interpreter takes a second for a few dozen tokens; small blocks, so that
even so there are full, partial and skipped tiles, and tiles that cross samples.
"""

import contextlib
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from attention_oracle import CROSS_MASKS, MASKS, NUM_MODALITIES

from mmkernels.ops.attention import configs, triton_kernels
from mmkernels.ops.attention.configs import Config
from mmkernels.testing import random_layout

SCHEDULES = ("sample", "token")
# Heads, key heads, width: MHA, GQA and MQA; widths at both ends, not powers of two, odd.
SHAPES = [(2, 1, 16), (1, 1, 24), (2, 2, 8), (1, 1, 33), (3, 1, 16), (1, 1, 80), (2, 1, 8), (1, 1, 256)]
FEATURES = [
    {},
    {"pair_bias": True},
    {"dropout_p": 0.25, "mass": True},
    {"mass": True},
    {"pair_bias": True, "dropout_p": 0.6, "mass": True},
]


def device_bounds(layout):
    """The layout as a GPU user has it whose bounds must not be read: token tiles only."""
    return type(layout)._from_device_bounds(
        layout.cu_seqlens, layout.total_tokens, layout.max_seqlen, layout.modality_ids, layout.num_modalities
    )


@dataclass(frozen=True)
class RandomCase:
    layout: object
    k_layout: object
    mask: object
    schedule: str
    kernels: dict[str, Config]
    joined: int
    options: dict

    @contextlib.contextmanager
    def configured(self):
        with (
            mock.patch.object(triton_kernels, "JOINED", self.joined),
            configs.override(schedule=self.schedule, **self.kernels),
        ):
            yield


def random_case(seed: int) -> RandomCase:
    """Mask kinds, shapes, features, dtypes, schedules and kernels go round at different speeds."""
    rng = np.random.default_rng(seed)
    cross = seed % 4 == 3
    masks = CROSS_MASKS if cross else MASKS
    heads, kv_heads, width = SHAPES[seed % len(SHAPES)]
    layout = random_layout(seed, num_samples=3, num_modalities=NUM_MODALITIES, max_length=9)
    k_layout = random_layout(seed + 50_000, num_samples=3, num_modalities=NUM_MODALITIES, max_length=9)
    tall, wide, tma = Config(32, 16, 4, 1), Config(16, 32, 4, 1), bool(rng.integers(2))
    kernels = {"fwd": Config(*((32, 16) if rng.integers(2) else (16, 32)), 4, 1, tma=tma), "dkdv": tall, "dq": wide}
    if rng.integers(2):
        kernels["fused"] = tall
    options = {
        "heads": heads, "kv_heads": kv_heads, "width": width, "seed": seed,
        "dtype": (torch.float32, torch.float16)[seed // 8 % 2], "lse_gradient": bool(rng.integers(2)),
        "scale": 0.7 * width**-0.5 if seed % 7 == 0 else None, **FEATURES[seed % len(FEATURES)],
    }  # fmt: skip
    return RandomCase(
        layout,
        k_layout if cross else None,
        masks[list(masks)[seed % len(masks)]](layout, seed),
        SCHEDULES[int(rng.integers(2))],
        kernels,
        (0, triton_kernels.JOINED)[int(rng.integers(2))],
        options,
    )
