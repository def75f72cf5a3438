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


def encoded(image, kind, **how):
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


@pytest.mark.parametrize(("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_16_bits_become_8_by_value(dtype, kind):
    """pillow's own conversion clips at 255: a scan in 16 bits would be white.  I;16 and I are its two modes for it."""
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65407, 65535]], dtype)
    pixels = media.decode_image(encoded(Image.fromarray(values), kind))
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [128, 156, 255, 255]]
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("value", [np.float32(0.5), np.int32(70_000), np.int32(-1)])
def test_32_bit_pixels_are_refused(value):
    """Nobody says what is white."""
    with pytest.raises(ValueError, match=r"pixels are 32-bit numbers, expected 8 or 16 bits per channel"):
        media.decode_image(encoded(Image.fromarray(np.full((2, 2), value)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_stands_upright(kind, tmp_path):
    """A phone writes what its sensor sees and, in EXIF's orientation, how it was held: 6 is a quarter turn."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16] = 255  # the left third, which is the top of the upright picture
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(pixels), kind, exif=exif)
    upright = media.decode_image(data)
    assert upright.shape == (48, 16, 3)
    assert upright[2:14].min() > 200
    assert upright[18:].max() < 50
    (tmp_path / "photo").write_bytes(data)
    assert media.open_image(tmp_path / "photo").size == (16, 48)


def test_the_transparent_value_of_a_grey_png_of_16_bits_becomes_white():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[1000, 40_000]], np.uint16)).save(buffer, "PNG", transparency=1000)
    assert media.decode_image(buffer.getvalue())[0, :, 0].tolist() == [255, 156]


def test_broken_exif_of_a_good_picture_says_nothing():
    data = encoded(Image.new("RGB", (3, 2), "green"), "PNG", exif=b"Exif\0\0nonsense")
    assert media.decode_image(data).shape == (2, 3, 3)


def test_what_is_wrong_is_said_in_words():
    """Both libraries name the object in memory that they were given."""
    for decode in (media.decode_image, media.decode_speech):
        with pytest.raises(ValueError, match=r"no picture|as sound") as caught:
            decode(b"nonsense")
        assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sound_that_is_not_finite_is_refused(value):
    waveform = np.zeros(800)
    waveform[3] = value
    file = io.BytesIO()
    soundfile.write(file, waveform, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(ValueError, match="not numbers, or infinite"):
        media.decode_speech(file.getvalue())


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


@pytest.mark.parametrize(
    ("rate", "samples", "said"), [(44_100, 1, "0 ms"), (16_000, 1, "0.0625 ms"), (8000, 79, "9.88")]
)
def test_a_sound_shorter_than_a_frame_is_an_error(rate, samples, said):
    """Padded to one it was a click, or silence where resampling left no sample."""
    file = io.BytesIO()
    soundfile.write(file, np.full(samples, 0.5), rate, format="WAV")
    with pytest.raises(ValueError, match=f"the sound lasts {said}.* expected at least 10"):
        media.decode_speech(file.getvalue())


@pytest.mark.parametrize(
    ("kind", "subtype", "said"),
    [
        ("WAV", "PCM_16", "its header says 96000 bytes, 95000 are there"),
        ("AIFF", "PCM_16", "its header says 960.. bytes, 950.. are there"),
        ("AU", "PCM_16", "its header says 96000 bytes, 95000 are there"),
        ("W64", "PCM_16", "its header says 961.. bytes, 951.. are there"),
        ("RF64", "PCM_16", "its header says 48000 frames, 47500 are there"),
        ("MP3", "MPEG_LAYER_III", "its header says 48000 frames, 4.... are there"),
        ("OGG", "VORBIS", "it ends before the last page"),
        ("OGG", "OPUS", "it ends before the last page"),
    ],
)
def test_a_sound_that_is_cut_short_is_an_error(kind, subtype, said):
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    soundfile.write(file, noise, 16_000, format=kind, subtype=subtype)
    assert len(media.decode_speech(file.getvalue())) == 48_000
    with pytest.raises(ValueError, match=f"the sound is cut short: {said}"):
        media.decode_speech(file.getvalue()[:-1000])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
# 70,000 bytes are more than libsndfile looks back for the last page
@pytest.mark.parametrize("appended", [b"\n", b"TAG" + bytes(125), bytes(70_000)], ids=["newline", "id3v1", "zeros"])
def test_what_is_appended_to_a_whole_ogg_does_not_count(subtype, appended, tmp_path):
    file = tmp_path / "a.ogg"
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, subtype=subtype)
    file.write_bytes(file.read_bytes() + appended)
    assert len(media.decode_speech(file)) == len(media.decode_speech(file.read_bytes())) == 48_000


@pytest.mark.parametrize(
    "kept", [0, 2, 10, 30, -1]
)  # bytes of the last page: none, of its name, its header, its lacing, its end
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_ends_before_its_last_page_does_is_cut_short(kept, subtype, tmp_path):
    file = tmp_path / "a.ogg"
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, subtype=subtype)
    whole = file.read_bytes()
    last = whole.rindex(b"OggS")
    file.write_bytes(whole[:last] + whole[last:][:kept])
    with pytest.raises(ValueError, match="the sound is cut short: it ends before the last page"):
        media.decode_speech(file)


@pytest.mark.parametrize(("more", "whole"), [(1, True), (2, True), (20, False)])
def test_an_mp3_may_count_two_frames_too_many(more, whole):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 132_300), 44_100, format="MP3")
    data = bytearray(file.getvalue())
    at = data.index(b"Xing") + 8
    data[at : at + 4] = (int.from_bytes(data[at : at + 4]) + more).to_bytes(4)
    if whole:
        assert abs(len(media.decode_speech(bytes(data))) - 48_000) < 1000
        return
    with pytest.raises(ValueError, match="the sound is cut short: its header says"):
        media.decode_speech(bytes(data))


def test_an_mp3_that_does_not_say_how_many_frames_follow_is_read():
    """Their number is a guess then."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, format="MP3")
    assert len(media.decode_speech(file.getvalue().replace(b"Xing", b"\0\0\0\0"))) > 0


@pytest.mark.parametrize("unknown", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_of_a_stream_states_no_length(unknown):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1000, np.float32), 16_000, format="WAV", subtype="PCM_16")
    written = file.getvalue()
    streamed = written.replace((2000).to_bytes(4, "little"), unknown.to_bytes(4, "little"))
    assert streamed != written
    assert len(media.decode_speech(streamed)) == 1000
