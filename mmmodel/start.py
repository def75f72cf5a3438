"""A pretraining run that starts from the weights of an earlier one, on other data or for longer."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path

from mmmodel import configs, export
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.export import CheckpointError, Run
from mmmodel.finetuning import weights
from mmmodel.pretraining import Pretraining


def configured(path: Path, config: PretrainConfig | None = None) -> PretrainConfig:
    """config, or the earlier run's own, with `path`, a run's folder or its safetensors file, to start from."""
    file = path / export.FILE if path.is_dir() else path
    config = config or export.read_config(file)
    # The weights of a language model that the earlier run started from are long in its own.
    return dataclasses.replace(config, start=str(path.resolve()), language_model="")


def read(config: PretrainConfig) -> Run:
    """The earlier run that config.start names, after a trial: nothing is written of a run that cannot start.

    Raises CheckpointError if it does not read or its encoder has another shape, ConfigError for two starts.
    """
    if config.language_model:
        raise ConfigError("pretrain: a run starts from an earlier run or from a language model, not from both")
    run = export.open_run(config.start)
    load(Pretraining(config, run.tokenizer), run)
    return run


def load(learner: Pretraining, run: Run) -> str:
    """Load the encoder of an earlier run into learner, and those of its objectives that have the same shape.

    Returns what was loaded and what begins anew, in words.  Raises CheckpointError, before anything is loaded, if the
    encoder has another shape, naming the fields of the configuration.
    """
    expected = {f"model.{name}": tensor for name, tensor in learner.model.state_dict().items()}
    if export.misfits({n: t for n, t in run.tensors.items() if n.startswith("model.")}, expected):
        theirs, ours = (configs.leaves(asdict(config.model), "model.") for config in (run.config, learner.config))
        differing = [f"{name} is {ours[name]}, there {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if differing:
            raise CheckpointError(f"pretrain: {run.path} has another shape: {'; '.join(differing)}")
    weights.load_into(learner.model, run.tensors, where=str(run.path), prefix="model.")
    loaded, anew = ["encoder"], []
    for name, objective in learner.objectives.items():
        prefix = f"objectives.{name}."
        found = {n.removeprefix(prefix): t for n, t in run.tensors.items() if n.startswith(prefix)}
        if export.misfits(found, objective.state_dict()):
            anew.append(name)
        else:
            objective.load_state_dict(found)
            loaded.append(name)
    words = f"from {run.path}: {', '.join(loaded)}"
    return f"{words}; begin anew: {', '.join(anew)}" if anew else words
