"""Objectives: task objects that own their head and their loss.  A new objective is one file and one line here.

An objective is an nn.Module with
    config                            its ObjectiveConfig: weight and schedule
    forward(views, inputs)            -> loss (scalar), metrics (detached scalars)
    needs, finds(items) -> bool       what it learns from, in words, and whether any of the items has it
    compares (optional)               True: samples of a batch with one another, so one alone teaches it nothing
and, where it draws something for a batch, one of
    prepare(batch, rng) -> inputs     host, in the data worker; rng is seeded by (seed, step)
    hides, hide(features, front_end, rng) -> Hidden   name of the modality in which it hides parts of the masked view
`Views` computes what several of them read: the isolated view serves alignment and the scores behind hard negatives, the
masked view serves every masking objective, both in one packed forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mmmodel.configs import ConfigError, ObjectiveConfig, PretrainConfig
from mmmodel.features import Item
from mmmodel.objectives.contrastive import ContrastiveAlignment
from mmmodel.objectives.masked_features import MaskedFeatures
from mmmodel.objectives.masked_text import MaskedText
from mmmodel.objectives.matching import Matching
from mmmodel.objectives.meaning import Meaning

# In the order in which a step computes them: meaning and matching read what alignment leaves in the views.
OBJECTIVES = {
    "contrastive": ContrastiveAlignment,
    "masked_text": MaskedText,
    "masked_image": lambda config, model: MaskedFeatures(config, model, "image"),
    "masked_audio": lambda config, model: MaskedFeatures(config, model, "audio"),
    "meaning": Meaning,
    "matching": Matching,
}


def build(config: PretrainConfig, model) -> nn.ModuleDict:
    """The objectives whose weight is not zero.  Raises ConfigError if there is none, or one lacks its modality."""
    made: dict[str, nn.Module] = {}
    for name, make in OBJECTIVES.items():
        if not getattr(config.objectives, name).weight:
            continue
        modality = name.removeprefix("masked_")
        if modality != name and modality not in config.model.modalities:
            raise ConfigError(
                f"objectives: {name} needs {modality}, which the model does not read; "
                f"objectives.{name}.weight=0 leaves it out"
            )
        made[name] = make(config, model)
    if not made:
        raise ConfigError("objectives: all weights are 0, nothing to learn")
    return nn.ModuleDict(made)


def idle(made: nn.ModuleDict, items: Sequence[Item], steps: int, batch_size: int) -> dict[str, str]:
    """Name -> why, of the objectives that a run of `steps` on these training items never asks, or never learns from.

    Raises ConfigError if that is all of them, with one that would learn.
    """
    reasons = {}
    for name, objective in made.items():
        if not any(weight_at(objective.config, step, steps) for step in range(steps)):
            reasons[name] = "is never due"
        elif not objective.finds(items):
            reasons[name] = f"needs {objective.needs}"
        elif getattr(objective, "compares", False) and batch_size < 2:
            reasons[name] = f"compares the samples of a batch, and batch_size is {batch_size}"
        elif getattr(objective, "compares", False) and len({item.concept for item in items}) < 2:
            reasons[name] = "compares concepts, and all samples are of one"
    if len(reasons) < len(made):
        return reasons
    present = sorted({modality for item in items for modality in item.rows})
    others = [f"masked_{modality}" for modality in present if f"masked_{modality}" in OBJECTIVES]
    advice = f"; try --set objectives.{others[0]}.weight=1" if others else ""
    raise ConfigError(
        f"objectives: nothing to learn from {len(items)} training samples of {', '.join(present)}: "
        f"{', '.join(f'{name} {reason}' for name, reason in reasons.items())}{advice}"
    )


def weight_at(objective: ObjectiveConfig, step: int | None, steps: int) -> float:
    """Weight of an objective's loss at a step of a run of `steps`; 0: it does not run then.  None: at any step."""
    if step is None:
        return objective.weight
    since = step - objective.begin * steps
    if since < 0 or step % objective.every:
        return 0.0
    rising = objective.ramp * steps
    return objective.weight * min(1.0, (since + 1) / rising) if rising > 0 else objective.weight
