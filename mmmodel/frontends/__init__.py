"""Front ends: raw data of one modality -> rows of its stream.  A new modality is one file and one line here.

A front end is an nn.Module with
    prepare(raw) -> features        host, once per sample; numpy
    recipe                          string that changes when `prepare` does; names the cached features (text: none)
    shape(features) -> int or grid  rows of the segment, without its special token
    augment(features, rng)          host, per step
    collate([features]) -> inputs   host, per batch; a tuple of tensors
    forward(*inputs) -> stream      [N_m, E], or int64 token ids [N_m]
    computed_rows(*inputs) -> int   rows that forward computes: N_m and what padding or gaps add
    special                         name of the token in front of each segment, or None
    positions                       sizes of its position tables, one per axis it uses
and, where masked modelling is to predict its content,
    cell_width, cells(features) -> float32 [n, cell_width]   content of the first n tokens
    hide(features, places) -> features   a copy in which the cells at `places` say nothing
What a sample gets never depends on which samples share its batch.
"""

from __future__ import annotations

from torch import nn

from mmmodel.configs import ConfigError, ModelConfig
from mmmodel.frontends.audio import AudioFrontEnd
from mmmodel.frontends.image import ImageFrontEnd
from mmmodel.frontends.text import TextFrontEnd

FRONT_ENDS = {"text": TextFrontEnd, "image": ImageFrontEnd, "audio": AudioFrontEnd}


def build(config: ModelConfig, tokenizer) -> nn.ModuleDict:
    """The front ends of config.modalities, in that order, which is the order of modality ids."""
    unknown = set(config.modalities) - set(FRONT_ENDS)
    if unknown:
        raise ConfigError(f"modalities: no front end for {sorted(unknown)}, expected some of {', '.join(FRONT_ENDS)}")
    return nn.ModuleDict({name: FRONT_ENDS[name](config, tokenizer) for name in config.modalities})


def special_tokens(front_ends: nn.ModuleDict, tokenizer) -> tuple[int | None, ...]:
    """Per modality the id of the token that opens its segments, or None."""
    return tuple(None if f.special is None else tokenizer.token_to_id(f.special) for f in front_ends.values())
