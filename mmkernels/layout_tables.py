"""What a user says of a batch, checked, as the tables that a layout is built from.   M modalities.

A table of segments is int32 [N, 4] (sample, modality, length, first source row); one of grids says how positions run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np

from mmkernels import arguments

MAX_MODALITIES = 32  # visibility is a 32-bit set


def check_modalities(function: str, num_modalities: int) -> None:
    if not arguments.is_number(num_modalities, arguments.WHOLE) or not 1 <= num_modalities <= MAX_MODALITIES:
        raise ValueError(f"{function}: num_modalities is {num_modalities!r}, expected 1 to {MAX_MODALITIES}")


def special_ids(function: str, special_tokens: Sequence[int | None] | None, num_modalities: int) -> np.ndarray:
    """int32 [M], -1 for none."""
    if special_tokens is None:
        return np.full(num_modalities, -1, np.int32)
    tokens = arguments.as_list(function, "special_tokens", special_tokens, "a token id or None per modality")
    if len(tokens) != num_modalities:
        raise ValueError(
            f"{function}: special_tokens has {len(tokens)} entries, expected one per modality: {num_modalities}"
        )
    for m, token in enumerate(tokens):
        if token is not None and not (arguments.is_number(token, arguments.WHOLE) and 0 <= token < 2**31):
            raise ValueError(
                f"{function}: special_tokens[{m}] is {token!r}, expected a token id from 0 to 2**31 - 1 or None"
            )
    return np.array([-1 if s is None else s for s in tokens], np.int32)


def count_tables(counts: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment table [N, 4] and grids [N, 3] of the counts [B, M] that are not 0."""
    wrong = (counts < 0) | (counts >= 2**31)  # the bound keeps the sums below inside int64
    if wrong.any():
        sample, modality = np.argwhere(wrong)[0]
        raise ValueError(
            f"from_counts: counts[{sample}, {modality}] is {counts[sample, modality]}, expected 0 to 2**31 - 1"
        )
    counts = counts.astype(np.int64)
    sample, modality = np.nonzero(counts)
    own = counts[sample, modality]
    tokens = own + (special >= 0)[modality]
    if tokens.sum() >= 2**31:
        raise ValueError(f"from_counts: counts sum to {tokens.sum()} tokens, expected at most 2**31 - 1")
    first_row = (np.cumsum(counts, 0) - counts)[sample, modality]
    segments = np.stack([sample, modality, tokens, first_row], 1).astype(np.int32)
    grids = np.zeros((len(own), 3), np.int32)
    grids[:, 2] = own
    return segments, grids


def run_tables(bounds: np.ndarray, modality_ids: np.ndarray, num_modalities: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment table and grids of the stretches of one modality in one sample; of an empty sample, one of length 0."""
    num_samples, total = len(bounds) - 1, len(modality_ids)
    changes = np.zeros(total, bool)
    changes[1:] = modality_ids[1:] != modality_ids[:-1]
    changes[bounds[bounds < total]] = False  # a sample opens there anyway
    changes = np.flatnonzero(changes)
    starts = np.concatenate([bounds[:-1], changes])
    sample = np.concatenate([np.arange(num_samples), np.searchsorted(bounds, changes, side="right") - 1])
    order = np.argsort(starts, kind="stable")  # empty samples stay in order, each before the one that starts there too
    starts, sample = starts[order], sample[order]
    lengths = np.diff(starts, append=total)
    modality = np.zeros(len(starts), np.int64)
    modality[lengths > 0] = modality_ids[starts[lengths > 0]]
    first_row = np.zeros_like(lengths)
    for m in range(num_modalities):
        own = modality == m
        first_row[own] = np.cumsum(lengths[own]) - lengths[own]
    grids = np.zeros((len(starts), 3), np.int32)
    grids[:, 2] = lengths
    return np.stack([sample, modality, lengths, first_row], 1).astype(np.int32), grids


def segment_tables(samples, num_modalities: int, special: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Segment table [N, 4], grids [N, 3] and the number of position axes."""
    rows, grids, axes = [], [], 1
    first_row = [0] * num_modalities
    opening = (special >= 0).astype(int).tolist()  # special tokens in front of each segment
    total = 0
    for sample, parts in enumerate(samples):
        for given, length in _pairs(sample, parts):
            modality = given if type(given) is int else _whole(given)
            if modality is None or not 0 <= modality < num_modalities:
                raise ValueError(
                    f"from_segments: sample {sample} has modality {given!r}, expected 0 to {num_modalities - 1}"
                )
            grid = _grid(length)
            if not 1 <= len(grid) <= 3 or min(grid) < 0:
                raise ValueError(
                    f"from_segments: sample {sample} has length {length!r}, expected n >= 0, (rows, cols) or "
                    "(time, rows, cols)"
                )
            axes = max(axes, len(grid))
            own = math.prod(grid)  # of Python's integers: three large axes pass int64
            tokens = own + opening[modality]
            rows += (sample, modality, tokens, first_row[modality])
            grids += (0,) * (3 - len(grid)) + grid if own else (0, 0, 0)
            first_row[modality] += own
            total += tokens
            if total >= 2**31:
                raise ValueError(f"from_segments: more than 2**31 - 1 tokens at sample {sample}; cu_seqlens is int32")
    segments = np.array(rows, np.int32).reshape(-1, 4)
    return segments, np.array(grids, np.int32).reshape(-1, 3), axes


def _pairs(sample: int, parts) -> list[tuple[Any, Any]]:
    try:
        return [(modality, length) for modality, length in parts]
    except (TypeError, ValueError):  # no list, or something in it that is no pair
        raise ValueError(
            f"from_segments: sample {sample} is {parts!r}, expected a list of (modality, length)"
        ) from None


def _grid(length) -> tuple[int, ...]:
    """A segment's length as a tuple of its axes; empty where it is not made of whole numbers."""
    if type(length) is int:  # nearly all of them
        return (length,)
    if type(length) is tuple and _INT.issuperset(map(type, length)):  # and nearly all of the rest
        return length
    try:
        grid = tuple(map(_whole, length))
    except TypeError:  # one number, as an array or a tensor too
        grid = (_whole(length),)
    return () if None in grid else grid


_INT = frozenset({int})


def _whole(value) -> int | None:
    """None where it is no whole number: never rounds 2.5 to 2."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def check_bounds(function: str, name: str, bounds: np.ndarray, total_tokens: int, max_seqlen: int) -> None:
    # count_nonzero, not any: these are run for each new mask, where half the time goes into numpy's own Python
    if bounds[0] != 0 or bounds[-1] != total_tokens or np.count_nonzero(bounds[1:] < bounds[:-1]):
        raise ValueError(
            f"{function}: {name} runs from {bounds[0]} to {bounds[-1]}, expected non-decreasing values from 0 "
            f"to total_tokens {total_tokens}"
        )
    lengths = bounds[1:] - bounds[:-1]
    if np.count_nonzero(lengths > max_seqlen):
        raise ValueError(f"{function}: max_seqlen is {max_seqlen}, but a sample has {lengths.max()} tokens")
