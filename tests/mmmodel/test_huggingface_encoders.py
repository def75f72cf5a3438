"""Hugging Face encoders as front ends: the same states as theirs, nothing from a neighbour, and a run through each."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from builders import assert_same_run
from test_language_model import CAPTIONS, write_model

from mmmodel import configs, frontends, train
from mmmodel.configs import ConfigError
from mmmodel.export import from_pretrained
from mmmodel.frontends.text import load_language_model_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")
RATE = 16_000


def tiny_config(kind):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    whisper = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    whisper |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return {
        "vit": lambda: transformers.ViTConfig(**small, image_size=32, patch_size=8),
        "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1]),
        "wav2vec2": lambda: transformers.Wav2Vec2Config(
            **small, attention_dropout=0.0, conv_dim=[8, 8], conv_kernel=[10, 8], conv_stride=[20, 16],
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
            feat_extract_norm="layer"),
        "whisper": lambda: transformers.WhisperConfig(
            **whisper, **tokens, num_mel_bins=16, max_source_positions=50, max_target_positions=8),
    }[kind]()  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    made = {"bert": write_model(tmp_path_factory.mktemp("bert"), "bert", max_position_embeddings=32)}
    for kind in ("vit", "resnet", "wav2vec2", "whisper"):
        made[kind] = tmp_path_factory.mktemp(kind)
        transformers.AutoModel.from_config(tiny_config(kind)).save_pretrained(made[kind])
    return made


MODALITY = {"bert": "text", "vit": "image", "resnet": "image", "wav2vec2": "audio", "whisper": "audio"}


def swapped(folders, kind, **fields):
    name = MODALITY[kind]
    model = configs.tiny().model
    part = dataclasses.replace(getattr(model, name), encoder=str(folders[kind]), **fields)
    return dataclasses.replace(model, **{name: part})


def front_end_of(folders, kind, **fields):
    torch.manual_seed(0)
    config = swapped(folders, kind, **fields)
    own = kind != "bert"
    tokenizer = (
        train_tokenizer(CAPTIONS, 280) if own else load_language_model_tokenizer(folders[kind] / "tokenizer.json")
    )
    return frontends.build(config, tokenizer)[MODALITY[kind]].eval()


def raw(kind):
    rng = np.random.default_rng(0)
    if kind == "bert":
        return CAPTIONS
    if MODALITY[kind] == "image":
        return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((64, 64), (40, 130), (64, 64), (200, 90))]
    return [rng.normal(size=n).astype(np.float32) for n in (300, 4000, 16000, 4000)]


def their_rows(front_end, kind, feature):
    """The states of one segment alone, by transformers itself."""
    encoder = front_end.encoder.encoder
    if kind == "bert":
        return encoder(input_ids=torch.from_numpy(feature.astype(np.int64))[None]).last_hidden_state[0]
    if kind == "whisper":
        window = 2 * front_end.encoder.config.max_source_positions
        padded = np.full((window, feature.shape[1]), feature.astype(np.float32).max() - 2, np.float32)
        padded[: len(feature)] = feature
        states = encoder(torch.from_numpy(padded.T[None])).last_hidden_state[0]
        return states[: -(-len(feature) // 2)]
    if kind == "wav2vec2":
        return encoder(torch.from_numpy(feature.astype(np.float32))[None]).last_hidden_state[0]
    pixels = torch.from_numpy(feature.astype(np.float32) / 127.5 - 1)[None]
    if kind == "resnet":
        return encoder(pixels).last_hidden_state[0].flatten(1).T
    return encoder(pixels, interpolate_pos_encoding=True).last_hidden_state[0, 1:]


@pytest.mark.parametrize("kind", MODALITY)
def test_rows_are_the_projected_states_of_each_segment_alone(folders, kind):
    """Ragged segments, two of equal shape far apart; as many rows as `shape` promises."""
    front_end = front_end_of(folders, kind)
    features = [front_end.prepare(one) for one in raw(kind)]
    with torch.no_grad():
        stream = front_end(*front_end.collate(features))
        expected = [front_end.project(their_rows(front_end, kind, feature)) for feature in features]
    sizes = [int(np.prod(front_end.shape(feature))) for feature in features]
    assert [len(rows) for rows in expected] == sizes
    torch.testing.assert_close(stream, torch.cat(expected), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert front_end(*front_end.collate([])).shape == (0, 16)
    assert front_end.computed_rows(*front_end.collate(features)) >= sum(sizes)


def test_whispers_features_are_its_own_with_silence_to_the_window(folders):
    """Against the extractor that pads the waveform itself."""
    front_end = front_end_of(folders, "whisper")
    samples = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    feature = front_end.prepare(samples).astype(np.float32)
    theirs = front_end.mel(samples, sampling_rate=RATE, return_tensors="np").input_features[0].T[:100]
    np.testing.assert_allclose(feature, theirs[: len(feature)], atol=2e-3)
    np.testing.assert_allclose(theirs[len(feature) + 3 :], theirs.max() - 2, atol=1e-4)


@pytest.mark.parametrize("kind", ["resnet", "vit", "wav2vec2"])
def test_training_mode_does_not_let_neighbours_in(folders, kind):
    """BatchNorm is the classic leak: what a segment gets stays the same when its neighbours' values change."""
    front_end = front_end_of(folders, kind).train()
    for module in front_end.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(front_end.encoder.config, "layerdrop"):
        front_end.encoder.config.layerdrop = 0.0
    features = [front_end.prepare(one) for one in raw(kind)]
    changed = [features[0], *(np.zeros_like(feature) for feature in features[1:])]
    rows = int(np.prod(front_end.shape(features[0])))
    with torch.no_grad():
        one, other = (front_end(*front_end.collate(these))[:rows] for these in (features, changed))
    assert torch.equal(one, other)


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_encoders_get_no_gradient(folders, freeze):
    front_end = front_end_of(folders, "vit", freeze=freeze).train()
    features = [front_end.prepare(one) for one in raw("vit")]
    front_end(*front_end.collate(features)).square().sum().backward()
    assert front_end.project.weight.grad is not None
    learns = [p.grad is not None for p in front_end.encoder.parameters()]
    assert not any(learns) if freeze else all(learns)


