"""Front ends: what a sample gets never depends on its neighbours, and nothing is lost on the way in."""

import copy

import numpy as np
import pytest
import torch

from mmkernels.testing import assert_error_rule
from mmmodel import configs, frontends
from mmmodel.frontends.audio import HOP, KERNELS, SAMPLE_RATE, log_mel
from mmmodel.frontends.image import fit_grid
from mmmodel.frontends.text import SPECIAL_TOKENS, load_tokenizer, special_ids, train_tokenizer

CAPTIONS = ["A flower.", "Une fleur rouge.", "Красный цветок.", "Ένα λουλούδι.", "A red rocket!"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 300)


@pytest.fixture(scope="module")
def front_ends(tokenizer):
    torch.manual_seed(0)
    return frontends.build(configs.tiny().model, tokenizer).eval()


def images(rng):
    """Many shapes, two equal ones far apart: grouping must not mix up the order."""
    sides = [(16, 16), (32, 48), (16, 64), (32, 48), (48, 16), (16, 16)]
    return [rng.integers(0, 256, (3, h, w), dtype=np.uint8) for h, w in sides]


def clips(rng):
    """One frame; below, at and above the stride; long."""
    return [rng.normal(size=(frames, 8)).astype(np.float16) for frames in (1, 3, 4, 5, 57, 2)]


MAKERS = {"image": images, "audio": clips}


def run(front_end, features):
    with torch.no_grad():
        return front_end(*front_end.collate(features))


def rows_of(front_end, features):
    return np.cumsum([0, *(int(np.prod(front_end.shape(f))) for f in features)])


@pytest.mark.parametrize("name", MAKERS)
def test_stream_has_the_rows_that_shape_promises(front_ends, name):
    features = MAKERS[name](np.random.default_rng(0))
    out = run(front_ends[name], features)
    assert out.shape == (rows_of(front_ends[name], features)[-1], 16)
    assert torch.isfinite(out).all()
    assert run(front_ends[name], []).shape == (0, 16)


@pytest.mark.parametrize("name", MAKERS)
def test_bit_equal_when_only_neighbours_values_change(front_ends, name):
    front_end, features = front_ends[name], MAKERS[name](np.random.default_rng(0))
    before, bounds = run(front_end, features), rows_of(front_end, features)
    for keep in range(len(features)):
        fill = np.nan if name == "audio" else 255
        changed = [f if i == keep else np.full_like(f, fill) for i, f in enumerate(features)]
        after = run(front_end, changed)
        own = slice(bounds[keep], bounds[keep + 1])
        assert torch.equal(before[own], after[own]), keep


@pytest.mark.parametrize("name", MAKERS)
def test_within_the_error_rule_when_the_batch_changes(front_ends, name):
    front_end, features = front_ends[name], MAKERS[name](np.random.default_rng(0))
    together, bounds = run(front_end, features), rows_of(front_end, features)
    exact = copy.deepcopy(front_end).double()
    for i, feature in enumerate(features):
        own = together[bounds[i] : bounds[i + 1]]
        assert_error_rule(f"{name} {i}", own, run(exact, [feature]), run(front_end, [feature]))


