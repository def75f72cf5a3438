"""Many arrays in one safetensors file, written one by one, so that they need never be in memory together.

The file holds "flat" [total], the arrays one after another; "shapes" int64 [n, rank]; and what `finish` adds.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np

DTYPES = {"uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


class ArrayWriter:
    """Context manager: `add` each array, then `finish`; without it nothing is left behind.

    The file appears whole, under its name, in `finish`: another run may be looking for it, or writing the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.payload = path.with_name(f".{path.name}.{os.getpid()}.payload")
        self.partial = path.with_name(f".{path.name}.{os.getpid()}")
        self.shapes: list[tuple[int, ...] | None] = []
        self.dtype: np.dtype | None = None
        self.total = 0

    def __enter__(self) -> ArrayWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.payload.open("wb")
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
        self.payload.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)

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
        self.file.close()
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
        with self.partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in small.values():
                file.write(np.ascontiguousarray(array).tobytes())
            with self.payload.open("rb") as payload:
                shutil.copyfileobj(payload, file, 1 << 24)
        self.partial.replace(self.path)


def _entry(dtype: np.dtype, shape: tuple[int, ...], start: int, size: int) -> dict:
    return {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, start + size]}
