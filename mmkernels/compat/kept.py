"""What the drop-ins keep between calls: plans by content, and what was made of a tensor, by tensor and version."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from mmkernels import locks
from mmkernels.compat.padded import PaddedPlan
from mmkernels.devices import captures

MAX_RESULTS = 8  # kept per tensor
MAX_PLANS, MAX_PLANNED_TOKENS = 64, 1 << 22  # kept: enough for all layers of a step, and a few hundred MB at most


class _Plans:
    """The latest plans, by content."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, PaddedPlan] = OrderedDict()
        self._tokens = 0
        self._lock = locks.across_forks()  # DataParallel calls from threads

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, build: Callable[[], PaddedPlan]) -> PaddedPlan:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            found = self._kept[key] = build()
            self._tokens += found.layout.total_tokens
            while len(self._kept) > 1 and (len(self._kept) > MAX_PLANS or self._tokens > MAX_PLANNED_TOKENS):
                self._tokens -= self._kept.popitem(last=False)[1].layout.total_tokens
            return found


plans = _Plans()
by_content = plans.get
_by_tensor: dict[int, tuple] = {}  # id of a tensor: (weak reference, version, {(view of it, what else counts): result})
_by_tensor_lock = locks.across_forks()


def once(tensor: Tensor, content: Hashable, build: Callable[[], Any]) -> Any:
    """build(), once per tensor, version of its data and content.  Views of one tensor share its entry.

    The result must not hold the tensor, or neither would ever be freed.
    """
    if tensor.is_inference():  # has no version: read every time
        return build()
    owner, version = tensor if tensor._base is None else tensor._base, tensor._version
    key = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, content)
    with _by_tensor_lock:
        entry = _by_tensor.get(id(owner))
        if entry is None or entry[0]() is not owner or entry[1] != version:
            entry = _by_tensor[id(owner)] = (weakref.ref(owner, _forget(id(owner))), version, {})
        results = entry[2]
        found = results.get(key)
    if found is None:
        built = build()
        with _by_tensor_lock:
            found = results.setdefault(key, built)  # of two threads that built it the first
            if len(results) > MAX_RESULTS:  # a mask kept for good, of which each call takes another part
                del results[next(iter(results))]
    return found


def once_per_graph(tensor: Tensor, content: Hashable, build: Callable[[], Any]) -> Any:
    """`once`, of a tensor that build() does not read but computes with on its device.

    A graph that is captured has to hold that itself: its replays meet other values in the same tensor, and what was
    made in its memory is nobody else's to use.
    """
    return build() if captures(tensor.device) else once(tensor, content, build)


def _forget(number: int) -> Callable[[weakref.ref], None]:
    # kept: at exit, when the last masks go, the module's own name for it is gone.
    def forget(reference: weakref.ref, kept: dict[int, tuple] = _by_tensor) -> None:
        # Without the lock: this runs wherever a tensor happens to go, also where its thread holds it.
        entry = kept.get(number)
        if entry is not None and entry[0] is reference:  # not that of a later tensor with the same id
            kept.pop(number, None)

    return forget
