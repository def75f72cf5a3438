"""A trained model as one safetensors file with its configuration and tokenizer inside, and back; nothing is unpickled.

The file holds everything that `from_pretrained` needs; it is data, so a stranger's file can at worst be wrong.
"""

from __future__ import annotations

import json
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mmmodel import atomic, configs
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.pretraining import Pretraining

FILE = "model.safetensors"
NAMED = 6  # tensors that an error lists by name


class CheckpointError(ConfigError):
    """A file that is no checkpoint, is damaged, or does not fit the model."""


def export(path: Path, learner: Pretraining, config: PretrainConfig) -> None:
    """Encoder, front ends and heads; atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in learner.state_dict().items()}
    write(path, tensors, config, learner.model.tokenizer)


def write(path: Path, tensors: dict[str, Tensor], config: PretrainConfig, tokenizer: Tokenizer, **more: str) -> None:
    """The file itself, with `more` metadata; whole or not at all, and readable by whom the umask lets read."""
    metadata = {"format": "pt", "config": json.dumps(configs.to_dict(config)), "tokenizer": tokenizer.to_str()}
    with atomic.replacing(path) as partial:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(tensors, partial, metadata={**metadata, **more, "crc32": str(checksum(tensors))})
        partial.chmod(mode)  # safetensors leaves a file that its owner alone may read


def from_pretrained(path: Path | str, *, device: torch.device | str = "cpu") -> Pretraining:
    """The learner that `export` wrote, bit by bit, in eval mode.  path: the file, or the folder of a run.

    `learner.model` is the encoder, `learner.objectives` the heads, `learner.config` the configuration.  Raises
    CheckpointError for a file that is missing, damaged or of another model, and for a fine-tuned one, which
    `finetuning.run.load` reads.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    refuse_finetuned(path)
    config, tokenizer = read_config(path), read_tokenizer(path)
    learner = Pretraining(config, tokenizer)
    load_weights(path, learner)
    return learner.to(device).eval()


def read_config(path: Path) -> PretrainConfig:
    """The configuration inside a file.  Raises CheckpointError as `from_pretrained` does."""
    metadata = read_metadata(path)
    if "config" not in metadata:
        raise CheckpointError(f"{path}: holds tensors but no configuration, expected a file that mmmodel exported")
    try:
        return configs.from_dict(json.loads(metadata["config"]))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its configuration does not read: {error}") from error


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside a file."""
    text = read_metadata(path).get("tokenizer")
    if text is None:
        raise CheckpointError(f"{path}: holds no tokenizer, expected a file that mmmodel exported")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # what the Rust library raises has no type of its own
        raise CheckpointError(f"{path}: its tokenizer does not read: {error}") from error


def load_weights(path: Path, learner: Pretraining) -> None:
    """Into a learner of the same configuration.  Raises CheckpointError naming what is missing, extra or misshapen."""
    expected_crc = read_metadata(path).get("crc32")
    tensors = load_file(path)
    if expected_crc is not None and int(expected_crc) != checksum(tensors):
        raise CheckpointError(f"{path}: damaged, its tensors do not match their checksum")
    if wrong := misfits(tensors, learner.state_dict()):
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(wrong)}")
    learner.load_state_dict(tensors, strict=True)


def refuse_finetuned(path: Path) -> None:
    """Raises CheckpointError for a file whose heads of pretraining are gone, saying what reads it."""
    if "finetune" in read_metadata(path):
        raise CheckpointError(
            f"{path}: is fine-tuned, the heads of its pretraining are gone; predict, embed, explain and export read it"
        )


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is missing, extra, or of another shape or dtype, in words; empty when all fits."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    words = [f"{kind} {_listed(names)}" for kind, names in (("missing", missing), ("extra", extra)) if names]
    for name in [name for name in expected if name in found]:
        have, want = found[name], expected[name]
        if have.shape != want.shape:
            words.append(f"{name} is {tuple(have.shape)}, expected {tuple(want.shape)}")
        elif have.dtype != want.dtype:
            words.append(f"{name} is {have.dtype}, expected {want.dtype}")
    return words


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """crc32 over the bytes of all tensors in order of their names: safetensors itself has none."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a finished `mmmodel pretrain` writes {FILE}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one: {error}") from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
