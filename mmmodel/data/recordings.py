"""Recordings held out of pretraining: new recordings of known things, beside the split by concept.

A rule such as "es:0.25" takes the Spanish recordings of a quarter of the training images out of training. Their
pictures, their Spanish captions and their recordings in other languages stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from mmmodel.configs import ConfigError
from mmmodel.features import Item

RECORDINGS = "recordings"  # the split of what was held out


def hold_out(items: Sequence[Item], rule: str) -> list[Item]:
    """Items of which each one that the rule names has lost its recording to a new item of the split RECORDINGS.

    Which groups it names depends on their names alone.  An empty rule names none.  Raises ConfigError for another form.
    """
    if not rule:
        return list(items)
    language, share = parsed(rule)
    kept = []
    for item in items:
        named = item.split == "train" and item.language == language and "audio" in item.rows
        if named and draw("recording", item.group) < share:
            rest = {name: row for name, row in item.rows.items() if name != "audio"}
            if rest:
                kept.append(replace(item, rows=rest))
            kept.append(replace(item, split=RECORDINGS, rows={"audio": item.rows["audio"]}))
        else:
            kept.append(item)
    return kept


def parsed(rule: str) -> tuple[str, float]:
    """Language and share.  Raises ConfigError for a rule of another form."""
    language, colon, share = rule.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not (language and colon and 0 < value < 1):
        raise ConfigError(f"hold_out_speech is {rule!r}, expected a language and a share of it, such as es:0.25")
    return language, value


def draw(purpose: str, group: str) -> float:
    """In [0, 1), from these names alone: the same on every machine."""
    return int(hashlib.sha256(f"{purpose} {group}".encode()).hexdigest()[:8], 16) / 2**32
