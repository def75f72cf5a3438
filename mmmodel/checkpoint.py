"""Checkpoints through torch.distributed.checkpoint: atomic, the latest wins, the oldest go."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mmmodel import atomic
from mmmodel.export import CheckpointError
from mmmodel.safe_reading import SafePlanner, SafeReader

_NAME = re.compile(r"step-(\d{8})")


def save(
    folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder/step-NNNNNNNN`; a reader sees it whole or not at all.  Older ones beyond `keep` are removed."""
    final = folder / f"step-{step:08d}"
    if final.exists():  # the same step has the same state
        return final
    model_state, optimizer_state = get_state_dict(module, optimizer)
    with atomic.replacing(final) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")  # one process: no group, as intended
        dcp.save(
            {"module": model_state, "optimizer": optimizer_state, "progress": progress},
            checkpoint_id=partial,
            no_dist=True,
        )
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def saved(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> dict[str, Any]:
    """Restore module and optimizer in place; returns the progress that was saved.  `progress` names its fields.

    Raises CheckpointError for one that is damaged, of another model, or holds more than data; it says what deleting it
    would do, for a step back is the user's to choose.
    """
    try:
        return _load(path, module, optimizer, progress)
    except CheckpointError as error:
        before = [older for older in saved(path.parent) if older.name < path.name]
        back = f"goes back to {before[-1].name}" if before else "begins the run anew"
        raise CheckpointError(f"{error}; deleting the folder {path} {back}") from error


def _load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"module": model_state, "optimizer": optimizer_state, "progress": dict(progress)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        try:
            dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, CheckpointError):
                raise cause from error
            raise CheckpointError(f"{path}: damaged, or of another model: {cause}") from error
    set_state_dict(module, optimizer, model_state_dict=state["module"], optim_state_dict=state["optimizer"])
    return state["progress"]