@pytest.mark.parametrize("kind", ["bert", "resnet", "wav2vec2"])
def test_a_run_trains_through_it_and_comes_back(folders, kind, tiny, tmp_path):
    """All objectives that it can serve; then the exported model computes the same bits."""
    masked = "objectives.masked_image.weight=0.1" if kind != "resnet" else "objectives.masked_audio.weight=0.1"
    config = configs.override(dataclasses.replace(tiny, steps=2, model=swapped(folders, kind)), (masked,))
    assert train.pretrain(config, tmp_path / "run")
    one, two = from_pretrained(tmp_path / "run"), from_pretrained(tmp_path / "run")
    front_end, again = (learner.model.front_ends[MODALITY[kind]] for learner in (one, two))
    features = [front_end.prepare(text) for text in raw(kind)]
    with torch.no_grad():
        assert torch.equal(front_end(*front_end.collate(features)), again(*again.collate(features)))


@pytest.mark.parametrize("kind", ["bert", "wav2vec2"])
def test_a_stopped_run_goes_on_with_the_dropout_of_its_steps(folders, kind, tiny, tmp_path):
    """Their encoders drop in training (wav2vec2 whole layers too): by the step, whatever was drawn before."""
    config = dataclasses.replace(tiny, steps=4, checkpoint_every=2, model=swapped(folders, kind))
    for out in ("unbroken", "stopped"):
        before = torch.get_rng_state()
        assert train.pretrain(config, tmp_path / out)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000004")
    (tmp_path / "stopped" / "model.safetensors").unlink()
    assert train.pretrain(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


def test_what_cannot_be_is_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="no Hugging Face model there"):
        front_end_of({**folders, "vit": tmp_path / "nothing"}, "vit")
    with pytest.raises(ConfigError, match=r"is a 'vit', expected one of wav2vec2, whisper"):
        front_end_of({**folders, "whisper": folders["vit"]}, "whisper")
    with pytest.raises(ConfigError, match="max_tokens is 99, expected at most the encoder's 32"):
        front_end_of(folders, "bert", max_tokens=99)


def test_an_encoder_that_cannot_hide_refuses_masked_modelling(folders, tiny, tmp_path):
    config = configs.override(
        dataclasses.replace(tiny, model=swapped(folders, "wav2vec2")), ("objectives.masked_audio.weight=1",)
    )
    with pytest.raises(ConfigError, match="masked_audio needs a front end that can hide cells"):
        train.pretrain(config, tmp_path / "run")
