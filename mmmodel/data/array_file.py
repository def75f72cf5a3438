"""Many arrays in one safetensors file, written one by one, so that they need never be in memory together.

The file holds "flat" [total], the arrays one after another; "shapes" int64 [n, rank]; and what `finish` adds.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmmodel import atomic

DTYPES = {"uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


class ArrayWriter:
    """Context manager: `add` each array, then `finish`; without it nothing is left behind.

    The file appears whole, under its name, in `finish`: another run may be looking for it, or writing the same.  Until
    then the arrays lie beside it in a file without a name, of which nothing stays however the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: list[tuple[int, ...] | None] = []
        self.dtype: np.dtype | None = None
        self.total = 0

    def __enter__(self) -> ArrayWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=self.path.parent)
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError):  # a full disk, on which the last arrays find no room: they are not wanted any more
            self.file.close()

    def add(self, array: np.ndarray | None) -> None:
        """None: an empty array stands there.  Raises ValueError for another dtype or rank than the first one's."""
        if array is not None:
            rank = next((len(shape) for shape in self.shapes if shape is not None), array.ndim)
            if array.dtype != (self.dtype or array.dtype) or array.ndim != rank:
                raise ValueError(
                    f"ArrayWriter: array {len(self.shapes)} is {array.dtype} of rank {array.ndim}, "
                    f"expected {self.dtype} of rank {rank}"
                )
            self.dtype = array.dtype
            self.file.write(np.ascontiguousarray(array).data)
            self.total += array.size
        self.shapes.append(None if array is None else array.shape)

    def finish(self, extra: dict[str, np.ndarray]) -> None:
        rank = next((len(shape) for shape in self.shapes if shape is not None), 1)
        shapes = np.array([shape or (0,) * rank for shape in self.shapes], np.int64).reshape(-1, rank)
        small = {"shapes": shapes, **extra}
        # The few small ones first: a reader may want int64 aligned, and the flat one has elements of any width.
        header, start = {}, 0
        for name, array in small.items():
            header[name] = _entry(array.dtype, array.shape, start, array.nbytes)
            start += array.nbytes
        dtype = self.dtype or np.dtype(np.uint8)
        header["flat"] = _entry(dtype, (self.total,), start, self.total * dtype.itemsize)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic.replacing(self.path) as partial, partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in small.values():
                file.write(np.ascontiguousarray(array).tobytes())
            self.file.seek(0)
            shutil.copyfileobj(self.file, file, 1 << 24)


def _entry(dtype: np.dtype, shape: tuple[int, ...], start: int, size: int) -> dict:
    return {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, start + size]}
