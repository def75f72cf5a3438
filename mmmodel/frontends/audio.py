"""Audio front end: 16 kHz log-mel at 10 ms, then convolutions of total time stride 4.   F mel frames, C channels."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from mmmodel.configs import ModelConfig
from mmmodel.data import media
from mmmodel.data.media import SAMPLE_RATE
from mmmodel.data.shards import AUDIO

HOP, WINDOW, FFT = 160, 400, 512
STRIDE = 4
SILENCE_DB = 40.0  # frames this far below the loudest are silence at the ends of a clip
KERNELS = ((5, 2), (3, 2), (3, 1))  # (width, stride) of each convolution
# Zero frames between clips: each convolution sees as many zeros as it would past the end of a clip of its own.
GAP = 4


class AudioFrontEnd(nn.Module):
    """Three convolutions over time, each with LayerNorm over the channels of a frame.

    The clips of a batch stand in one row of frames with gaps, which are set to zero again before each convolution: so
    each clip gets exactly what it would get alone with zeros around it, and nothing is padded to the longest.
    """

    members = AUDIO
    special = "[AUD]"
    decode = staticmethod(media.decode_speech)

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__()
        self.mels = config.audio.mels
        self.max_frames = int(config.audio.max_seconds * SAMPLE_RATE / HOP)
        self.longest = self.max_frames, f"{config.audio.max_seconds:g} s"
        self.recipe = f"audio 1: {self.mels} {self.max_frames}"  # what `prepare` gives; names the cache
        self.positions = (-(-self.max_frames // STRIDE) + 1,)  # + 1: the special token sits at position 0
        self.cell_width = STRIDE * self.mels
        channels = config.audio.channels
        widths = (self.mels, channels, config.width, config.width)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride=stride, padding=kernel // 2, bias=False)
            for a, b, (kernel, stride) in zip(widths[:-1], widths[1:], KERNELS, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        """float [n] at 16 kHz -> float16 [F, mels]: log-mel without the silence at both ends.

        Each mel band of a clip has mean zero, and the clip has deviation one: loudness and microphone drop out.
        """
        mel = log_mel(torch.from_numpy(np.ascontiguousarray(samples, np.float32)), self.mels).numpy()
        if not np.isfinite(mel).all():
            if not np.isfinite(samples).all():
                raise ValueError("not all of its samples are finite")
            raise ValueError(f"its power is beyond fp32, for samples reach {np.abs(samples).max():g}; expected about 1")
        mel = _trimmed(mel)[: self.max_frames]
        mel = mel - mel.mean(axis=0)
        return (mel / (mel.std() + 1e-3)).astype(np.float16)

    def shape(self, features: np.ndarray) -> int:
        return -(-len(features) // STRIDE)

    def cells(self, features: np.ndarray) -> np.ndarray:
        """Frames of each token that has all its own, float32 [F // 4, 4 mels]."""
        whole = len(features) // STRIDE
        return features[: whole * STRIDE].reshape(whole, self.cell_width).astype(np.float32)

    def hide(self, features: np.ndarray, places: np.ndarray) -> np.ndarray:
        """A copy with the frames of the tokens at `places` zero, which is the mean."""
        hidden = features.copy()
        hidden[(places[:, None] * STRIDE + np.arange(STRIDE)).reshape(-1)] = 0
        return hidden

    def augment(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Change of speed and pitch, then a band of mels and a stretch of time set to zero (the mean)."""
        frames = len(features)
        out = max(STRIDE, min(int(frames * rng.uniform(0.85, 1.18)), self.max_frames))
        features = _resampled(features.astype(np.float32), out, axis=0)
        features = _shifted(features, rng.uniform(-1.5, 1.5) * self.mels / 40)
        band, first = rng.integers(0, self.mels // 6 + 1), rng.integers(0, self.mels)
        features[:, first : first + band] = 0
        stretch, first = rng.integers(0, out // 8 + 1), rng.integers(0, out)
        features[first : first + stretch] = 0
        return features

    def collate(self, features: list[np.ndarray]) -> tuple[Tensor, ...]:
        """Frames [F, mels] with gaps; which frames are real, per convolution input; output row of each token."""
        starts, start = [], 0
        for clip in features:
            starts.append(start)
            start += -(-len(clip) // STRIDE) * STRIDE + GAP
        total = max(start, STRIDE)
        frames = np.zeros((total, self.mels), np.float32)
        masks = [np.zeros(total // stride, bool) for stride in (2, 4)]
        rows = []
        for clip, begin in zip(features, starts, strict=True):
            frames[begin : begin + len(clip)] = clip
            for mask, stride in zip(masks, (2, 4), strict=True):
                mask[begin // stride : begin // stride - (-len(clip) // stride)] = True
            rows.append(np.arange(begin // STRIDE, begin // STRIDE + self.shape(clip)))
        order = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return (torch.from_numpy(frames), *map(torch.from_numpy, masks), torch.from_numpy(order))

    def computed_rows(self, frames: Tensor, *rest: Tensor) -> int:
        return len(frames) // STRIDE

    def forward(self, frames: Tensor, half: Tensor, quarter: Tensor, order: Tensor) -> Tensor:
        """[N_m, E], clips in sample order."""
        x = frames.to(self.convs[0].weight.dtype)
        for conv, norm, real in zip(self.convs, self.norms, (half, quarter, None), strict=True):
            x = conv(x.t().unsqueeze(0)).squeeze(0).t()  # [frames, C]
            x = nn.functional.gelu(norm(x), approximate="tanh")
            if real is not None:
                x = x.masked_fill(~real.unsqueeze(1), 0)  # the norm's bias must not fill the gaps
        return x.index_select(0, order)


def log_mel(samples: Tensor, mels: int) -> Tensor:
    """float [n] -> natural log of mel power [F, mels], one frame every 10 ms."""
    if samples.numel() < FFT:
        samples = nn.functional.pad(samples, (0, FFT - samples.numel()))
    spectrum = torch.stft(
        samples,
        FFT,
        HOP,
        WINDOW,
        window=torch.hann_window(WINDOW),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = spectrum.abs().square()  # [FFT / 2 + 1, F]
    return (_mel_filters(mels) @ power).clamp_min(1e-8).log().t()


@functools.cache
def _mel_filters(mels: int) -> Tensor:
    """Triangles evenly spaced on the HTK mel scale from 20 Hz to 8 kHz, [mels, FFT / 2 + 1]."""
    hertz = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)
    edges = 700 * (10 ** (np.linspace(_mel(20.0), _mel(SAMPLE_RATE / 2), mels + 2) / 2595) - 1)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


def _mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)


def _trimmed(mel: np.ndarray) -> np.ndarray:
    """Without quiet frames at both ends; one frame of margin stays."""
    loud = np.flatnonzero(mel.max(axis=1) > mel.max() - SILENCE_DB * np.log(10) / 10)
    return mel[max(0, loud[0] - 1) : loud[-1] + 2]


def _resampled(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation of one axis to `size` points."""
    return _interpolated(x, np.linspace(0, x.shape[axis] - 1, size), axis)


def _shifted(mel: np.ndarray, bins: float) -> np.ndarray:
    """Up or down in pitch by a fraction of mel bins; the edge bin repeats."""
    return _interpolated(mel, np.clip(np.arange(mel.shape[1]) - bins, 0, mel.shape[1] - 1), axis=1)


def _interpolated(x: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    share = (at - low).astype(x.dtype)
    share = share[:, None] if axis == 0 else share[None, :]
    return x.take(low, axis) * (1 - share) + x.take(high, axis) * share
