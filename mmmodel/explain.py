"""Explains one sample: attention by modality, rollout over words, cells and sound, and what is lost without a modality.

L layers, H heads, M modalities, n tokens of the sample.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmmodel import atomic, evaluate, export, features, limits, pretraining
from mmmodel.configs import ConfigError
from mmmodel.data.loader import ShardDataset
from mmmodel.explaining import ablation, attention, page, pictures
from mmmodel.explaining.ablation import Search, WordLoss
from mmmodel.explaining.sample import Sample, content, pieces_of, tokens_of, words_of
from mmmodel.finetuning import weights
from mmmodel.frontends.audio import HOP, SAMPLE_RATE
from mmmodel.frontends.text import special_ids
from mmmodel.model import check_impl
from mmmodel.pretraining import Corpus, Pretraining

GALLERY = 500  # other samples that the sample's own is to be found among


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `summary` is what explanation.json holds."""

    sample: Sample
    shares: dict[str, float]  # of the sample's tokens
    mass: Tensor  # [L, H, M, M], modalities in the order of `shares`
    influence: dict[str, dict[str, np.ndarray]]  # of each modality's tokens on each reader's mean, average 1
    grid: tuple[int, int] | None  # rows and columns of the image's cells
    word_influence: dict[str, np.ndarray]  # of the image's cells on each word
    losses: list[WordLoss]
    searches: list[Search]

    def summary(self) -> dict[str, Any]:
        return {
            "key": self.sample.item.key,
            "caption": self.sample.caption,
            "token_shares": self.shares,
            "mass": {
                reader: {read: self.mass[:, :, i, j].tolist() for j, read in enumerate(self.shares)}
                for i, reader in enumerate(self.shares)
            },
            "influence": {
                reader: {read: values.tolist() for read, values in per.items()}
                for reader, per in self.influence.items()
            },
            "hidden_words": [{**asdict(loss), "mean": loss.mean, "error": loss.error} for loss in self.losses],
            "searches": [asdict(search) for search in self.searches],
        }


def explain(
    run: Path | str,
    out: Path | str,
    *,
    data: str = "",
    key: str = "",
    split: str = "test",
    device: str = "cpu",
    impl: str | None = None,
) -> Explanation:
    """Explain sample `key` of `data` by the model of a run: writes index.html, PNGs and explanation.json into `out`.

    Of a fine-tuned run the encoder is explained, its modalities seeing each other.  What needs an objective that it no
    longer has is left out: hidden words, and search unless it was fine-tuned for retrieval.
    impl: as in `export.open_run`.
    data: as in `pretraining.find_data`, empty: the run's own.  key empty: the first sample of `split` with the most
    of the modalities, in a language of the run if there is one.  Raises ConfigError for a key that the data lacks,
    CheckpointError for a run that does not load.
    """
    limits.check_device(device, "explain")
    opened = export.open_run(run, impl=impl)
    config, out = opened.config, Path(out)
    check_impl(config.model.impl, device)
    learner = weights.learner_of(opened).to(device)
    torch.set_num_threads(config.threads)
    path = pretraining.find_data(data or config.data)
    sample, others = _open(learner, path, () if data else config.languages, key, split)
    found = look(learner, sample, others)
    atomic.write_json(out / "explanation.json", found.summary())
    html = _page(found, out, run=str(run), data=str(path))
    with atomic.replacing(out / "index.html") as partial:
        partial.write_text(html, encoding="utf-8")
    return found


