"""Checkpoints through torch.distributed.checkpoint: atomic, the latest wins, the oldest go."""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule

from mmmodel import atomic
from mmmodel.limits import CheckpointError
from mmmodel.safe_reading import OtherModelError, SafePlanner, SafeReader, read_index

State = tuple[dict[str, Tensor], dict[str, Any]]  # of module and optimizer, by the names of parameters

SUMS = "crc32.json"  # of each other file of a checkpoint: torch's format has none
_NAME = re.compile(r"step-(\d{8})")
_BLOCK = 2**20  # bytes


def save(
    folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder/step-NNNNNNNN`; a reader sees it whole or not at all.  Older ones beyond `keep` are removed."""
    return write(folder, step, state(module, optimizer), progress, keep=keep)


def state(module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """What `write` keeps of both.  Of a module that is split every rank must ask: rank 0 gets all, in host memory."""
    split = isinstance(module, FSDPModule)
    return get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=split, cpu_offload=split))


def write(folder: Path, step: int, whole: State, progress: dict[str, Any], *, keep: int) -> Path:
    """`save` of what `state` gave."""
    final = folder / f"step-{step:08d}"
    if final.exists():  # the same step has the same state
        return final
    model_state, optimizer_state = whole
    with atomic.replacing(final) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")  # one process: no group, as intended
        dcp.save(
            {"module": model_state, "optimizer": optimizer_state, "progress": progress},
            checkpoint_id=partial,
            no_dist=True,
        )
        sums = {path.name: _sum(path) for path in sorted(partial.iterdir())}
        (partial / SUMS).write_text(json.dumps(sums), encoding="utf-8")
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def saved(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def load(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    *,
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    """Restore module and optimizer in place; returns the progress that was saved.  `progress` names its fields.

    optional: those of them that stay as they are given where the checkpoint lacks them.

    Raises CheckpointError for one of another model, and for one that is damaged or holds more than data; of these it
    says what deleting it would do, for a step back is the user's to choose.
    """
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"module": model_state, "optimizer": optimizer_state, "progress": dict(progress)}
    try:
        # The index first: torch would log a traceback of what is wrong with it.
        # What no gradient reached, as of a modality that the data lacks, had nothing to save; torch makes it up.
        saved_names, averages = read_index(path).state_dict_metadata, optimizer_state["state"]
        made_up = {n: averages.pop(n) for n in list(averages) if f"optimizer.state.{n}.step" not in saved_names}
        for name in optional:
            if f"progress.{name}" not in saved_names:
                state["progress"].pop(name, None)
        try:
            _read(path, state)
        except OtherModelError:
            _check_sums(path)  # a damaged index may tell of another model
            raise
        _check_sums(path)
    except OtherModelError as error:
        raise CheckpointError(f"{path}: of another model: {error}; choose another --out") from error
    except CheckpointError as error:
        before = [older for older in saved(path.parent) if older.name < path.name]
        back = f"goes back to {before[-1].name}" if before else "begins the run anew"
        raise CheckpointError(f"{error}; deleting the folder {path} {back}") from error
    state["optimizer"]["state"] |= made_up  # torch asks for all of them
    set_state_dict(module, optimizer, model_state_dict=state["module"], optim_state_dict=state["optimizer"])
    parameters = dict(module.named_parameters())
    for name in made_up:
        del optimizer.state[parameters[name]]
    return progress | state["progress"]


def _read(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state`, and its progress, from a checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        try:
            dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, CheckpointError):
                raise cause from error
            raise CheckpointError(f"{path}: damaged: {str(cause) or type(cause).__name__}") from error


def _check_sums(path: Path) -> None:
    """Raises CheckpointError if a file of the checkpoint holds other bytes than were written."""
    if not (path / SUMS).exists():  # of an earlier version
        return
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, its {SUMS} does not read: {error}") from error
    if not isinstance(sums, dict) or not sums.keys() <= {file.name for file in path.iterdir() if file.is_file()}:
        raise CheckpointError(f"{path}: damaged, its {SUMS} names other files than are there")
    changed = [name for name, value in sums.items() if _sum(path / name) != value]
    if changed:
        raise CheckpointError(f"{path}: damaged, {', '.join(changed)} does not match its checksum")


def _sum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
