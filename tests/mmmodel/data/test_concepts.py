"""Captions, concepts and the split: the rules under every published number."""

import pytest

from mmmodel.data.concepts import assign_concepts, normalise, parse_captions, split_of


def test_captions_first_line_is_english_and_the_rest_is_tagged():
    text = (
        "A frog.\naf.utf8='n Padda.\nca@valencia.utf8=Una granota.\n"
        "en_GB.utf8=A frog\nfr.utf8=  \nbroken line\nes.utf8=a=b\n"
    )
    assert parse_captions(text) == {
        "en": "A frog.",
        "af": "'n Padda.",
        "ca@valencia": "Una granota.",
        "en_GB": "A frog",
        "es": "a=b",
    }


@pytest.mark.parametrize("text", ["", "\n", "   \nfr.utf8=x"])  # no file content, no English: no name for the concept
def test_captions_without_english(text):
    assert "en" not in parse_captions(text)


def test_captions_byte_order_mark_is_not_part_of_the_caption():
    assert parse_captions("\ufeffA frog.")["en"] == "A frog."


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("  A Flower. ", "a flower."),
        ("Stra\u00dfe", "STRASSE"),  # casefold, not lower
        ("caf\u00e9", "cafe\u0301"),  # composed and decomposed
        ("\u0390", "\u03b9\u0308\u0301"),  # casefold decomposes this Greek letter, so NFC must come after it
    ],
)
def test_normalise_joins_what_reads_the_same(a, b):
    assert normalise(a) == normalise(b)


def test_concepts_join_transitively_and_across_languages():
    captions = {
        "a": {"en": "A boat.", "fr": "Un bateau."},
        "b": {"en": "A ship.", "fr": "un bateau."},  # joins a in French
        "c": {"en": "a SHIP."},  # joins b in English, so a too
        "d": {"en": "A dog.", "nl": "Un bateau."},  # nl does not count
        "e": {"en": "A cat.", "es": "un bateau."},  # the same words in another language do not join
    }
    assert assign_concepts(captions) == {"a": "a boat.", "b": "a boat.", "c": "a boat.", "d": "a dog.", "e": "a cat."}


def test_concepts_do_not_depend_on_order():
    captions = {str(i): {"en": f"{i // 3}", "fr": f"f{i % 4}", "ru": f"r{i}"} for i in range(11)}
    backwards = dict(reversed(captions.items()))
    assert assign_concepts(captions) == assign_concepts(backwards)


def test_concepts_need_english():
    with pytest.raises(ValueError, match="'x' has no English caption"):
        assign_concepts({"x": {"fr": "Un bateau."}})


def test_split_is_the_documented_hash():
    # last digit of the first 8 hex digits of `printf '%s' CAPTION | sha256sum`: 0, 1 test; 2 validation
    by_hand = {"big.": 0, "a pear.": 1, "a dog.": 3, "a frog.": 4, "an owl.": 8}
    expected = {caption: "test" if digit < 2 else "train" for caption, digit in by_hand.items()}
    assert {caption: split_of(caption) for caption in by_hand} == expected


def test_split_takes_a_fifth_for_test_and_a_tenth_for_validation():
    splits = [split_of(str(number)) for number in range(2000)]
    assert abs(splits.count("test") / 2000 - 0.2) < 0.03
    assert abs(splits.count("validation") / 2000 - 0.1) < 0.02
