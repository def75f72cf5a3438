"""The encoder as an ONNX graph, for runtimes without PyTorch: one sample of any length, attention written out.

n word ids, h x w pixels, F mel frames; T tokens, E width, H heads, P common width, C outputs of a fine-tuned model.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from mmmodel import atomic
from mmmodel.configs import ConfigError
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import FineTuned
from mmmodel.frontends.audio import FFT, HOP, SAMPLE_RATE, WINDOW, AudioFrontEnd
from mmmodel.frontends.image import CELL, DEVIATION, MEAN, ImageFrontEnd
from mmmodel.frontends.text import TextFrontEnd
from mmmodel.pretraining import Pretraining

OPSET = 20  # the first with gelu by tanh as one operator


class PlainEncoder(nn.Module):
    """The model on one sample, in PyTorch's own operators: what the packed model computes for that sample alone.

    modalities  those that the sample has, in the model's order.  With one of them the view is that of the contrastive
                objective, and `point` [P] comes out too where the model has that head.
    tuned       of a fine-tuned run: its learner and labels.  `scores` [C] comes out too, as `Labels.scores` has them,
                float64 of regression, and the modalities see each other only if they did in the fine-tuning.

    Inputs, of the modalities given: text int64 [n], [CLS] first; image float or uint8 [1, 3, h, w], sides multiples of
    16, values 0 to 255; audio float [F, mels].  As each front end's `prepare` gives them.
    """

    def __init__(
        self, learner: Pretraining, modalities: Sequence[str], tuned: tuple[FineTuned, Labels] | None = None
    ) -> None:
        super().__init__()
        model = learner.model
        unknown = [name for name in modalities if name not in model.front_ends]
        if unknown or not modalities:
            raise ConfigError(f"onnx: modalities are {tuple(modalities)}, expected some of {tuple(model.front_ends)}")
        self.modalities = [name for name in model.front_ends if name in modalities]
        for name in self.modalities:
            if name not in _STREAMS or type(model.front_ends[name]) not in _STREAMS[name]:
                kind = type(model.front_ends[name]).__name__
                raise ConfigError(f"onnx: no plain form of {name}'s front end, {kind}; leave {name} out")
        self.model = model
        self.contrastive = dict(learner.objectives.items()).get("contrastive") if len(self.modalities) == 1 else None
        self.head, self.labels = (tuned[0].head, tuned[1]) if tuned else (None, None)
        self.isolated = tuned is not None and tuned[0].visibility == "isolated"

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """hidden [T, E]; joint [E], the mean over modalities of their mean; then point [P] and scores [C], if any."""
        parts = [self._embedded(name, features) for name, features in zip(self.modalities, inputs, strict=True)]
        hidden = torch.cat([self._encoded(x) for x in (parts if self.isolated else [torch.cat(parts)])])
        each = [torch.ones_like(part[:, 0]) for part in parts]
        joint = torch.cat([ones / ones.sum() for ones in each]) @ hidden / len(parts)
        found = [hidden, joint]
        if self.contrastive is not None:
            head = self.contrastive.heads[list(self.model.front_ends).index(self.modalities[0])]
            found.append(F.normalize(joint @ head, dim=-1))
        if self.head is not None:
            found.append(self.labels.scores(self.head(joint)))
        return tuple(found)

    @property
    def outputs(self) -> list[str]:
        extra = {"point": self.contrastive, "scores": self.head}
        return ["hidden", "joint", *(name for name, part in extra.items() if part is not None)]

    def _encoded(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = _block(block, x)
        return self.model.norm(x)

    def _embedded(self, name: str, features: Tensor) -> Tensor:
        """norm(row + W_m + position rows) of one segment, its special token in front."""
        number = list(self.model.front_ends).index(name)
        embedding, special = self.model.embedding, self.model.special_tokens[number]
        rows, positions = _STREAMS[name][type(self.model.front_ends[name])](self.model.front_ends[name], features)
        if rows is None:
            rows = embedding.token_weight[features]
        if special is not None:
            rows = torch.cat([embedding.token_weight[special : special + 1], rows])
            positions = [F.pad(position + 1, (1, 0)) for position in positions]
        x = rows + embedding.modality_weight[number]
        for table, position in zip(embedding.position_weights[number], positions, strict=True):
            x = x + table[position]
        return F.layer_norm(x, x.shape[-1:], embedding.norm_weight, embedding.norm_bias, embedding.eps)


def export_onnx(
    path: Path | str, learner: Pretraining, modalities: Sequence[str], tuned: tuple[FineTuned, Labels] | None = None
) -> PlainEncoder:
    """Write the encoder of these modalities as an ONNX file whose lengths stay free; returns what was traced.

    Inputs carry the modalities' names, outputs those of `PlainEncoder.outputs`.  The file's metadata_props say how
    inputs are made; the tokenizer that they name is written beside it.  Raises ConfigError for a modality without a
    plain form and for a name that does not end in .onnx, ImportError where onnx and onnxscript are not installed.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ConfigError(f"export: {path} ends in {path.suffix!r}, expected .onnx, the one format that it writes")
    encoder = PlainEncoder(learner, modalities, tuned).eval().cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            encoder,
            tuple(_EXAMPLES[name](learner) for name in encoder.modalities),
            dynamo=True,
            opset_version=OPSET,
            input_names=encoder.modalities,
            output_names=encoder.outputs,
            dynamic_shapes=((*(_FREE[name]() for name in encoder.modalities),),),
            verbose=False,
        )
    program.model.metadata_props.update(_about(path, encoder))
    with atomic.replacing(path) as partial:
        program.save(str(partial), external_data=False)
        if "text" in encoder.modalities:
            learner.model.tokenizer.save(str(tokenizer_beside(path)))
    return encoder


