"""Hugging Face encoders in the place of our front ends, each followed by a learned map to the width E.

n segments of a chunk, C width of their encoder.  Needs transformers.  Ragged input goes through in groups of equal
length or shape, so nothing is padded; Whisper alone needs windows of fixed length, whose rest counts as computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmmodel.configs import ConfigError, ModelConfig
from mmmodel.frontends.audio import SAMPLE_RATE, AudioFrontEnd
from mmmodel.frontends.image import ImageFrontEnd
from mmmodel.frontends.text import TextFrontEnd


def load(name: str, families: dict[str, str], freeze: bool) -> nn.Module:
    """The encoder in a folder or of a hub name.  families: model_type -> attribute that is the encoder, "" for itself.

    What depends on the batch or on chance is off: BatchNorm uses its running statistics, nothing is masked at random.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"encoder {name!r}: needs transformers; pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in families:
            raise ConfigError(f"encoder {name!r} is a {config.model_type!r}, expected one of {', '.join(families)}")
        if hasattr(config, "apply_spec_augment"):
            config.apply_spec_augment = False
        if torch.get_default_device().type == "meta":  # only its shape is asked for
            model = transformers.AutoModel.from_config(config)
        else:
            model = transformers.AutoModel.from_pretrained(name, config=config, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(f"encoder {name!r}: no Hugging Face model there: {str(error).splitlines()[0]}") from error
    kind = config.model_type
    encoder = getattr(model, families[kind]) if families[kind] else model
    if kind != "resnet" and isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None  # no state is read from it
    return _Fixed(encoder.eval().requires_grad_(False)) if freeze else _Running(encoder)


class _Running(nn.Module):
    """An encoder whose BatchNorms never look at the batch."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config

    def forward(self, *args, **kwargs):
        return self.encoder(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class _Fixed(_Running):
    """An encoder that does not learn, and always computes as in evaluation."""

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.encoder(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class HuggingFaceText(TextFrontEnd):
    """The last states of a BERT-like encoder on each caption alone; the tokenizer must be its own."""

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.encoder = load(config.text.encoder, {"bert": "", "roberta": "", "xlm-roberta": "", "distilbert": ""},
                            config.text.freeze)  # fmt: skip
        theirs = self.encoder.config
        limit = theirs.max_position_embeddings - (2 if "roberta" in theirs.model_type else 0)
        if config.text.max_tokens > limit:
            raise ConfigError(f"text: max_tokens is {config.text.max_tokens}, expected at most the encoder's {limit}")
        self.project = nn.Linear(theirs.hidden_size, config.width)

    def collate(self, features: list[np.ndarray]) -> tuple[Tensor, ...]:
        """Row of each token in the concatenated groups, int64; then one int64 [n, length] per length."""
        return _grouped(features, np.int64)

    def computed_rows(self, order: Tensor, *chunks: Tensor) -> int:
        return len(order)

    def forward(self, order: Tensor, *chunks: Tensor) -> Tensor:
        """[N_m, E]."""
        if not chunks:
            return self.project.weight.new_zeros(0, self.project.out_features)
        states = [self.encoder(input_ids=chunk).last_hidden_state.flatten(0, 1) for chunk in chunks]
        return self.project(torch.cat(states).index_select(0, order))


class HuggingFaceImage(ImageFrontEnd):
    """A ViT's patch states, or a ResNet's last feature map, at native aspect ratio."""

    def build(self, config: ModelConfig) -> int:
        self.encoder = load(config.image.encoder, {"vit": "", "deit": "", "resnet": ""}, config.image.freeze)
        theirs = self.encoder.config
        self.is_resnet = theirs.model_type == "resnet"
        width = theirs.hidden_sizes[-1] if self.is_resnet else theirs.hidden_size
        self.project = nn.Linear(width, config.width)
        if not self.is_resnet:
            return theirs.patch_size
        return 4 * 2 ** (len(theirs.depths) - 1) * (2 if theirs.downsample_in_first_stage else 1)

    def at_once(self, chunks: Sequence[Tensor]) -> Tensor:
        return self.by_shape(chunks)  # their encoder takes one shape at a time

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] -> [n, rows, cols, E]."""
        pixels = images.to(self.project.weight.dtype).div(127.5).sub(1)  # mean and deviation 0.5, as ViT's
        rows, cols = images.shape[2] // self.cell, images.shape[3] // self.cell
        if self.is_resnet:
            states = self.encoder(pixel_values=pixels).last_hidden_state.permute(0, 2, 3, 1)
        else:
            states = self.encoder(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
            states = states[:, -rows * cols :].unflatten(1, (rows, cols))  # without [CLS] and distillation tokens
        return self.project(states)


class HuggingFaceAudio(nn.Module):
    """The states of wav2vec2 on the waveform, or of Whisper's encoder on its log-mel.  It cannot hide cells."""

    members, special = AudioFrontEnd.members, AudioFrontEnd.special
    decode = staticmethod(AudioFrontEnd.decode)

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__()
        audio = config.audio
        self.encoder = load(audio.encoder, {"wav2vec2": "", "whisper": "encoder"}, audio.freeze)
        theirs = self.encoder.config
        self.is_whisper = theirs.model_type == "whisper"
        self.max_samples = int(audio.max_seconds * SAMPLE_RATE)
        if self.is_whisper:
            from transformers import WhisperFeatureExtractor

            self.mel = WhisperFeatureExtractor(feature_size=theirs.num_mel_bins)
            self.window = 2 * theirs.max_source_positions  # frames of 10 ms
            self.max_samples = min(self.max_samples, self.window * self.mel.hop_length)
        longest = self.max_samples // self.mel.hop_length if self.is_whisper else self.max_samples
        self.longest = longest, f"{self.max_samples / SAMPLE_RATE:g} s"
        self.recipe = f"audio {theirs.model_type} 1: {self.max_samples} {getattr(theirs, 'num_mel_bins', '')}"
        self.positions = (self._rows(self.max_samples) + 1,)
        self.project = nn.Linear(theirs.hidden_size, config.width)

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        """float [n] at 16 kHz -> float16: a waveform [n] of mean 0 and deviation 1, or Whisper's mels [F, mels]."""
        samples = np.asarray(samples, np.float32)[: self.max_samples]
        if self.is_whisper:
            frames = max(1, len(samples) // self.mel.hop_length)
            found = self.mel(samples, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]
            return found.T[:frames].astype(np.float16)
        least = 400  # samples that wav2vec2's convolutions need for one state
        samples = np.pad(samples, (0, max(0, least - len(samples))))
        return ((samples - samples.mean()) / (samples.std() + 1e-7)).astype(np.float16)

    def shape(self, features: np.ndarray) -> int:
        return -(-len(features) // 2) if self.is_whisper else self._rows(len(features))

    def augment(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return features  # these encoders have seen more voices than we can imitate

    def collate(self, features: list[np.ndarray]) -> tuple[Tensor, ...]:
        """Row of each token in the concatenated groups, int64; then one chunk per length, Whisper's at full window."""
        return _grouped(features, np.float32, rows=self.shape)

    def computed_rows(self, order: Tensor, *chunks: Tensor) -> int:
        return sum(len(chunk) for chunk in chunks) * self.window // 2 if self.is_whisper else len(order)

    def forward(self, order: Tensor, *chunks: Tensor) -> Tensor:
        """[N_m, E], clips in sample order."""
        if not chunks:
            return self.project.weight.new_zeros(0, self.project.out_features)
        states = [self._states(chunk.to(self.project.weight.dtype)).flatten(0, 1) for chunk in chunks]
        return self.project(torch.cat(states).index_select(0, order))

    def _states(self, chunk: Tensor) -> Tensor:
        """Waveforms [n, samples] or mels [n, F, mels] -> [n, rows, C]."""
        if not self.is_whisper:
            return self.encoder(chunk).last_hidden_state
        frames = chunk.shape[1]
        # Whisper's mels are cut 8 decades below the loudest, in units of 4: that is what silence is.
        silence = (chunk.amax(dim=(1, 2), keepdim=True) - 2).expand(-1, self.window - frames, chunk.shape[2])
        states = self.encoder(torch.cat([chunk, silence], dim=1).mT).last_hidden_state
        return states[:, : -(-frames // 2)]

    def _rows(self, samples: int) -> int:
        if self.is_whisper:
            return self.window // 2
        for kernel, stride in zip(self.encoder.config.conv_kernel, self.encoder.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(1, samples)


def _grouped(features: list[np.ndarray], dtype, rows=len) -> tuple[Tensor, ...]:
    """Row of each token among the tokens of all groups, in the order of `features`; then what is as long, stacked."""
    groups: dict[int, list[int]] = {}
    for i, feature in enumerate(features):
        groups.setdefault(len(feature), []).append(i)
    chunks, starts, start = [], [0] * len(features), 0
    for _, members in sorted(groups.items()):
        chunks.append(torch.from_numpy(np.stack([features[i] for i in members]).astype(dtype)))
        for i in members:
            starts[i] = start
            start += rows(features[i])
    order = [np.arange(s, s + rows(feature)) for s, feature in zip(starts, features, strict=True)]
    return (torch.from_numpy(np.concatenate([*order, np.zeros(0, np.int64)])), *chunks)


FRONT_ENDS = {"text": HuggingFaceText, "image": HuggingFaceImage, "audio": HuggingFaceAudio}
