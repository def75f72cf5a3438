"""Front ends: raw data of one modality -> rows of its stream.  A new modality is one file and one line here.

A front end is an nn.Module with
    members                         names of the sample's members that it reads, as in KEY.png
    decode(bytes) -> raw            host; None: there is nothing in it
    prepare(raw) -> features        host, once per sample; numpy
    recipe                          string that changes when decode or prepare does, and names their cache (text: none)
    shape(features) -> int or grid  rows of the segment, without its special token
    augment(features, rng)          host, per step
    collate([features]) -> inputs   host, per batch; a tuple of tensors
    forward(*inputs) -> stream      [N_m, E], or int64 token ids [N_m]
    computed_rows(*inputs) -> int   rows that forward computes: N_m and what padding or gaps add
    special                         name of the token in front of each segment, or None
    positions                       sizes of its position tables, one per axis it uses
and, where prepare cuts long samples,
    longest -> int, str             length of features at which it does, and the same in words
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
from mmmodel.frontends.text import SPECIAL_TOKENS, TextFrontEnd
from mmmodel.frontends.video import VideoFrontEnd

FRONT_ENDS = {"text": TextFrontEnd, "image": ImageFrontEnd, "audio": AudioFrontEnd, "video": VideoFrontEnd}


def build(config: ModelConfig, tokenizer) -> nn.ModuleDict:
    """The front ends of config.modalities, in that order, which is the order of modality ids.

    config.text.encoder and its like put a Hugging Face encoder in the place of ours.
    """
    made = {}
    for name, front_end in _classes(config.modalities).items():
        if getattr(getattr(config, name, None), "encoder", ""):
            from mmmodel.frontends import huggingface  # imports transformers, which is optional

            front_end = huggingface.FRONT_ENDS[name]
        made[name] = front_end(config, tokenizer)
    return nn.ModuleDict(made)


def special_names(modalities: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all special tokens that a tokenizer for these modalities needs."""
    own = (front_end.special for front_end in _classes(modalities).values())
    return tuple(dict.fromkeys([*SPECIAL_TOKENS, *(name for name in own if name is not None)]))


def special_tokens(front_ends: nn.ModuleDict, tokenizer) -> tuple[int | None, ...]:
    """Per modality the id of the token that opens its segments, or None."""
    ids = {f.special: tokenizer.token_to_id(f.special) for f in front_ends.values() if f.special is not None}
    if lacking := [name for name, number in ids.items() if number is None]:
        raise ConfigError(f"modalities: the tokenizer lacks {', '.join(lacking)}, expected all of special_names()")
    return tuple(ids.get(f.special) for f in front_ends.values())


def _classes(modalities: tuple[str, ...]) -> dict[str, type[nn.Module]]:
    if unknown := set(modalities) - set(FRONT_ENDS):
        raise ConfigError(f"modalities: no front end for {sorted(unknown)}, expected some of {', '.join(FRONT_ENDS)}")
    return {name: FRONT_ENDS[name] for name in modalities}
