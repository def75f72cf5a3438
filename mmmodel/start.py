"""A pretraining run that starts from the weights of an earlier one, on other data or for longer."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mmmodel import configs, export
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.export import Run
from mmmodel.finetuning import weights
from mmmodel.limits import CheckpointError
from mmmodel.pretraining import Pretraining

POSITIONS = re.compile(r"model\.embedding\.position_weights\.(\d+)\.(\d+)")  # modality, axis
BY_MODALITY = ("model.embedding.modality_weight", "objectives.contrastive.heads")  # a row for each
VOCABULARY = "model.text.vocab_size"
UNSEEN = ("model.heads", "model.norm", "model.activation")  # no tensor's shape tells them
MAY_DIFFER = (".modalities", ".max_tokens", ".max_seconds", ".max_frames")


def configured(path: Path, config: PretrainConfig | None = None) -> PretrainConfig:
    """config, or the earlier run's own, with `path`, a run's folder or its safetensors file, to start from."""
    file = path / export.FILE if path.is_dir() else path
    config = config or export.read_config(file)
    # The weights of a language model that the earlier run started from are long in its own.
    return dataclasses.replace(config, start=str(path.resolve()), language_model="")


def read(config: PretrainConfig) -> tuple[Pretraining, str]:
    """A learner with the weights and the tokenizer of the run that config.start names, and what `load` says of it.

    Raises CheckpointError if it does not read, lacks a modality or its encoder has another shape, ConfigError for two
    starts.
    """
    if config.language_model:
        raise ConfigError("pretrain: a run starts from an earlier run or from a language model, not from both")
    run = export.open_run(config.start)
    if lacking := [name for name in config.model.modalities if name not in run.config.model.modalities]:
        theirs = ", ".join(run.config.model.modalities)
        raise CheckpointError(f"pretrain: {run.path} does not read {', '.join(lacking)}, expected some of {theirs}")
    learner = Pretraining(config, run.tokenizer)
    return learner, load(learner, run)


def load(learner: Pretraining, run: Run) -> str:
    """Load the encoder of an earlier run into learner, and those of its objectives that have the same shape.

    It may read fewer modalities than the earlier run, and shorter or longer inputs (see `fitted`).  Returns what was
    loaded and what begins anew, in words.  Raises CheckpointError, before anything is loaded, if the encoder has
    another shape, naming the fields of the configuration.
    """
    tensors, changes = fitted(learner, run)
    expected = {f"model.{name}": tensor for name, tensor in learner.model.state_dict().items()}
    theirs, ours = (configs.leaves(asdict(config.model), "model.") for config in (run.config, learner.config))
    other = any(ours[name] != theirs[name] for name in UNSEEN)
    if other or export.misfits({n: t for n, t in tensors.items() if n.startswith("model.")}, expected):
        names = [name for name in ours if ours[name] != theirs[name] and not name.endswith(MAY_DIFFER)]
        differing = [f"{name} is {ours[name]}, there {theirs[name]}" for name in names]
        if differing:
            raise CheckpointError(f"pretrain: {run.path} has another shape: {'; '.join(differing)}")
    weights.load_into(learner.model, tensors, where=str(run.path), prefix="model.")
    if ours[VOCABULARY] != theirs[VOCABULARY]:
        changes.append(f"{VOCABULARY}={ours[VOCABULARY]} does nothing: the tokenizer is the earlier run's")
    loaded, anew = ["encoder"], []
    for name, objective in learner.objectives.items():
        prefix = f"objectives.{name}."
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if export.misfits(found, objective.state_dict()):
            anew.append(name)
        else:
            objective.load_state_dict(found)
            loaded.append(name)
    words = [f"from {run.path}: {', '.join(loaded)}", *changes, *([f"begin anew: {', '.join(anew)}"] if anew else [])]
    return "; ".join(words)


def fitted(learner: Pretraining, run: Run) -> tuple[dict[str, Tensor], list[str]]:
    """The earlier run's tensors by the learner's modalities and lengths of input, and what that changed, in words.

    A modality that the learner does not read is left out.  Of a position table the first rows are taken; rows that the
    earlier run lacks are as the learner drew them.
    """
    theirs, ours = run.config.model.modalities, learner.config.model.modalities
    rows = [theirs.index(name) for name in ours if name in theirs]
    left_out = [name for name in theirs if name not in ours]
    changes = [f"left out: {', '.join(left_out)}"] if left_out else []
    expected, found = learner.state_dict(), {}
    for name, tensor in run.tensors.items():
        if position := POSITIONS.fullmatch(name):
            modality = theirs[int(position[1])]
            if modality in left_out:
                continue
            name = f"model.embedding.position_weights.{ours.index(modality)}.{position[2]}"
            own = expected.get(name, tensor)
            if len(own) != len(tensor) and own.shape[1:] == tensor.shape[1:]:
                changes.append(f"positions of {modality}: {len(tensor)} -> {len(own)}")
                tensor = torch.cat([tensor[: len(own)], own[len(tensor) :]])
        elif name in BY_MODALITY:
            tensor = tensor[rows]
        elif name.startswith(tuple(f"model.front_ends.{modality}." for modality in left_out)):
            continue
        found[name] = tensor
    return found, changes
