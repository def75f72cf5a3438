"""Configuration of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmmodel.configs import ConfigError

TASKS = ("classification", "multilabel", "regression", "retrieval", "qa")


@dataclass(frozen=True)
class FinetuneConfig:
    """What is learnt from which labels, and how."""

    task: Literal["classification", "multilabel", "regression", "retrieval", "qa"] = "classification"
    label: str = "category"  # field of KEY.json
    question: str = ""  # qa: field of KEY.json that holds the question; empty: the caption is the question
    data: str = ""  # stamps, synthetic, or a folder of shards; empty: what the run was pretrained on
    modalities: tuple[str, ...] = ()  # what the samples show of themselves; empty: all that the model reads
    languages: tuple[str, ...] = ()  # tags of the samples to read; empty: those of the pretraining
    one_per_group: bool = False  # only the first of the samples that show the same picture in many languages
    labels_per_class: int = 0  # training samples kept of each class, drawn by seed; 0: all
    freeze: Literal["none", "encoder"] = "none"  # encoder: only the new output layer learns, a linear probe
    from_scratch: bool = False  # the run's configuration and tokenizer without its weights: the baseline
    partial: bool = False  # accept weights that fit only partly, and report what did
    visibility: Literal["full", "isolated"] = "full"  # whether the modalities of a sample see each other
    epochs: int = 30
    patience: int = 8  # epochs without a better validation score before the run stops; 0: never
    batch_size: int = 32
    lr: float = 1e-3  # of the output layer
    layer_decay: float = 0.8  # rate of each layer below it, as a multiple of the one above; 1: the same rate for all
    weight_decay: float = 0.05
    warmup_share: float = 0.1  # of all steps
    clip_norm: float = 1.0  # 0: off
    dropout: float = 0.1  # before the output layer
    balance: bool = True  # classes weigh the same in the loss, however many samples they have
    augment: bool = True
    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be."""
        for name, allowed in (
            ("task", TASKS),
            ("freeze", ("none", "encoder")),
            ("visibility", ("full", "isolated")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"finetune: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"finetune: {name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"finetune: layer_decay is {self.layer_decay}, expected a number in (0, 1]")
        if self.question and self.task != "qa":
            raise ConfigError(f"finetune: a question belongs to task qa, not to {self.task}")
        if self.labels_per_class and self.task not in ("classification", "qa"):
            raise ConfigError(f"finetune: labels_per_class needs classes, which {self.task} has not")
