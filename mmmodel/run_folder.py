"""Whose a folder of results is: one process at a time writes there, and what another configuration left is refused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from mmmodel import atomic, checkpoint, configs, metrics, pretraining
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.data.loader import ShardDataset
from mmmodel.export import FILE, written_step
from mmmodel.limits import FULL, CheckpointError, listed

logger = logging.getLogger(__name__)

# Fields that say where a run computes, in what portions, and what it keeps and tells: one that was stopped may go on
# with others.  `precision` and `compile` are not among them: they change its numbers by more than the order of sums.
WHERE = (
    "threads", "device", "checkpoint_every", "keep_checkpoints", "evaluate_every", "tensorboard", "checkpointing",
    "chunk_tokens", "sharded",
)  # fmt: skip
DATA = "data.json"


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether the lock `path` is this process's: not while another has it.  A lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Makes the folder, and raises ConfigError if another process is at work in it."""
    with held(folder / ".lock") as mine:
        if not mine:
            raise ConfigError(f"{who}: another process is at work in {folder}; wait for it, or choose another --out")
        yield


def begun(out: Path, config: PretrainConfig) -> PretrainConfig | None:
    """The configuration with which `out` holds this run already, in which case it goes on; None: it holds nothing.

    What made no step holds nothing.  Those of WHERE may differ, and the path of data that only moved.  Raises
    ConfigError if it holds a run of another configuration, naming the fields that differ, or of none, or a fine-tuning.
    """
    path = out / "config.json"
    if (out / "finetune.json").exists() and (out / FILE).exists():  # without a model it failed on the way
        raise ConfigError(f"pretrain: {out} holds a fine-tuning; choose another --out")
    steps = metrics.read(out / "metrics.jsonl") or checkpoint.saved(out / "checkpoints") or (out / FILE).exists()
    if not steps:
        return None
    if not path.exists():  # nobody can tell whose steps they are
        raise ConfigError(f"pretrain: {out} holds a run without its config.json; delete it, or choose another --out")
    try:
        theirs = configs.from_dict(json.loads(path.read_text(encoding="utf-8")))
        theirs = replace(theirs, data=pretraining.located(theirs.data))  # older runs kept it as it was typed
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"pretrain: {path} does not read: {error}; choose another --out") from error
    same = replace(theirs, **{name: getattr(config, name) for name in WHERE})
    if same != config and replace(same, data=config.data) == config and _is_data_of(out, config):
        return theirs
    if found := differences(configs.to_dict(same), configs.to_dict(config)):
        raise ConfigError(f"pretrain: {out} holds a run with other {found}; choose another --out")
    return theirs


def finished(out: Path, config: PretrainConfig) -> bool:
    """Whether the run of this configuration in `out` has its model, and no step to make.

    Its checkpoints do not matter: they may be deleted, to save their space.
    """
    if not (out / FILE).exists():
        return False
    try:
        step = written_step(out / FILE)  # None: an older run, which wrote it at its end alone
    except CheckpointError:
        if checkpoint.saved(out / "checkpoints"):  # it goes on, and writes the file anew
            return False
        raise
    return step is None or step >= config.steps


def note_data(out: Path, dataset: ShardDataset, *, begun: bool) -> None:
    """Keeps in `out` what the samples of a run are; warns if one that goes on finds others than before."""
    found, path = _samples(dataset), out / DATA
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # older runs kept none
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if begun and theirs["sha256"] != found["sha256"]:
            change = f"{theirs['samples']} samples -> {found['samples']}"
            logger.warning(
                "%s: the data changed since this run stopped (%s): its batches are others from here on",
                dataset.path,
                change if theirs["samples"] != found["samples"] else f"still {found['samples']} samples, not the same",
            )
    atomic.write_json(path, found)


def _is_data_of(out: Path, config: PretrainConfig) -> bool:
    """Whether the samples of the configuration's data are those that `note_data` kept."""
    try:
        return json.loads((out / DATA).read_text(encoding="utf-8")) == _samples(pretraining.open_data(config))
    except (FileNotFoundError, ValueError):  # an older run kept none, or the data is not there
        return False


def _samples(dataset: ShardDataset) -> dict[str, Any]:
    """A sample is its key, its metadata and the sizes of its files: shards may be copied, renamed or packed anew."""
    digest = hashlib.sha256()
    for entry in sorted(dataset.entries, key=lambda entry: entry.key):
        sizes = sorted((extension, size) for extension, (_, size) in entry.members.items())
        digest.update(json.dumps([entry.key, sizes, entry.meta], sort_keys=True).encode())
    return {"samples": len(dataset), "sha256": digest.hexdigest()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The values that differ, in words: "model.width 16 -> 32, lr 0.002 -> 0.001"; empty: none."""
    a, b = configs.leaves(old), configs.leaves(new)
    names = [name for name in b if name not in a or a[name] != b[name]]
    return listed([f"{name} {_shown(a.get(name))} -> {_shown(b[name])}" for name in names]) if names else ""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """OSError for what torch and safetensors raise, each in its own way, where a write fails, as on a full disk."""
    try:
        yield
    except (SafetensorError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        met = cause.__context__
        if isinstance(cause, RuntimeError) and isinstance(met, OSError) and met.errno in FULL:
            cause = met  # torch's writer of zip files then also fails as it closes
        if not isinstance(cause, OSError) and "os error" not in str(cause):  # nothing that a disk does
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(f"{folder}: could not be written, {free:,.1f} MB are free there: {cause}") from error


def _shown(value: Any) -> str:
    return (",".join(map(str, value)) if isinstance(value, list) else str(value)) or "nothing"