def test_audio_is_a_plain_convolution_of_each_clip_alone(front_ends):
    """With zeros around the clip at every layer: the reference has no gaps and no masks."""
    front_end = copy.deepcopy(front_ends["audio"]).double()
    for norm in front_end.norms:  # a bias that would fill the gaps
        torch.nn.init.constant_(norm.bias, 0.5)
    features = clips(np.random.default_rng(1))
    expected = []
    for clip in features:
        x = torch.from_numpy(clip.astype(np.float64)).t()[None]
        for conv, norm, (kernel, stride) in zip(front_end.convs, front_end.norms, KERNELS, strict=True):
            x = torch.nn.functional.conv1d(x, conv.weight, stride=stride, padding=kernel // 2)
            x = torch.nn.functional.gelu(norm(x.mT), approximate="tanh").mT
        expected.append(x[0].t())
    torch.testing.assert_close(run(front_end, features), torch.cat(expected))


@pytest.mark.parametrize("text", ["A flower.", "Ένα λουλούδι", "ein schöner Käfer", "漢字 🚀 \t x", ""])
def test_text_round_trip_in_scripts_seen_and_unseen(front_ends, tokenizer, text):
    ids = front_ends["text"].prepare(text)
    assert ids[0] == tokenizer.token_to_id("[CLS]")
    whole = tokenizer.encode(text).ids
    assert tokenizer.decode(whole) == text.lower()
    assert ids[1:].tolist() == whole[: configs.tiny().model.text.max_tokens - 1]
    assert (ids[1:] >= len(SPECIAL_TOKENS)).all()


def test_names_of_special_tokens_in_a_caption_are_words(tokenizer, tmp_path):
    """Of a new tokenizer, one read from a file, and a copy: none of them keeps the flag."""
    caption = "a[MASK][CLS][IMG][AUD]"
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = [frontends.build(configs.tiny().model, t) for t in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json"))]
    for front_end in (built["text"] for built in (*made, copy.deepcopy(made[0]))):
        ids = front_end.prepare(caption)
        assert ids[0] == front_end.tokenizer.token_to_id("[CLS]")
        assert not set(ids[1:].tolist()) & set(special_ids(tokenizer).tolist())
        assert front_end.tokenizer.decode(ids[1:].tolist()) == caption.lower()


def test_tokenizer_does_not_depend_on_the_order_of_captions():
    assert train_tokenizer(CAPTIONS, 300).to_str() == train_tokenizer(CAPTIONS[::-1] * 2, 300).to_str()


def test_a_caption_of_a_million_letters_takes_no_longer_than_its_beginning(front_ends):
    """The tokenizer's time grows with the square of a word's length: this one would take it an hour."""
    long = "a" * 1_000_000
    assert train_tokenizer([*CAPTIONS, long], 300).to_str() == train_tokenizer([*CAPTIONS, long[:10_000]], 300).to_str()
    ids = front_ends["text"].prepare("red star " * 500_000)
    np.testing.assert_array_equal(ids, front_ends["text"].prepare("red star " * 100))


@pytest.mark.parametrize("enlarge", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 6, 64, 1024])
def test_grid_is_within_the_budget_and_keeps_the_aspect(max_tokens, enlarge):
    rng = np.random.default_rng(0)
    for _ in range(300):
        h, w = (int(2 ** rng.uniform(2.8, 11)) for _ in range(2))  # 7 to 2048 pixels
        rows, cols = fit_grid(h, w, max_tokens, enlarge)
        assert rows >= 1
        assert cols >= 1
        assert rows * cols <= max_tokens
        if max_tokens == 1024 and enlarge:  # cells are small enough to follow any shape up to 8 : 1
            aspect = np.clip(w / h, 1 / 8, 8)
            assert abs(np.log(cols / rows / aspect)) < 0.15


def test_small_images_are_enlarged_only_on_request():
    assert fit_grid(40, 40, 64, enlarge=True) == (8, 8)
    rows, cols = fit_grid(40, 40, 64, enlarge=False)
    assert rows * cols <= 9


def test_log_mel_finds_a_tone_and_counts_frames():
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    mel = log_mel(torch.from_numpy(np.sin(2 * np.pi * 1000 * t).astype(np.float32)), 40)
    assert mel.shape == (SAMPLE_RATE // HOP + 1, 40)
    centres = 700 * (10 ** (np.linspace(31.7, 2840.0, 42)[1:-1] / 2595) - 1)
    assert abs(centres[mel.mean(0).argmax()] - 1000) < 60  # half the distance between bands there


def test_silence_at_the_ends_takes_no_tokens_and_loudness_none_of_the_signal(front_ends):
    rng = np.random.default_rng(0)
    sound = rng.normal(size=4000) * np.hanning(4000)
    quiet = np.zeros(4000)
    alone = front_ends["audio"].prepare(np.concatenate([quiet, sound, quiet]))
    assert len(alone) < 45  # 25 ms windows around 250 ms
    louder = front_ends["audio"].prepare(np.concatenate([quiet, 5 * sound, quiet]))
    np.testing.assert_allclose(alone.astype(float), louder.astype(float), atol=2e-2)


@pytest.mark.parametrize("samples", [1, 100, 16_000 * 3])  # below a window; longer than tiny's one second
def test_any_clip_gives_between_one_frame_and_the_limit(front_ends, samples):
    mel = front_ends["audio"].prepare(np.random.default_rng(0).normal(size=samples))
    assert 1 <= len(mel) <= 100
    assert np.isfinite(mel.astype(float)).all()
    assert np.isfinite(front_ends["audio"].prepare(np.zeros(samples)).astype(float)).all()


def test_sound_whose_power_is_no_number_is_told(front_ends):
    with pytest.raises(ValueError, match=r"beyond fp32, for samples reach 1e\+30; expected about 1"):
        front_ends["audio"].prepare(np.full(1000, 1e30, np.float32))
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^not all of its samples are finite$"):
            front_ends["audio"].prepare(np.array([0.1] * 999 + [wrong], np.float32))


@pytest.mark.parametrize("name", MAKERS)
def test_augmentation_keeps_the_kind_and_repeats_with_its_seed(front_ends, name):
    front_end = front_ends[name]
    for feature in MAKERS[name](np.random.default_rng(0)):
        one = front_end.augment(feature, np.random.default_rng(7))
        two = front_end.augment(feature, np.random.default_rng(7))
        np.testing.assert_array_equal(one, two)
        front_end.collate([one])
        if name == "image":
            assert one.shape == feature.shape
            assert one.dtype == np.uint8
