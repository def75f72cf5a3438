"""A trained model as one safetensors file with its configuration inside, and back."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmmodel import configs
from mmmodel.configs import PretrainConfig
from mmmodel.pretraining import Pretraining


def export(path: Path, learner: Pretraining, config: PretrainConfig) -> None:
    """Encoder, front ends and heads; atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in learner.state_dict().items()}
    partial = path.with_name(f".{path.name}")
    save_file(tensors, partial, metadata={"config": json.dumps(configs.to_dict(config)), "format": "pt"})
    partial.replace(path)


def read_config(path: Path) -> PretrainConfig:
    with safe_open(path, "pt") as file:
        return configs.from_dict(json.loads(file.metadata()["config"]))


def load_weights(path: Path, learner: Pretraining) -> None:
    """Raises RuntimeError naming what is missing, left over or of another shape."""
    learner.load_state_dict(load_file(path), strict=True)
