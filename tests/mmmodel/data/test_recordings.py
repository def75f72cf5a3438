"""Which recordings are held out: the rule's share, of one language, of training items, and nothing else is lost."""

import pytest

from mmmodel.configs import ConfigError
from mmmodel.data.recordings import RECORDINGS, hold_out
from mmmodel.features import Item


def items():
    rows = {"text": 0, "image": 1, "audio": 2}
    return [
        Item(f"{i}/{language}", f"image{i}", language, f"c{i}", "test" if i % 5 == 0 else "train", rows)
        for i in range(400)
        for language in ("es", "fr")
    ]


def test_a_quarter_of_one_language_moves_and_nothing_else_changes():
    before, after = items(), hold_out(items(), "es:0.25")
    held = [item for item in after if item.split == RECORDINGS]
    assert 320 * 0.25 * 0.7 < len(held) < 320 * 0.25 * 1.3  # 320 Spanish training items
    assert all(item.language == "es" and item.rows == {"audio": 2} for item in held)
    keys = {item.key for item in held}
    rest = [item for item in after if item.split != RECORDINGS]
    assert [item.key for item in rest] == [item.key for item in before]
    for old, new in zip(before, rest, strict=True):
        assert new.rows == ({"text": 0, "image": 1} if old.key in keys else old.rows)


def test_the_choice_depends_on_names_alone():
    first = {item.key for item in hold_out(items(), "es:0.25") if item.split == RECORDINGS}
    second = {item.key for item in hold_out(items()[::-1][:500], "es:0.25") if item.split == RECORDINGS}
    assert second
    assert second <= first


def test_an_item_that_was_speech_alone_is_only_held_out():
    alone = [Item("a", "image1", "es", "c", "train", {"audio": 0})]
    assert [item.split for item in hold_out(alone, "es:0.999999")] == [RECORDINGS]


@pytest.mark.parametrize("rule", ["es", "es:", "es:2", ":0.5", "es:0", "es:none"])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ConfigError, match="hold_out_speech is"):
        hold_out([], rule)


def test_no_rule_holds_nothing_out():
    assert hold_out(items(), "") == items()