def look(learner: Pretraining, sample: Sample, others: Corpus) -> Explanation:
    """Everything that is computed.  others: samples among which this one is to be found."""
    model = learner.eval().model
    batch = sample.batch(model)
    tokens = tokens_of(model, batch)
    order = [list(model.front_ends).index(name) for name in tokens]
    mass = attention.modality_mass(model, batch)[:, :, order][..., order]
    rolled = attention.rollout(model, batch)
    influence = {
        reader: {read: _relative(rolled[own].mean(0)[content(seen)]) for read, seen in tokens.items() if len(seen) > 1}
        for reader, own in tokens.items()
    }
    word_influence = {}
    if "image" in influence and "text" in tokens:
        cells = content(tokens["image"])
        for text, places in sample.words:
            word_influence[text] = _relative(rolled[tokens["text"][list(places)]].mean(0)[cells])
    total = sum(len(own) for own in tokens.values())
    searches: list[Search] = []
    if "contrastive" in learner.objectives and len(tokens) > 1:
        own = evaluate.embed(learner, Corpus([sample.item], sample.features), [sample.item])
        gallery = evaluate.embed(learner, others, others.items)
        concepts = np.array([item.concept for item in others.items])
        searches = ablation.searches(sample, {name: own[name][0] for name in tokens}, gallery, concepts)
    return Explanation(
        sample=sample,
        shares={name: len(own) / total for name, own in tokens.items()},
        mass=mass,
        influence=influence,
        grid=model.front_ends["image"].shape(sample.feature("image")) if "image" in influence else None,
        word_influence=word_influence,
        losses=ablation.word_losses(learner, sample),
        searches=searches,
    )


def _open(learner: Pretraining, path: Path, languages: tuple[str, ...], key: str, split: str) -> tuple[Sample, Corpus]:
    """The sample, and the others of its split and language."""
    entries = ShardDataset(path, languages=languages or None).entries
    if key:
        chosen = next((entry for entry in ShardDataset(path).entries if entry.key == key), None)
        if chosen is None:
            near = difflib.get_close_matches(key, [entry.key for entry in entries], n=3, cutoff=0) or ["none"]
            raise ConfigError(f"explain: {path} has no sample {key!r}; near it are {', '.join(near)}")
    else:
        front_ends = learner.model.front_ends.values()
        held = {
            entry.key: sum(bool(entry.member(front_end.members)) for front_end in front_ends)
            for entry in entries
            if entry.split == split
        }
        most = max(held.values(), default=0)
        if not most:
            raise ConfigError(f"explain: {path} has no sample of split {split!r} that the model reads; name a key")
        richest = [entry for entry in entries if held.get(entry.key) == most]
        known = [entry for entry in richest if entry.language in learner.config.languages]
        chosen = (known or richest)[0]
    dataset = ShardDataset(path, chosen.split, (chosen.language,))
    at = dataset.keys.index(chosen.key)
    kept = sorted({at, *range(min(len(dataset), GALLERY))})
    dataset.entries = [dataset.entries[i] for i in kept]
    corpus = Corpus(*features.prepare(dataset, learner.model.front_ends))
    item = next((item for item in corpus.items if item.key == chosen.key), None)
    if item is None:
        raise ConfigError(f"explain: sample {chosen.key!r} has nothing that the model reads, or none of it decodes")
    caption = (dataset.read_text(kept.index(at)) or "") if "text" in item.rows else ""
    words = ()
    if caption:
        tokenizer = learner.model.tokenizer
        positions = pieces_of(corpus.features.get("text", item.rows["text"]), special_ids(tokenizer))
        words = words_of(tokenizer, caption, positions)
    return Sample(item, corpus.features, caption, words), corpus


def _relative(values: Tensor) -> np.ndarray:
    """Scaled to mean 1."""
    return (values / values.mean().clamp_min(1e-30)).numpy()


def _page(found: Explanation, out: Path, *, run: str, data: str) -> str:
    sample, item = found.sample, found.sample.item
    facts = [("sample", item.key), ("model", run), ("data", data)]
    facts += [("caption", sample.caption)] if sample.caption else []
    facts += [
        ("modalities", ", ".join(f"{name} {100 * share:.0f} % of tokens" for name, share in found.shares.items()))
    ]
    sections = [_mass_section(found, out), _rollout_section(found, out)]
    sections += [section for section in (_loss_section(found, out), _search_section(found, out)) if section]
    footer = (
        "Attention shows where information could flow, not why the model decides as it does; ablation shows what a "
        "modality is worth for this sample alone. Numbers: explanation.json beside this page."
    )
    return page.render(f"What the model sees in {item.key}", facts, sections, footer)


def _mass_section(found: Explanation, out: Path) -> page.Section:
    drawn = []
    for i, reader in enumerate(found.shares):
        path = out / f"mass-{reader}.png"
        pictures.mass(path, reader, found.mass[:, :, i].numpy(), list(found.shares), list(found.shares.values()))
        drawn.append((path, f"share of the attention of {reader} tokens that goes to each modality, by layer and head"))
    return page.Section(
        "Attention by modality",
        "For each layer and head, the percentage of attention that goes from the tokens of one modality to those of "
        "each. A head that looked evenly at all tokens would give the percentages in brackets. The attention kernel "
        "sums these itself while it runs.",
        drawn,
    )


