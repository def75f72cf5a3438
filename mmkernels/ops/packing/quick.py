"""Packing for plain calls on the CPU: pack, unpack, pad, unpad, gather_rows and segment_mean of mmkernels/direct.py.

Their last argument is `out` or None.  Where they return None the caller goes on with the checks that have words for it,
and the dispatcher.
"""

from __future__ import annotations

from typing import Any

from mmkernels import direct

_NAMES = ("pack", "unpack", "pad", "unpad", "gather_rows", "segment_mean")


def __getattr__(name: str) -> Any:
    """The first use of a function loads the extension; later ones find it in this module."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    globals().update({each: direct.function(each) for each in _NAMES})
    return globals()[name]
