"""From the arguments of a call to the plan of its padded batch, once per content.   B samples, Lq, Lk padded."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels import transforms
from mmkernels.compat import kept, mask_reading
from mmkernels.compat.arguments import is_whole
from mmkernels.compat.mask_reading import Bounds
from mmkernels.compat.padded import PaddedPlan, plan_bounds, plan_device_bounds

Lengths = tuple[int, ...] | Tensor | None


class Seen(NamedTuple):
    """What a call lets its queries see.  mask [B or 1, H or 1, Lq or 1, Lk or 1]; lengths as the drop-ins take them."""

    is_causal: bool
    window: tuple[int, int]
    bottom_right: bool
    lengths: Any
    key_lengths: Any
    mask: Tensor | None


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int


class Refused(NamedTuple):
    reason: str  # begins with the argument's name


def plan(seen: Seen, shape: Shape, device: torch.device, *, by_head: bool = False) -> PaddedPlan | Refused:
    """The plan of a padded batch on `device`, or why there is none.  Kept by content, and by mask and its version.

    by_head: take each head for a sample, as padded.goes_by_head advises; masks that differ between heads need it.
    Raises ValueError for lengths that do not fit.
    """
    if seen.mask is not None and seen.mask.requires_grad:
        return Refused("attn_mask requires a gradient, and masks have none")
    if not torch._C._are_functorch_transforms_active():
        return _plan(seen, shape, device, by_head)
    seen = seen._replace(**{name: transforms.below(getattr(seen, name)) for name in ("lengths", "key_lengths", "mask")})
    with torch._C._DisableFuncTorch():  # else what is made here has no data that numpy could read
        return _plan(seen, shape, device, by_head)


def _plan(seen: Seen, shape: Shape, device: torch.device, by_head: bool) -> PaddedPlan | Refused:
    lengths, key_lengths = checked_lengths(seen, shape)
    if any(isinstance(n, Tensor) for n in (lengths, key_lengths)):
        return _device_plan(seen, lengths, key_lengths, shape, device, by_head)
    content = (seen[:3], shape, device, by_head, lengths, key_lengths)

    def build() -> PaddedPlan | Refused:
        if seen.mask is None:
            return _host_plan(seen, None, lengths, key_lengths, shape, device, by_head)
        return _masked_plan(seen, lengths, key_lengths, shape, device, by_head)

    if seen.mask is not None:
        return kept.once(seen.mask, content, build)
    if content not in kept.plans and kept.captures(device):
        return Refused(
            "lengths on the host, or none, cannot be planned while a graph is captured; give them on the device, or "
            "call once before"
        )
    return kept.by_content(content, build)


def checked_lengths(seen: Seen, shape: Shape) -> tuple[Lengths, Lengths]:
    """lengths and key_lengths: None, ints, or the tensor as it came where it is on a device and need not be read.

    Raises ValueError naming the one that does not fit; of a tensor that is not read, by dtype and shape alone.
    """
    lengths = _checked("lengths", seen.lengths, shape.batch, shape.queries, seen.mask)
    if seen.key_lengths is not None:
        return lengths, _checked("key_lengths", seen.key_lengths, shape.batch, shape.keys, seen.mask)
    if lengths is not None and shape.queries != shape.keys:
        raise ValueError(
            f"lengths: queries have {shape.queries} places and keys {shape.keys}, expected key_lengths too"
        )
    return lengths, lengths


def _checked(name: str, values, batch: int, most: int, mask: Tensor | None) -> Lengths:
    expected = f"expected {batch} whole numbers, one per sample"
    if values is None:
        return None
    if isinstance(values, Tensor) and (torch.compiler.is_compiling() or (mask is None and values.device.type != "cpu")):
        if not is_whole(values) or values.shape != (batch,):
            raise ValueError(f"{name}: {values.dtype} {tuple(values.shape)}, {expected}")
        return values
    listed = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if not isinstance(listed, list | tuple):
        raise ValueError(f"{name}: {type(values).__name__}, {expected}")
    found = []
    for place, n in enumerate(listed):
        try:
            if isinstance(n, bool):
                raise TypeError
            found.append(index(n))
        except TypeError:  # never rounds 2.5 to 2
            raise ValueError(f"{name}: entry {place} is {n!r}, {expected}") from None
    if len(found) != batch:
        raise ValueError(f"{name}: {len(found)} entries, {expected}")
    if found and (min(found) < 0 or max(found) > most):
        raise ValueError(f"{name}: from {min(found)} to {max(found)}, expected 0 to {most}")
    return tuple(found)


def _masked_plan(seen: Seen, lengths, key_lengths, shape: Shape, device, by_head: bool) -> PaddedPlan | Refused:
    if kept.captures(device):
        return Refused("attn_mask cannot be read while a graph is captured; give lengths, or call once before")
    read = mask_reading.read(seen.mask.expand(*seen.mask.shape[:3], shape.keys), shape.batch, shape.heads)
    if isinstance(read, str):
        return Refused(f"attn_mask {read}")
    if read.lo.shape[0] > max(shape.batch, 1):  # one mask may be for all samples, also where there are none
        if shape.heads != shape.kv_heads:
            return Refused("attn_mask differs between heads, of which several share keys")
        by_head = True
    content = (seen[:3], shape, device, by_head, lengths, key_lengths, read.key())
    return kept.by_content(content, lambda: _host_plan(seen, read, lengths, key_lengths, shape, device, by_head))


def _host_plan(
    seen: Seen, read: Bounds | None, lengths, key_lengths, shape: Shape, device, by_head: bool
) -> PaddedPlan:
    given = (None if n is None else torch.tensor(n, dtype=torch.int64, device="cpu") for n in (lengths, key_lengths))
    bounds = mask_reading.of_lengths(shape.queries, shape.keys, *given, *seen[:3])
    bounds = Bounds(*(t.numpy() for t in bounds))
    if read is not None:
        bounds = mask_reading.intersect(_per_sample(bounds, read), read)
    samples = shape.batch * shape.heads if by_head else shape.batch
    return plan_bounds(bounds, samples, shape.queries, shape.keys, device, by_head)


def _per_sample(bounds: Bounds, like: Bounds) -> Bounds:
    """bounds of B samples for as many masks as `like` has: B, or B H."""
    n, masks = bounds.lo.shape[0], like.lo.shape[0]
    repeats = masks // n if masks > n > 1 else 1
    return Bounds(*(np.repeat(part, repeats, 0) for part in bounds[:2]))


def _device_plan(seen: Seen, lengths, key_lengths, shape: Shape, device, by_head: bool) -> PaddedPlan | Refused:
    """Lengths of which one is on the device at least are not read there, so nothing waits for them."""
    if kept.captures(device) and any(isinstance(n, tuple) for n in (lengths, key_lengths)):
        return Refused("lengths on the host cannot go to the device while a graph is captured; give both on the device")
    tensors = [n for n in (lengths, key_lengths) if isinstance(n, Tensor)]
    owner = next((n for n in tensors if n.device.type != "cpu"), tensors[0])
    other = key_lengths if owner is lengths else lengths
    # A second tensor counts by identity and version, and is kept beside the plan, so that no other takes its id.
    apart = isinstance(other, Tensor) and other is not owner
    unversioned = apart and other.is_inference()
    known = (id(other), None if unversioned else other._version) if apart else None if other is owner else other
    content = (seen[:3], shape, device, by_head, owner is lengths, owner is key_lengths, known)

    def build() -> tuple[PaddedPlan, Tensor | None]:
        given = (None if n is None else torch.as_tensor(n, device=device) for n in (lengths, key_lengths))
        lo, hi = mask_reading.of_lengths(shape.queries, shape.keys, *given, *seen[:3])
        samples = shape.batch * shape.heads if by_head else shape.batch
        return plan_device_bounds(lo, hi, samples, shape.keys, by_head), other if apart else None

    return (build() if unversioned else kept.once_per_graph(owner, content, build))[0]
