"""Objectives: task objects that own their head and their loss.  A new objective is one file and one line here.

An objective is an nn.Module with
    weight                                    of its loss in the sum
    prepare(batch, rng) -> inputs             host, in the data worker; rng is seeded by (seed, step)
    forward(model, streams, batch, inputs)    -> loss (scalar), metrics (detached scalars)
"""

from __future__ import annotations

from torch import nn

from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.objectives.contrastive import ContrastiveAlignment
from mmmodel.objectives.masked_text import MaskedText


def build(config: PretrainConfig, tokenizer) -> nn.ModuleDict:
    """The objectives whose weight is not zero."""
    made: dict[str, nn.Module] = {}
    if config.contrastive_weight:
        made["contrastive"] = ContrastiveAlignment(config)
    if config.mlm_weight:
        made["masked_text"] = MaskedText(config, tokenizer)
    if not made:
        raise ConfigError("objectives: all weights are 0, nothing to learn")
    return nn.ModuleDict(made)
