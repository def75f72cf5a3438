"""Packs while items arrive: the "stream" policy of plan_packs, with a state to resume from.   n items, K budgets"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

import numpy as np

from mmkernels.arguments import at_least_one
from mmkernels.packs import OPEN_STREAM, budgets_of, lengths_and_budgets, reject_long
from mmkernels.planner_backend import packs as _backend


class PackStream:
    """Packs while items arrive, with at most `open_packs` of them unfinished; resumes from its state_dict.

    Each item goes to the fullest open pack with room (by the summed shares of the budgets); where there is none, a pack
    is finished to make place: the fullest, or with several budgets the oldest (a pack that has used up one of them may
    be empty by the others).  How the items are cut into calls of `push` changes nothing.  For one thread at a time.
    """

    def __init__(self, budget: int | Sequence[int], *, max_items: int | None = None, open_packs: int = OPEN_STREAM):
        """Raises ValueError for a budget, max_items or open_packs that is not a whole number of at least 1."""
        self._budgets = budgets_of("PackStream", budget)
        self._max_items = None if max_items is None else at_least_one("PackStream", "max_items", max_items, " or None")
        self._max_open = at_least_one("PackStream", "open_packs", open_packs)
        self._arrived, self._next_pack = 0, 0
        self._items: dict[int, list[int]] = {}  # of each open pack, by its number, in order of opening
        self._room = np.zeros((0, len(self._budgets)), np.int64)  # [open, K]

    def push(self, lengths) -> list[np.ndarray]:
        """Takes items in; returns the packs that they finished, int64 indices of items counted from the first push.

        lengths as in plan_packs.  Raises ValueError for an item over the budget, and then takes in none.
        """
        lengths, _ = lengths_and_budgets("PackStream", lengths, self._budgets)
        reject_long("PackStream", lengths, self._budgets, self._arrived, "drop or split it before")
        ids = np.array(list(self._items), np.int64)
        counts = np.array([len(items) for items in self._items.values()], np.int64)
        endless = np.iinfo(np.int64).max
        pack_of, closed, *_, self._room, self._next_pack = _backend.scan_fit(
            np.ascontiguousarray(lengths, np.int64),
            self._budgets,
            1.0 / self._budgets,
            min(self._max_items or endless, endless),
            min(self._max_open, endless),
            False,
            (ids, counts, self._room, self._next_pack),
        )
        for item, pack in enumerate(pack_of.tolist(), self._arrived):
            self._items.setdefault(pack, []).append(item)
        self._arrived += len(lengths)
        return [np.array(self._items.pop(pack), np.int64) for pack in closed.tolist()]

    def flush(self) -> list[np.ndarray]:
        """The unfinished packs, in order of opening; the stream is then empty and goes on counting items."""
        packs = [np.array(items, np.int64) for items in self._items.values()]
        self._items, self._room = {}, self._room[:0]
        return packs

    def state_dict(self) -> dict:
        """Plain numbers and lists: what `load_state_dict` needs to go on with the very next item."""
        return self._settings() | {
            "arrived": self._arrived,
            "next_pack": self._next_pack,
            "packs": [
                {"pack": pack, "items": list(items), "room": room.tolist()}
                for (pack, items), room in zip(self._items.items(), self._room, strict=True)
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for the state of a stream with other budgets, max_items or open_packs, and for what is no
        state; the stream is then as before."""
        try:
            settings = {name: state[name] for name in self._settings()}
            arrived, next_pack = index(state["arrived"]), index(state["next_pack"])
            items = {index(entry["pack"]): [index(item) for item in entry["items"]] for entry in state["packs"]}
            rooms = [[index(tokens) for tokens in entry["room"]] for entry in state["packs"]]
            room = np.array(rooms, np.int64).reshape(len(items), len(self._budgets))
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"PackStream: the state is not what state_dict gives: {error!r}") from error
        for name, value in self._settings().items():
            if settings[name] != value:
                raise ValueError(f"PackStream: the state has {name} {settings[name]}, this stream {value}")
        packed = [item for pack in items.values() for item in pack]
        full = math.inf if self._max_items is None else self._max_items
        if (
            len(items) > self._max_open
            or any(not 1 <= len(pack) < full for pack in items.values())
            or len(set(packed)) < len(packed)
            or any(not 0 <= item < arrived for item in packed)
            or any(not 0 <= pack < next_pack for pack in items)
            or ((room < 0) | (room > self._budgets)).any()
        ):
            raise ValueError(
                f"PackStream: the state has {len(items)} packs whose items, numbers or rooms no stream would have, "
                f"expected at most {self._max_open} unfinished packs of items below {arrived}, each item once"
            )
        self._arrived, self._next_pack, self._items, self._room = arrived, next_pack, items, room

    def _settings(self) -> dict:
        return {"budget": self._budgets.tolist(), "max_items": self._max_items, "open_packs": self._max_open}
