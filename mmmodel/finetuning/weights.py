"""Weights of a run, loaded into a model with a report of what matched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmmodel import export
from mmmodel.export import Run
from mmmodel.limits import CheckpointError, listed
from mmmodel.pretraining import Pretraining


@dataclass(frozen=True)
class Loaded:
    """What became of each tensor, by name."""

    matched: list[str]
    missing: list[str]  # the module has them, the file does not: they keep their initial values
    misshapen: list[str]  # of another shape or dtype in the file; not loaded
    extra: list[str]  # in the file alone

    def summary(self) -> str:
        """One line, with the names of what is not as it should be."""
        words = [f"{len(self.matched)} tensors loaded"]
        for kind in ("missing", "misshapen", "extra"):
            if names := getattr(self, kind):
                words.append(f"{len(names)} {kind} ({listed(names)})")
        return "; ".join(words)


def learner_of(run: Run) -> Pretraining:
    """Its encoder, with those of the objectives whose weights it holds, in eval mode.

    A fine-tuned run has none, or for retrieval `contrastive`.  Raises CheckpointError for weights that do not fit.
    """
    learner = Pretraining(run.config, run.tokenizer)
    load_into(learner.model, run.tensors, where=str(run.path), prefix="model.")
    for name, objective in list(learner.objectives.items()):
        prefix = f"objectives.{name}."
        if any(tensor.startswith(prefix) for tensor in run.tensors):
            load_into(objective, run.tensors, where=str(run.path), prefix=prefix)
        else:
            del learner.objectives[name]
    return learner.eval()


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], *, where: str, prefix: str = "", partial: bool = False
) -> Loaded:
    """Load the tensors whose names begin with `prefix` into module, in place; names in the report keep the prefix.

    where names the source in errors.  Unless `partial`, a tensor that is missing, of another shape or dtype, or (under
    the prefix) extra is a CheckpointError that names it, and nothing is loaded.  What is partial and matches in nothing
    is an error too: it is another model.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    fits = {
        name: tensor
        for name, tensor in found.items()
        if name in expected and (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
    }
    loaded = Loaded(
        matched=[prefix + name for name in expected if name in fits],
        missing=[prefix + name for name in expected if name not in found],
        misshapen=[prefix + name for name in expected if name in found and name not in fits],
        extra=[prefix + name for name in found if name not in expected],
    )
    if not partial and (wrong := export.misfits(found, expected)):
        raise CheckpointError(f"{where}: does not fit the model: {'; '.join(wrong)}")
    if not fits:
        raise CheckpointError(f"{where}: none of its {len(found)} tensors fits the model")
    module.load_state_dict(fits, strict=False)
    return loaded
