"""Media files to what shards hold: an RGB or grey PNG on white, and 16 kHz mono FLAC; and back to arrays.

soxr resamples: scipy is no dependency of ours, torchaudio is not needed for anything else, and soxr's polyphase filters
are both better and faster than what a page of numpy would give.  Both are imported where sound is read or written: a
machine that only times steps or decodes pictures need not have them.
"""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SAMPLE_RATE = 16_000
SHORTEST = SAMPLE_RATE // 100  # samples of a sound: 10 ms, the step from one frame of a spectrum to the next


def open_image(path: Path) -> Image.Image:
    """An image file as pillow sees it; SVG is drawn by resvg at its own size."""
    if path.suffix != ".svg":
        with Image.open(path) as image:
            return upright(image)
    import resvg_py  # only the stamps need it

    # 96 dpi as in CSS: the default of 0 makes every drawing sized in pt, mm or cm "invalid". Without width, height and
    # viewBox resvg takes the bounding box of what is drawn.
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), dpi=96))))


def upright(image: Image.Image) -> Image.Image:
    """Loaded, and turned as EXIF's orientation says; EXIF that does not read says nothing."""
    image.load()
    with contextlib.suppress(Exception):  # SyntaxError, struct.error ... for broken EXIF of a picture that is good
        ImageOps.exif_transpose(image, in_place=True)
    return image


def flatten(image: Image.Image) -> Image.Image:
    """Composite palette, grey and alpha images on white; RGB."""
    image = _eight_bits(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by value, where pillow would clip it at 255.  Raises ValueError for values that say no brightness."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are 32-bit numbers, expected 8 or 16 bits per channel")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255  # the one value that a PNG may call transparent
    return Image.fromarray(grey)


def limit_area(image: Image.Image, max_area: int) -> Image.Image:
    """Shrink to at most max_area pixels, keeping the aspect ratio; smaller images are left alone."""
    width, height = image.size
    if width * height <= max_area:
        return image
    scale = (max_area / (width * height)) ** 0.5
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    height = min(height, max_area // width)  # a strip one pixel wide or high may still be too large
    width = min(width, max_area // height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes; a picture without colour is kept as grey, a third of the size."""
    pixels = np.asarray(image)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        image = image.convert("L")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """Encoded bytes as pillow sees them.  Raises ValueError for what it does not know."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # says where the bytes lie in memory
        raise ValueError("it is no picture of a kind that pillow reads") from None


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] from encoded bytes of any kind pillow reads, upright; transparency becomes white."""
    with opened(data) as image:
        return pixels(image)


def pixels(image: Image.Image) -> np.ndarray:
    """decode_image, of what pillow has opened, which it turns."""
    image = upright(image)
    opaque = image.mode in ("RGB", "L") and "transparency" not in image.info
    return np.array(image.convert("RGB") if opaque else flatten(image))


def decode_text(data: bytes) -> str | None:
    """A caption, UTF-8 with or without a byte order mark; None where it is blank, which says nothing about a sample."""
    try:
        return data.decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def decode_speech(source: Path | bytes) -> np.ndarray:
    """float32 [samples] at 16 kHz, mono, from any file libsndfile reads.

    Raises ValueError for less than 10 ms, for samples that are not finite, for less than its header says (WAV, W64,
    RF64, AIFF, AU and most MP3 say it; of MP3 by more than two frames, for encoders count as they like), and for an Ogg
    that ends before the page that says so.  What others append to a whole file, such as a tag, zeros or a newline, does
    not count.
    """
    import soundfile

    stream = str(source) if isinstance(source, Path) else io.BytesIO(source)
    try:
        with soundfile.SoundFile(stream) as file:
            waveform, rate, log = file.read(dtype="float32", always_2d=True), file.samplerate, file.extra_info
            stated = file.frames
    except soundfile.LibsndfileError as error:  # its message says where the bytes lie in memory
        raise ValueError(f"it does not read as sound: {error.error_string}") from None
    if waveform.shape[0] == 0:
        raise ValueError("the file holds no samples")
    refuse_cut_short(source, log, stated, len(waveform))
    refuse_infinite(waveform)
    channels = waveform.T
    mono = sum(channels[1:], channels[0]) / np.float32(
        len(channels)
    )  # mean(axis=1) is five times slower on two columns
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    refuse_short(mono)
    return np.ascontiguousarray(mono, dtype=np.float32)


# What libsndfile logs of a chunk of samples that reaches past the end of its file; of W64 it is the whole file.
_CUT_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_FRAMES_CUT = re.compile(r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)")  # of RF64
_COUNTED = re.compile(r"bitrate mode\s*: (?:variable|average)")  # of an MP3 whose first frame says how many follow
_MP3_SLACK = 2 * 1152  # samples of two frames; some encoders count the first frame, which holds no sound, or padding
# Of Ogg: the start of a page, or what was appended; or the last page is not the one that ends its stream.
_UNENDED = re.compile(r"^Ogg ?: (?:Junk after the last page|Last page lacks an end-of-stream bit)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7FFF0000  # and more: written by who streams and does not know the length


def refuse_cut_short(source: Path | bytes, log: str, frames: int, read: int) -> None:
    """log: libsndfile's of the file.  frames: how many it expected; read: how many there were."""
    found = [(stated, there, "bytes") for stated, there in _CUT_SHORT.findall(log)]
    found += [(stated, there, "frames") for there, stated in _FRAMES_CUT.findall(log)]
    if _COUNTED.search(log) and read < frames - _MP3_SLACK:  # of other MP3 the number is a guess by the file's size
        found.append((frames, read, "frames"))
    for stated, there, unit in found:
        if int(there) < int(stated) < _UNKNOWN_SIZE:
            raise ValueError(f"the sound is cut short: its header says {stated} {unit}, {there} are there")
    if _UNENDED.search(log) and not _ends_with_its_stream(source.read_bytes() if isinstance(source, Path) else source):
        raise ValueError("the sound is cut short: it ends before the last page of its stream does")


def _ends_with_its_stream(ogg: bytes) -> bool:
    """Whether the last page is whole and says that its stream ends there.  RFC 3533, section 6."""
    page = ogg[ogg.rfind(b"OggS") :]
    header = page[:27]  # flags in byte 5, the number of lacing values in 26; these follow, and add up to the rest
    if len(header) < 27 or not header[5] & 4:
        return False
    lacing = page[27 : 27 + header[26]]
    return len(page) >= 27 + header[26] + sum(lacing)


def refuse_infinite(waveform: np.ndarray) -> None:
    if not np.isfinite(waveform).all():
        raise ValueError("the sound holds samples that are not numbers, or infinite")


def refuse_short(waveform: np.ndarray) -> None:
    """waveform: at 16 kHz.  Padded to a frame, a click would be read, or silence where resampling left nothing."""
    if len(waveform) < SHORTEST:
        raise ValueError(f"the sound lasts {len(waveform) / SAMPLE_RATE * 1000:.3g} ms, expected at least 10")


def encode_flac(waveform: np.ndarray) -> bytes:
    """16-bit FLAC of a 16 kHz mono waveform; resampling may overshoot, so it is clipped to [-1, 1]."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
