"""Video: frames become rows in order of time, and only time positions can tell one order from its reverse."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels.ops.packing.api import segment_mean
from mmmodel import configs, frontends
from mmmodel.batches import collate
from mmmodel.configs import ConfigError, VideoConfig
from mmmodel.features import Features, Item
from mmmodel.frontends.text import train_tokenizer
from mmmodel.model import Model

FRAMES, SIDE = 4, 32


def model(*, time_positions=True, seed=0):
    torch.manual_seed(seed)
    video = VideoConfig(max_frames=FRAMES, max_tokens=4, time_positions=time_positions)
    config = dataclasses.replace(configs.tiny().model, modalities=("text", "video"), video=video, width=32)
    special = frontends.special_names(config.modalities)
    return Model(config, train_tokenizer(["a clip"], 280, special))


def batch_of(model, clips):
    front_end = model.front_ends["video"]
    made = [front_end.prepare(clip) for clip in clips]
    items = [Item(f"k{i}", f"g{i}", "", f"c{i}", "train", {"video": i}) for i in range(len(made))]
    return collate(items, Features.of({"video": made}), model.front_ends, model.special_tokens)


def encode(model, clips):
    """Means of the clips, [n, E]."""
    batch = batch_of(model, clips)
    return segment_mean(model.encode(model.streams(batch), batch.layout), batch.layout)


def moving_dots(count, rng):
    """A bright square that grows or shrinks over a dim, noisy ground; the label says which."""
    clips = rng.integers(0, 60, (count, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    labels = rng.integers(0, 2, count)
    for clip, label in zip(clips, labels, strict=True):
        y, x = rng.integers(0, SIDE - 20, 2)
        sizes = range(5, 5 + 5 * FRAMES, 5)
        for frame, size in zip(clip, sizes if label else reversed(sizes), strict=True):
            frame[y : y + size, x : x + size] = 255
    return clips, torch.from_numpy(labels)


def learn(learned, steps=60):
    """Accuracy on fresh clips of a classifier over the mean token, trained with the model."""
    rng = np.random.default_rng(0)
    head = torch.nn.Linear(32, 2)
    optimizer = torch.optim.AdamW([*learned.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(steps):
        clips, labels = moving_dots(24, rng)
        loss = torch.nn.functional.cross_entropy(head(encode(learned, clips)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, labels = moving_dots(100, np.random.default_rng(1))
    with torch.no_grad():
        return float((head(encode(learned, clips)).argmax(1) == labels).float().mean())


def test_a_small_model_learns_the_order_of_frames():
    assert learn(model()) >= 0.95


def test_without_time_positions_it_cannot():
    """The frames of a class are those of the other, reversed: nothing else can tell them apart."""
    assert 0.3 <= learn(model(time_positions=False)) <= 0.7


@pytest.mark.parametrize("time_positions", [True, False])
def test_a_reversed_clip_differs_only_by_its_time_positions(time_positions):
    learned = model(time_positions=time_positions)
    clips, _ = moving_dots(3, np.random.default_rng(0))
    with torch.no_grad():
        forth, back = encode(learned, clips), encode(learned, clips[:, ::-1])
    if time_positions:
        assert (forth - back).abs().max() > 1e-3
    else:  # sums in another order
        torch.testing.assert_close(forth, back, atol=1e-5, rtol=1e-5)


def test_rows_are_frames_in_order_of_time_with_positions_of_three_axes():
    learned = model()
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (frames, h, w, 3), dtype=np.uint8) for frames, h, w in ((2, 16, 48), (1, 40, 40))]
    batch = batch_of(learned, clips)
    front_end = learned.front_ends["video"]
    with torch.no_grad():
        stream = front_end(*batch.inputs["video"])
        alone = [
            front_end.frames(*front_end.frames.collate([frame])) for clip in batch.features["video"] for frame in clip
        ]
    torch.testing.assert_close(stream, torch.cat(alone), atol=1e-5, rtol=1e-5)
    shapes = [front_end.shape(clip) for clip in batch.features["video"]]
    assert shapes[0][0] == 2
    assert shapes[1][0] == 1
    time, rows, cols = shapes[0]
    positions = batch.layout.positions[:, 1 : 1 + time * rows * cols].T.tolist()
    assert positions == [[t + 1, r + 1, c + 1] for t in range(time) for r in range(rows) for c in range(cols)]


def test_long_clips_are_thinned_evenly_and_a_gif_decodes_to_its_frames():
    front_end = model().front_ends["video"]
    colours = np.linspace(0, 250, 10).astype(np.uint8)
    frames = [Image.fromarray(np.full((16, 16, 3), c, np.uint8)) for c in colours]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=40)
    clip = front_end.decode(file.getvalue())
    assert clip.shape == (10, 16, 16, 3)
    np.testing.assert_allclose(clip[:, 0, 0, 0], colours, atol=2)
    kept = front_end.prepare(clip)
    assert kept.shape[0] == FRAMES
    np.testing.assert_allclose(kept[:, 0, 0, 0], colours[[0, 3, 6, 9]], atol=2)


def test_a_modality_without_a_front_end_and_a_tokenizer_without_its_token_are_named():
    config = dataclasses.replace(configs.tiny().model, modalities=("text", "smell"))
    with pytest.raises(ConfigError, match=r"no front end for \['smell'\], expected some of text, image, audio, video"):
        Model(config, train_tokenizer(["x"], 280))
    config = dataclasses.replace(configs.tiny().model, modalities=("text", "video"))
    with pytest.raises(ConfigError, match=r"the tokenizer lacks \[VID\]"):
        Model(config, train_tokenizer(["x"], 280))
