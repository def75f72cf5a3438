"""Media conversion: what transparency, palettes, odd rates and huge pictures become."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmodel.data import media


def test_transparency_becomes_white_and_opaque_pixels_stay():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    flat = np.asarray(media.flatten(Image.fromarray(rgba, "RGBA")))
    assert flat[0, 0].tolist() == [10, 20, 30]
    assert abs(int(flat[0, 1, 0]) - 127) <= 1
    assert flat[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])  # all kinds a user's folder may hold
def test_every_mode_decodes_to_rgb(mode):
    image = Image.new(mode, (5, 4), 1 if mode in ("1", "P", "L", "I;16") else None)
    data = io.BytesIO()
    image.save(data, "PNG")
    pixels = media.decode_image(data.getvalue())
    assert pixels.shape == (4, 5, 3)
    assert pixels.dtype == np.uint8


def test_palette_transparency_is_composited_on_decode():
    image = Image.new("P", (3, 3), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    data = io.BytesIO()
    image.save(data, "PNG", transparency=0)
    assert (media.decode_image(data.getvalue()) == 255).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 10), (10, 10)), ((2000, 500), (1024, 256)), ((1, 400_000), (1, 512 * 512))]
)
def test_limit_area_keeps_the_aspect_ratio(size, expected):
    width, height = media.limit_area(Image.new("L", size), 512 * 512).size
    assert width * height <= 512 * 512
    assert width == expected[0]
    assert height <= expected[1]


def test_png_round_trip_is_exact_and_grey_is_kept_small():
    colour = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    assert (media.decode_image(media.encode_png(Image.fromarray(colour))) == colour).all()
    grey = np.repeat(colour[..., :1], 3, axis=2)
    data = media.encode_png(Image.fromarray(grey))
    assert Image.open(io.BytesIO(data)).mode == "L"
    assert (media.decode_image(data) == grey).all()


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (16_000, 1), (8_000, 1), (11_025, 2)])
def test_speech_becomes_16_khz_mono_at_the_same_pitch(rate, channels):
    t = np.arange(rate) / rate
    tone = np.stack([np.sin(2 * np.pi * 440 * t)] * channels, axis=1)
    file = io.BytesIO()
    soundfile.write(file, 0.5 * tone, rate, format="WAV")
    waveform = media.decode_speech(file.getvalue())
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 16_000) <= 1
    spectrum = np.abs(np.fft.rfft(waveform))
    assert abs(spectrum.argmax() * 16_000 / len(waveform) - 440) <= 1
    assert abs(np.abs(waveform[2000:-2000]).max() - 0.5) < 0.01


def test_flac_round_trip_clips_and_keeps_16_bits():
    waveform = np.linspace(-1.5, 1.5, 1000, dtype=np.float32)
    back = media.decode_speech(media.encode_flac(waveform))
    assert np.abs(back - np.clip(waveform, -1, 1)).max() <= 1 / 2**15 + 1e-6


def test_empty_audio_is_an_error():
    file = io.BytesIO()
    soundfile.write(file, np.zeros((0, 1)), 16_000, format="WAV")
    with pytest.raises(ValueError, match="no samples"):
        media.decode_speech(file.getvalue())
