"""Which mood and topic has a post?  Text and photo together, where many posts lack one of them.

    python examples/social_media_posts.py [folder]

Posts are generated: the words tell the topic, the photo's colours tell the mood, its shape hints at the topic.  So
neither modality is enough alone, as with real posts.  The steps are those of a real project: shards, pretraining
without labels, fine-tuning with labels, and predictions for posts whatever they hold.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmmodel.configs import ImageConfig, MaskedConfig, ModelConfig, ObjectivesConfig, PretrainConfig, TextConfig
from mmmodel.data.media import encode_png
from mmmodel.data.shards import write_shard
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.labels import limited_to
from mmmodel.finetuning.run import finetune, load, read_labelled
from mmmodel.finetuning.tasks import predict
from mmmodel.train import pretrain

TOPICS = {
    "food": ("soup", "bread", "pasta", "salad", "cake"),
    "travel": ("beach", "train", "hotel", "island", "flight"),
}
TEXTS = ("just had {} with friends", "{} again", "my {} today", "look at this {}", "thinking of {} all day")
MOODS = {"happy": ((255, 190, 60), (250, 140, 60)), "sad": ((70, 90, 140), (110, 110, 120))}
MISSING = 0.2  # share of training posts without text, and as many without a photo


def main(folder: Path) -> None:
    posts = write_posts(folder / "posts", count=480)
    model = ModelConfig(
        modalities=("text", "image"),
        width=32,
        layers=2,
        heads=2,
        mlp_width=64,
        embed_width=32,
        text=TextConfig(vocab_size=320, max_tokens=24),
        image=ImageConfig(max_tokens=9, channels=(8, 16)),
    )
    objectives = ObjectivesConfig(masked_text=MaskedConfig(weight=0.5), masked_share=0.5)
    pretrain(
        PretrainConfig(model=model, data=str(posts), objectives=objectives, steps=40, batch_size=24, lr=3e-3),
        folder / "pretrained",
    )

    # Fine-tuning replaces the heads of pretraining by one output per class.
    config = FinetuneConfig(label="mood_and_topic", epochs=11, lr=5e-3, layer_decay=1.0, patience=0)
    report = finetune(folder / "pretrained", config, folder / "classifier")

    learner, labels, config = load(folder / "classifier")
    data, _ = read_labelled(learner_config(folder), learner.model, config)
    truth = np.array(data.of(data.test))

    def accuracy(modalities: tuple[str, ...]) -> float:
        """Over the test posts, of which only these modalities are shown."""
        outputs = predict(learner, data.features, limited_to(data.test, modalities))
        return float((np.array(labels.classes)[outputs.argmax(dim=1).numpy()] == truth).mean())

    both, text, photo = accuracy(("text", "image")), accuracy(("text",)), accuracy(("image",))
    chance = 1 / len(labels.classes)
    print(f"classes: {', '.join(labels.classes)}; posts to learn from: {report['counts']['train']}")
    print(f"accuracy on {len(truth)} new posts: {both:.2f} with text and photo, {text:.2f} text, {photo:.2f} photo")
    print(f"chance {chance:.2f}; knowing the topic alone gives 0.50")
    assert both > chance + 0.4, "text and photo together must be far better than chance"
    assert text > chance + 0.1, "a post without a photo must still tell its topic"
    assert both > text + 0.1, "the photo must add what the text does not say"


def write_posts(folder: Path, count: int) -> Path:
    """Posts as tar shards: KEY.txt, KEY.png or one of them, and KEY.json with the label.  The last fifth is test."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        topic, mood = str(rng.choice(list(TOPICS))), str(rng.choice(list(MOODS)))
        members = {"txt": str(rng.choice(TEXTS)).format(rng.choice(TOPICS[topic])), "png": photo(rng, topic, mood)}
        split = "test" if i >= 0.8 * count else "train"
        draw = rng.random()
        if split == "train" and draw < 2 * MISSING:
            del members["txt" if draw < MISSING else "png"]
        key = f"post-{i:05d}"
        samples.append({"__key__": key, **members, "json": {"mood_and_topic": f"{mood} {topic}", "split": split}})
    write_shard(folder / "posts-00000.tar", samples)
    return folder


def photo(rng: np.random.Generator, topic: str, mood: str) -> bytes:
    """A plate or a mountain, in warm or cold light, at any size and aspect ratio."""
    width, height = (int(side) for side in rng.integers(40, 90, size=2))
    ground, shape = MOODS[mood]
    image = Image.new("RGB", (width, height), tuple(int(c) for c in np.clip(rng.normal(ground, 15), 0, 255)))
    pen, radius = ImageDraw.Draw(image), min(width, height) / 3
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    if topic == "food":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape)
    else:
        pen.polygon([(x - radius, y + radius), (x, y - radius), (x + radius, y + radius)], fill=shape)
    return encode_png(image)


def learner_config(folder: Path) -> PretrainConfig:
    from mmmodel.export import read_config

    return read_config(folder / "classifier" / "model.safetensors")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
