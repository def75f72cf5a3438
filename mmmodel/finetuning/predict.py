"""`mmmodel predict`: what a fine-tuned model says of samples, labelled or not, as a table and from Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmmodel import embed, export, limits, pretraining, tables
from mmmodel.configs import ConfigError
from mmmodel.data.loader import ShardDataset
from mmmodel.features import Features, Item
from mmmodel.finetuning.learner import Aligned
from mmmodel.finetuning.run import read_samples, restore
from mmmodel.finetuning.tasks import predict
from mmmodel.model import check_impl

CHUNK = 64 * embed.BATCH  # rows that are written at a time
LIKELY = 0.5  # probability from which a sample has a label, of many that it may have


class Predictor:
    """A fine-tuned model in eval mode.  Raises CheckpointError for a file that is damaged or not fine-tuned.

    impl: as in `export.open_run`.

    columns  of the table.  classification, qa: key, predicted, and score_NAME for each class, which add up to 1.
             multilabel: the same, predicted being the names whose score is at least 0.5.  regression: key and
             predicted, in the label's unit.  retrieval: key, modality, vector, as `mmmodel embed` writes.
    """

    def __init__(self, run: Path | str, *, device: torch.device | str = "cpu", impl: str | None = None) -> None:
        limits.check_device(str(device), "predict")
        source = export.open_run(run, impl=impl)
        check_impl(source.config.model.impl, device)
        learner, self.labels, self.config = restore(source)
        self.learner, self.pretrain = learner.to(device), source.config
        kind = {"multilabel": "names", "regression": "number"}.get(self.labels.task, "text")
        scores = {f"score_{name}": "number" for name in self.labels.classes}
        retrieval = isinstance(learner, Aligned)
        self.columns: tables.Columns = embed.COLUMNS if retrieval else {"key": "text", "predicted": kind, **scores}

    def prepare(self, dataset: ShardDataset) -> tuple[list[Item], Features]:
        """Items and features as the model was fine-tuned to read them; samples with nothing of that are left out."""
        return read_samples(dataset, self.learner.model, self.config)

    def rows(self, items: Sequence[Item], features: Features) -> Iterator[tables.Rows]:
        """Rows of `columns`, some thousand at a time."""
        if isinstance(self.learner, Aligned):
            model = self.learner.model
            yield from embed.segment_rows(items, embed.segment_vectors(model, items, features, self.learner.points))
            return
        for start in range(0, len(items), CHUNK):
            part = items[start : start + CHUNK]
            scores = self.labels.scores(predict(self.learner, features, part).double())
            yield [(item.key, *self._said(row)) for item, row in zip(part, scores, strict=True)]

    def one(self, **raw: str | Path | Image.Image | np.ndarray) -> dict[str, Any]:
        """What the model says of one sample, under the names of `columns`: one(text="two red stars", image="a.png").

        raw: as in `embed.one_sample`; for qa with a question, text is the question.
        """
        if isinstance(self.learner, Aligned):
            raise ConfigError("predict: a model for retrieval has vectors; embed.embed_one gives that of one thing")
        known = self.config.modalities or tuple(self.learner.model.front_ends)
        if not raw or (unknown := [name for name in raw if name not in known]):
            got = ", ".join(unknown if raw else ["nothing"])
            raise ConfigError(f"predict: the model was fine-tuned to read {', '.join(known)}, got {got}")
        item, features = embed.one_sample(self.learner.model, **raw)
        ((_, *values),) = next(self.rows([item], features))
        return dict(zip(list(self.columns)[1:], values, strict=True))

    def _said(self, scores: Tensor) -> tuple[Any, ...]:
        """The prediction and its scores [C]."""
        values = scores.tolist()
        if self.labels.task == "regression":
            return tuple(values)
        if self.labels.task == "multilabel":
            names = [name for name, value in zip(self.labels.classes, values, strict=True) if value >= LIKELY]
            return names, *values
        return self.labels.classes[int(scores.argmax())], *values


def write(
    path: Path | str,
    run: Path | str,
    data: str = "",
    *,
    split: str | None = None,
    languages: Sequence[str] = (),
    device: str = "cpu",
    impl: str | None = None,
) -> tuple[int, int]:
    """Write the table of `Predictor` under `path`, .parquet, .csv or .jsonl; how many rows, and samples left out.

    data: as in `pretraining.find_data`; empty: what the model was fine-tuned on.  Raises ConfigError if no sample has
    the split and a language, or none has anything that the model reads.
    """
    path = Path(path)
    predictor = Predictor(run, device=device, impl=impl)
    tables.check(path)
    config, pretrain = predictor.config, predictor.pretrain
    torch.set_num_threads(config.threads)
    if not data and not languages:
        languages = config.languages or (() if config.data else pretrain.languages)
    dataset = pretraining.open_shards(data or config.data or pretrain.data, languages, split)
    items, features = predictor.prepare(dataset)
    if not items:
        known = ", ".join(config.modalities or predictor.learner.model.front_ends)
        raise ConfigError(f"predict: none of the {len(dataset)} samples of {dataset.path} has any of {known}")
    about = {"run": str(run), "data": str(dataset.path)}
    count = tables.write(path, predictor.columns, predictor.rows(items, features), about)
    return count, len(dataset) - len(items)
