"""Packs and ranks in numpy: the plain statement of what csrc/planner computes, and what runs where it is not built.

Item by item, where C++ takes runs of equal lengths at once; the plans are equal.   n items, K budgets or costs, R ranks
"""

import bisect

import numpy as np

POOL, CHOICES = 2048, 128  # as in csrc/planner/vector_packs.cpp
MAX_TRIALS = 1 << 24  # as in csrc/planner/ranks.cpp


def plan_packs(lengths, budget: int, max_items: int, first_fit: bool) -> tuple[np.ndarray, np.ndarray]:
    """(order [n], offsets [packs + 1]) for lengths [n] that fit one budget, longest first."""
    fit = _first_fit if first_fit else _best_fit
    pack_of = fit(lengths, budget, max_items, np.argsort(-lengths.astype(np.int64), kind="stable"))
    return group_by_pack(pack_of, int(pack_of.max(initial=-1)) + 1)


def group_by_pack(pack_of, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """(order [n], offsets [packs + 1]) from the pack of each item."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packs))])
    return np.argsort(pack_of, kind="stable"), offsets


def _best_fit(lengths, budget: int, max_items: int, order) -> np.ndarray:
    pack_of, count = np.zeros(len(lengths), np.int64), []
    rooms: list[int] = []  # what open packs have left, sorted
    packs: dict[int, list[int]] = {}  # open packs by what they have left; the last one put in comes out first
    for item in order:
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = budget, len(count)
            count.append(0)
        else:
            room = rooms[at]
            chosen = packs[room].pop()
            if not packs[room]:
                rooms.pop(at)
        pack_of[item] = chosen
        count[chosen] += 1
        if count[chosen] < max_items:
            if not packs.setdefault(room - length, []):
                bisect.insort(rooms, room - length)
            packs[room - length].append(chosen)
    return pack_of


def _first_fit(lengths, budget: int, max_items: int, order) -> np.ndarray:
    pack_of, count = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    room = np.full(len(lengths), budget)  # -1: closed; packs not opened yet have the whole budget
    opened = 0
    for item in order:
        chosen = int(np.argmax(room[: opened + 1] >= lengths[item]))
        opened = max(opened, chosen + 1)
        pack_of[item] = chosen
        count[chosen] += 1
        room[chosen] = room[chosen] - lengths[item] if count[chosen] < max_items else -1
    return pack_of


def scan_fit(lengths, budgets, scales, max_items: int, max_open: int, first: bool, state):
    """(pack_of [n], closed, ids, counts, room, next id): csrc/planner/vector_packs.h says what each is.

    state: (ids, counts, room [open, K], next id) of the open packs.
    """
    ids, counts, room, opened = state
    pack_of, closed = np.zeros(len(lengths), np.int64), []

    def close(pack):
        nonlocal ids, counts, room
        closed.append(int(ids[pack]))
        ids, counts, room = (np.delete(array, pack, 0) for array in (ids, counts, room))

    for item, length in enumerate(lengths):
        fits = (length <= room).all(1)
        if fits.any():
            left = _sum(room - length, scales)
            chosen = int(np.argmax(fits)) if first else int(np.argmin(np.where(fits, left, np.inf)))
        else:
            if len(ids) == max_open:
                close(int(np.argmin(room[:, 0])) if len(budgets) == 1 else 0)
            chosen = len(ids)
            ids, counts, room = np.append(ids, opened), np.append(counts, 0), np.vstack([room, budgets])
            opened += 1
        pack_of[item] = ids[chosen]
        room[chosen] -= length
        counts[chosen] += 1
        if counts[chosen] == max_items:
            close(chosen)
    return pack_of, np.array(closed, np.int64), ids, counts, room, opened


def pool_fit(lengths, budgets, scales, max_items: int, sizes, weights) -> tuple[np.ndarray, int]:
    """(pack_of [n], packs) for lengths in falling order of size; csrc/planner/vector_packs.h says how."""
    n = len(lengths)
    rounds = max(1, (n + POOL // 2) // POOL)
    pack_of, packs, pool = np.zeros(n, np.int64), 0, np.zeros(0, np.int64)
    for start in range(rounds):
        pool = np.sort(np.concatenate([pool, np.arange(start, n, rounds)]))
        while len(pool) > (POOL // 2 if start + 1 < rounds else 0):
            pool = _fill_pack(lengths, budgets, scales, max_items, pool, pack_of, packs)
            packs += 1
    return pack_of, packs


def _fill_pack(lengths, budgets, scales, max_items: int, pool, pack_of, pack: int) -> np.ndarray:
    """Fills one pack; returns what is left of the pool."""
    room = budgets.copy()
    for _ in range(max_items):
        fitting = np.flatnonzero((lengths[pool] <= room).all(1))[:CHOICES]
        if not len(fitting):
            break
        score = np.zeros(len(fitting))
        for k in range(len(budgets)):  # in the order in which C++ adds
            left = (room[k] - lengths[pool[fitting], k]) * scales[k]
            score = score + left * left
        best = fitting[np.argmin(score)]
        room -= lengths[pool[best]]
        pack_of[pool[best]] = pack
        pool = np.delete(pool, best)
    return pool


def _sum(room: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What packs have left, summed over budgets as shares of them, in the order in which C++ adds."""
    total = np.zeros(len(room))
    for k in range(len(scales)):
        total = total + room[:, k] * scales[k]
    return total


def balance_ranks(costs, order, num_ranks: int, equal_count: bool) -> np.ndarray:
    """The rank of each item, for costs [n, K] in units of a rank's mean load; csrc/planner/ranks.h says how."""
    n, num_costs = costs.shape
    rank, count, load = np.zeros(n, np.int64), np.zeros(num_ranks, np.int64), np.zeros((num_ranks, num_costs))
    floor, larger = divmod(n, num_ranks)
    for item in order:
        # One cost: the least loaded rank, which rounding could otherwise hide behind a large item.
        after = load[:, 0] if num_costs == 1 and not equal_count else (load + costs[item]).max(1)
        if equal_count:
            after = np.where(count < floor + (larger > 0), after, np.inf)
        chosen = int(np.argmin(after))
        rank[item] = chosen
        count[chosen] += 1
        load[chosen] += costs[item]
        larger -= int(count[chosen] == floor + 1)
    trials = 0
    while True:
        heaviest = int(np.argmax(load.max(1)))
        mine = np.flatnonzero(rank == heaviest)
        trials += len(mine) * n
        if trials > MAX_TRIALS:
            return rank
        step = _improvement(costs, rank, load, heaviest, mine, equal_count)
        if step is None:
            return rank
        away, back, to = step
        for item, source, target in ((away, heaviest, to), (back, to, heaviest)):
            if item >= 0:
                load[source] -= costs[item]
                load[target] += costs[item]
                rank[item] = target


def _improvement(costs, rank, load, heaviest: int, mine, equal_count: bool):
    """(item to give away, item to get back or -1, the other rank), whichever lowers the greater load most, or None."""
    best, step = load[heaviest].max(), None
    if not len(mine):
        return None
    if not equal_count:
        here = (load[heaviest] - costs[mine]).max(1)
        there = (load + costs[mine][:, None]).max(2)  # [mine, R]
        greater = np.maximum(here[:, None], there)
        greater[:, heaviest] = np.inf
        i, r = np.unravel_index(np.argmin(greater), greater.shape)
        if greater[i, r] < best:
            best, step = greater[i, r], (int(mine[i]), -1, int(r))
    others = np.flatnonzero(rank != heaviest)
    if len(others):
        change = costs[mine][:, None] - costs[others]  # [mine, others, K]
        greater = np.maximum(load[heaviest] - change, load[rank[others]] + change).max(2)
        i, j = np.unravel_index(np.argmin(greater), greater.shape)
        if greater[i, j] < best:
            step = (int(mine[i]), int(others[j]), int(rank[others[j]]))
    return step