def _rollout_section(found: Explanation, out: Path) -> page.Section:
    sample, drawn = found.sample, []
    if "image" in found.influence:
        pixels = sample.feature("image").transpose(1, 2, 0)
        grid = found.grid
        maps = {f"by {reader}": per["image"].reshape(grid) for reader, per in found.influence.items() if "image" in per}
        pictures.on_image(path := out / "rollout-image.png", pixels, maps, "Picture read by each modality")
        drawn.append((path, "influence of each image cell on each modality"))
        words = [word for word in found.word_influence if any(letter.isalnum() for letter in word)]
        words = sorted(words, key=lambda word: (-len(word), word))[: pictures.WORDS_ON_IMAGE]
        if words:
            maps = {word: found.word_influence[word].reshape(grid) for word in found.word_influence if word in words}
            pictures.on_image(path := out / "rollout-word-cells.png", pixels, maps, "Picture read by the longest words")
            drawn.append((path, "influence of each image cell on each of the longest words"))
    if sample.words and "text" in found.influence:
        readers = {reader: _per_word(sample, per["text"]) for reader, per in found.influence.items() if "text" in per}
        pictures.on_words(path := out / "rollout-words.png", [word for word, _ in sample.words], readers)
        drawn.append((path, "influence of each word on each modality"))
    if "audio" in found.influence:
        sound = sample.feature("audio")  # log-mel frames, or the samples that another encoder takes
        readers = {reader: per["audio"] for reader, per in found.influence.items() if "audio" in per}
        seconds = len(sound) * (HOP if sound.ndim == 2 else 1) / SAMPLE_RATE
        pictures.on_sound(path := out / "rollout-sound.png", sound, seconds, readers)
        drawn.append((path, "influence of each moment of the sound on each modality"))
    return page.Section(
        "Attention rollout",
        "How much of each part of the sample ends up in the tokens of each modality when attention is followed through "
        "all layers (Abnar and Zuidema 2020: heads averaged, residual connections counted as looking at oneself). "
        "Values are relative: 1 is the average part.",
        drawn,
    )


def _loss_section(found: Explanation, out: Path) -> page.Section | None:
    if not found.losses:
        return None
    pictures.losses(path := out / "hidden-words.png", found.losses)
    whole = found.losses[0].mean
    rows = [
        (" + ".join(("text", *loss.given)), f"{loss.mean:.3f}", f"{loss.error:.3f}", f"{loss.mean - whole:+.3f}")
        for loss in found.losses
    ]
    return page.Section(
        "Without a modality: hidden words",
        f"Each of the caption's {len(found.losses[0].nats)} word pieces is hidden in turn and read back from what is "
        "left of the sample. A modality that helps makes the loss rise when it is dropped.",
        [(path, "loss on hidden word pieces with each subset of modalities")],
        ("given", "nats per piece", "standard error", "change"),
        rows,
    )


def _search_section(found: Explanation, out: Path) -> page.Section | None:
    if not found.searches:
        return None
    pictures.ranks(path := out / "ranks.png", found.searches)
    whole = {search.target: search for search in reversed(found.searches)}  # its largest set stands first
    rows = [
        (
            f"{search.target} by {' + '.join(search.given)}",
            f"{search.rank} of {search.choices}",
            f"{search.similarity:.3f}",
            f"{search.similarity - whole[search.target].similarity:+.3f}",
        )
        for search in found.searches
    ]
    return page.Section(
        "Without a modality: search",
        "The sample's own picture, words or sound is looked for among those of other concepts, with the sum of the "
        "points of its other modalities. Similarity is the cosine with its own; change is against searching with all.",
        [(path, "rank of the sample's own item by what is searched with")],
        ("search", "rank", "similarity", "change"),
        rows,
    )


def _per_word(sample: Sample, values: np.ndarray) -> np.ndarray:
    """The mean over each word's pieces; values start after [CLS]."""
    return np.array([values[[place - 1 for place in places]].mean() for _, places in sample.words])
