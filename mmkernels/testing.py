"""Oracles, input factories and the error rule, shared by tests and benchmarks.

T tokens, B samples, M modalities.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask

# What our error may be, in terms of torch's own on the same data.
MAX_RATIO = 2.0
RMS_RATIO = 1.25


def error_floor(ref: Tensor, dtype: torch.dtype) -> float:
    """2 max|(ref + 0.3) - 0.3 - ref| in `dtype`: what rounding alone can do to values of this size."""
    rounded = ref.to(dtype)
    return 2.0 * float((((rounded + 0.3) - 0.3) - rounded).abs().max()) if ref.numel() else 0.0


def assert_error_rule(
    name: str, ours: Tensor, ref: Tensor, torch_same: Tensor, *, max_ratio: float = MAX_RATIO, rounding: float = 0.0
) -> None:
    """Our error is at most what the best same-dtype PyTorch computation makes; max_ratio is 2.

        max|ours - ref| <= 2 max|torch - ref| + floor    and    rms(ours - ref) <= 1.25 rms(torch - ref) + floor / 4

    rounding          relative error allowed on top of the rms, times the rms of ref
    ours, torch_same  results in one dtype; ref  float64 on upcast inputs.  All must agree where they are infinite.
    Raises AssertionError naming `name` and the figures.
    """
    if ours.shape != ref.shape or torch_same.shape != ref.shape:
        raise AssertionError(
            f"{name}: shapes {tuple(ours.shape)}, {tuple(torch_same.shape)}, expected {tuple(ref.shape)}"
        )
    if ours.dtype != torch_same.dtype:
        raise AssertionError(f"{name}: ours is {ours.dtype}, torch's is {torch_same.dtype}")
    infinite = torch.isinf(ref)
    if not torch.equal(torch.where(infinite, ours.double(), 0), torch.where(infinite, ref.double(), 0)):
        raise AssertionError(f"{name}: not infinite where the reference is")
    ref = torch.where(infinite, 0, ref.double())
    ours_error = (torch.where(infinite, 0, ours.double()) - ref).abs()
    torch_error = (torch.where(infinite, 0, torch_same.double()) - ref).abs()
    if not ref.numel():
        return
    floor = error_floor(ref, ours.dtype)
    worst, bound = float(ours_error.max()), max_ratio * float(torch_error.max()) + floor
    if not worst <= bound:  # also catches NaN
        raise AssertionError(f"{name}: max error {worst:.3e} > {bound:.3e} (torch {float(torch_error.max()):.3e})")
    rms, rms_torch = float(ours_error.square().mean().sqrt()), float(torch_error.square().mean().sqrt())
    # A quarter of the floor: where torch happens to be exact, ratios of errors mean nothing.
    floor = floor / 4 + rounding * float(ref.square().mean().sqrt())
    if not rms <= RMS_RATIO * rms_torch + floor:
        raise AssertionError(f"{name}: rms error {rms:.3e} > {RMS_RATIO} x torch's {rms_torch:.3e} + {floor:.1e}")


def assert_tile_order(samples: Sequence[int], weights: Sequence[int]) -> None:
    """Of a schedule's tiles: each sample's stand together, samples by their heaviest, in each the heaviest first."""
    runs = [
        [w for _, w in run] for _, run in itertools.groupby(zip(samples, weights, strict=True), lambda tile: tile[0])
    ]
    assert len(runs) == len(set(samples)), f"tiles of a sample stand apart: {list(samples)}"
    for own in (*runs, [run[0] for run in runs]):
        assert own == sorted(own, reverse=True), f"expected the heaviest first, got {own}"


def reference_mask(
    layout: PackedLayout, mask: AttentionMask | None = None, k_layout: PackedLayout | None = None
) -> Tensor:
    """bool [Tq, Tk], True where query may see key: the definition of AttentionMask, pair by pair.  For tests."""
    mask = mask or AttentionMask()
    keys = layout if k_layout is None else k_layout
    q_modality, segment = layout.modality_ids.tolist(), layout.segment_ids.tolist()
    k_modality = keys.modality_ids.tolist()
    seen = torch.zeros(layout.total_tokens, keys.total_tokens, dtype=torch.bool, device="cpu")
    q_bounds, k_bounds = (itertools.pairwise(side.cu_seqlens.tolist()) for side in (layout, keys))
    for sample, ((start, stop), (first, last)) in enumerate(zip(q_bounds, k_bounds, strict=True)):
        prefix = mask.prefix[sample] if mask.prefix is not None else 0
        shift = first - start  # of the query's place among the keys
        if mask.align == "bottom_right":
            shift = last - stop
        for i in range(start, stop):
            own = i + shift
            for j in range(first, last):
                kept = mask.causal and (
                    j < first + prefix
                    or (k_layout is None and segment[i] == segment[j] and q_modality[i] in mask.bidirectional)
                )
                inside = (mask.window[0] < 0 or j >= own - mask.window[0]) and (
                    mask.window[1] < 0 or j <= own + mask.window[1]
                )
                if mask.window_scope == "all":
                    allowed = (not mask.causal or j <= own or kept) and inside
                else:
                    allowed = kept or ((not mask.causal or j <= own) and inside)
                if mask.intervals is not None:
                    allowed = allowed and mask.intervals.lo[i] <= j - first < mask.intervals.hi[i]
                if mask.visible is not None:
                    allowed = allowed and mask.visible[q_modality[i]][k_modality[j]]
                seen[i, j] = bool(allowed)
    return seen


def random_layout(seed: int, *, num_samples: int = 5, num_modalities: int = 3, max_length: int = 40) -> PackedLayout:
    """A ragged layout with interleaved segments, missing modalities, empty samples and samples of one token."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_samples):
        kind = rng.integers(8)
        if index and kind == 0:
            samples.append([])
        elif index and kind == 1:
            samples.append([(int(rng.integers(num_modalities)), 1)])
        else:
            count = int(rng.integers(1, num_modalities + 2))
            samples.append(
                [(int(rng.integers(num_modalities)), int(rng.integers(1, max_length + 1))) for _ in range(count)]
            )
    return PackedLayout.from_segments(samples, num_modalities=num_modalities)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fresh memory holds NaN (floats) or a large value (integers), so that a slot nobody wrote shows."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    def wrap(original):
        return lambda *args, **kwargs: poison(original(*args, **kwargs))

    try:
        for name in names:
            setattr(torch, name, wrap(originals[name]))
        Tensor.new_empty = wrap(new_empty)
        yield
    finally:
        for name in names:
            setattr(torch, name, originals[name])
        Tensor.new_empty = new_empty
