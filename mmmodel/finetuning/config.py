"""Configuration of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mmmodel import limits
from mmmodel.configs import ConfigError
from mmmodel.limits import Count, Device, LearningRate, NotNegative, Range, Seed, Share, SomeShare, Whole


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
    labels_per_class: Whole = 0  # training samples kept of each class, drawn by seed; 0: all
    freeze: Literal["none", "encoder"] = "none"  # encoder: only the new output layer learns, a linear probe
    from_scratch: bool = False  # the run's configuration and tokenizer without its weights: the baseline
    partial: bool = False  # accept weights that fit only partly, and report what did
    visibility: Literal["full", "isolated"] = "full"  # whether the modalities of a sample see each other
    epochs: Count = 30  # at most
    patience: Whole = 8  # epochs without a better validation score before the run stops; 0: never
    batch_size: Count = 32  # samples per step
    lr: LearningRate = 1e-3  # of the output layer
    layer_decay: SomeShare = 0.8  # rate of each layer below it, as a multiple of the one above; 1: one rate for all
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1  # of all steps
    clip_norm: NotNegative = 1.0  # 0: off
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.1  # before the output layer
    balance: bool = True  # classes weigh the same in the loss, however many samples they have
    augment: bool = True  # samples are varied at random in training, as in pretraining
    seed: Seed = 0
    threads: Count = 1
    device: Device = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: training under autocast; weights and scores stay fp32


def check(config: FinetuneConfig) -> None:
    """Raises ConfigError for what cannot be.  Not when one is made: the command line's parser would frame the line."""
    limits.check(config, "finetune")
    if config.question and config.task != "qa":
        raise ConfigError(f"finetune: a question belongs to task qa, not to {config.task}")
    if config.labels_per_class and config.task not in ("classification", "qa"):
        raise ConfigError(f"finetune: labels_per_class needs classes, which {config.task} has not")
    if config.partial and config.from_scratch:
        raise ConfigError("finetune: partial is about weights, of which from_scratch takes none; expected one of them")
