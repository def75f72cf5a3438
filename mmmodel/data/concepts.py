"""Captions, concepts and the split of the stamps: what counts as the same thing, and who is held out.

A concept is the set of images that share a normalised caption in any of CONCEPT_LANGUAGES, joined transitively, so that
a retrieval task never calls a right answer wrong because two drawings are both "a flower", and no concept straddles the
split. These rules are part of every published number: changing them changes the data set.
"""

import hashlib
import unicodedata
from collections.abc import Mapping

CONCEPT_LANGUAGES = ("en", "fr", "es", "ru", "ro", "ca", "bg", "be", "el", "da")
SPLITS = ("train", "validation", "test")


def parse_captions(text: str) -> dict[str, str]:
    """Captions of one stamp by language tag: line 1 is English, then `<tag>.utf8=<caption>`; empty ones left out."""
    first, *rest = text.removeprefix("\ufeff").splitlines() or [""]
    captions = {"en": first.strip()} if first.strip() else {}
    for line in rest:
        tag, separator, caption = line.partition(".utf8=")
        if separator and caption.strip():
            captions.setdefault(tag.strip(), caption.strip())
    return captions


def normalise(caption: str) -> str:
    """Strip, casefold, NFC, in that order: casefold can undo a composition, so NFC comes last."""
    return unicodedata.normalize("NFC", caption.strip().casefold())


def split_of(concept: str) -> str:
    """Split of a concept from the hash of its name: about 20 % test, 10 % validation; the same on every machine."""
    bucket = int(hashlib.sha256(concept.encode()).hexdigest()[:8], 16) % 10
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def assign_concepts(captions: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Concept of each image.  captions: image -> language tag -> caption (English is required).

    The name of a concept is the smallest normalised English caption of its images; no two concepts can have the same
    name, since a shared English caption would have joined them.
    """
    parent = {image: image for image in captions}

    def find(image: str) -> str:
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    first_with: dict[tuple[str, str], str] = {}
    for image, by_language in captions.items():
        if "en" not in by_language:
            raise ValueError(f"concepts: image {image!r} has no English caption, which names its concept")
        for language in CONCEPT_LANGUAGES:
            if language in by_language:
                key = (language, normalise(by_language[language]))
                parent[find(image)] = find(first_with.setdefault(key, image))

    names: dict[str, str] = {}
    for image, by_language in captions.items():
        root, name = find(image), normalise(by_language["en"])
        names[root] = min(name, names.get(root, name))
    return {image: names[find(image)] for image in captions}
