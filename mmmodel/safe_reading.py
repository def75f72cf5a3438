"""Reads torch.distributed checkpoints without running what a stranger may have put into them.

The format is torch's own: an index that is a pickle, and values that torch.load reads.  The index may name the few
classes that it is made of, values are read as torch's weights_only allows, and anything else is refused.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mmmodel.limits import CheckpointError

INDEX = ".metadata"
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # where Python 3.13 keeps them
    "collections": ("OrderedDict",),
}  # fmt: skip


class OtherModelError(CheckpointError):
    """Another model's: its tensors have other names or shapes."""


class SafeReader(FileSystemReader):
    """torch's reader with an index that can do nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which reads values that are no tensors, after they have shown to be plain data."""

    def create_local_plan(self) -> LoadPlan:
        try:
            return super().create_local_plan()
        except (RuntimeError, ValueError) as error:  # a missing tensor, one of another shape
            raise OtherModelError(str(error)) from error

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint.  Raises CheckpointError if it is missing, damaged, or names what it should not."""
    try:
        with (folder / INDEX).open("rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: not a checkpoint, it has no {INDEX}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except Exception as error:  # a damaged pickle raises what it likes
        said = str(error) or type(error).__name__
        raise CheckpointError(f"{folder}: damaged, its {INDEX} does not read: {said}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder}: damaged, its {INDEX} holds a {type(metadata).__name__}")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _NAMES.get(module, ()):
            return super().find_class("pathlib" if module.startswith("pathlib") else module, name)
        raise CheckpointError(f"its {INDEX} names {module}.{name}, which no checkpoint needs: not read")