def tokenizer_beside(path: Path) -> Path:
    return path.with_suffix(".tokenizer.json")


def _about(path: Path, encoder: PlainEncoder) -> dict[str, str]:
    """What the file says of itself: enough to make its inputs and to read its outputs without mmmodel."""
    about: dict[str, Any] = {"modalities": ",".join(encoder.modalities)}
    front_ends = encoder.model.front_ends
    if "text" in encoder.modalities:
        text = front_ends["text"]
        about |= {"text.tokenizer": tokenizer_beside(path).name, "text.max_tokens": text.max_tokens}
        about |= {"text.cls_id": text.cls_id} | ({} if text.sep_id is None else {"text.sep_id": text.sep_id})
    if "image" in encoder.modalities:
        about |= {"image.cell": CELL, "image.max_cells": front_ends["image"].max_tokens}
    if "audio" in encoder.modalities:
        audio = front_ends["audio"]
        about |= {"audio.sample_rate": SAMPLE_RATE, "audio.hop": HOP, "audio.window": WINDOW, "audio.fft": FFT}
        about |= {"audio.mels": audio.mels, "audio.max_frames": audio.max_frames}
    if encoder.labels is not None:
        about |= {"task": encoder.labels.task, "classes": json.dumps(encoder.labels.classes, ensure_ascii=False)}
    return {name: str(value) for name, value in about.items()}


def _block(block: nn.Module, x: Tensor) -> Tensor:
    """The block of the model with softmax(q k^T / sqrt(D)) v written out over the whole sample."""
    qkv = block.project(x).view(x.shape[0], 3, block.heads, -1).permute(1, 2, 0, 3)
    q, k, v = qkv[0], qkv[1], qkv[2]  # [H, T, D]
    weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
    return block.mix(x, (weights @ v).transpose(0, 1).flatten(1))


def _text(front_end: TextFrontEnd, ids: Tensor) -> tuple[None, list[Tensor]]:
    return None, [torch.arange(ids.shape[0])]


def _image(front_end: ImageFrontEnd, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = (pixels.to(torch.float32) - MEAN) / DEVIATION
    for stage in front_end.stages:
        x = stage(x)
    cells = torch.ones_like(x[0, 0], dtype=torch.int64)  # [rows, cols]; counted, as the exporter knows no div or mod
    row, col = cells.cumsum(0) - 1, cells.cumsum(1) - 1
    return x[0].permute(1, 2, 0).flatten(0, 1), [row.flatten(), col.flatten()]


def _audio(front_end: AudioFrontEnd, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = frames
    for conv, norm in zip(front_end.convs, front_end.norms, strict=True):
        x = F.gelu(norm(conv(x.t().unsqueeze(0)).squeeze(0).t()), approximate="tanh")
    return x, [torch.arange(x.shape[0])]


_STREAMS = {"text": {TextFrontEnd: _text}, "image": {ImageFrontEnd: _image}, "audio": {AudioFrontEnd: _audio}}
# What the trace sees: lengths that are neither 0 nor 1, which would be taken for constants, and no two alike.
_EXAMPLES = {
    "text": lambda learner: torch.arange(7) % 4,
    "image": lambda learner: torch.zeros(1, 3, 2 * CELL, 3 * CELL),
    "audio": lambda learner: torch.zeros(22, learner.config.model.audio.mels),
}
_FREE = {
    "text": lambda: {0: Dim("words")},
    "image": lambda: {2: CELL * Dim("rows"), 3: CELL * Dim("cols")},
    "audio": lambda: {0: Dim("frames")},
}
