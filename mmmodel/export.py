"""A trained model as one safetensors file with its configuration and tokenizer inside, and back; nothing is unpickled.

The file holds everything that `from_pretrained` needs; it is data, so a stranger's file can at worst be wrong.
"""

from __future__ import annotations

import json
import logging
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from mmmodel import atomic, configs, limits
from mmmodel.configs import PretrainConfig
from mmmodel.frontends.text import load_tokenizer
from mmmodel.limits import CheckpointError, listed
from mmmodel.pretraining import Pretraining

logger = logging.getLogger(__name__)

FILE = "model.safetensors"
SCALE = "objectives.contrastive.log_scale"
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Run:
    """What a pretrained or fine-tuned run left: all that is needed to build its model again."""

    path: Path  # of the weights
    config: PretrainConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    finetuning: str | None = None  # of a fine-tuned run: its configuration and labels, as `finetuning.run` writes them
    step: int | None = None  # after which they were written; None: nobody said

    @property
    def finished(self) -> bool:
        """Whether no step was left to make; True where nobody said."""
        return self.step is None or self.step >= self.config.steps


def export(path: Path | str, learner: Pretraining, config: PretrainConfig, *, step: int | None = None) -> None:
    """Encoder, front ends and heads, as they are after `step` steps; atomically."""
    more = {} if step is None else {"step": str(step)}
    write(Path(path), learner.state_dict(), config, learner.model.tokenizer, **more)


def write(path: Path, tensors: Mapping[str, Tensor], config: PretrainConfig, tokenizer: Tokenizer, **more: str) -> None:
    """The file itself, with `more` metadata; whole or not at all, and readable by whom the umask lets read."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", "config": json.dumps(configs.to_dict(config)), "tokenizer": tokenizer.to_str()}
    with atomic.replacing(path) as partial:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(tensors, partial, metadata={**metadata, **more, "crc32": str(checksum(tensors))})
        _sort_metadata(partial)
        partial.chmod(mode)  # safetensors leaves a file that its owner alone may read


def _sort_metadata(path: Path) -> None:
    """In place: safetensors writes it in another order each time, and equal runs should leave equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:  # not where a later safetensors writes JSON in another way
            file.seek(8)
            file.write(text)


def from_pretrained(path: Path | str, *, device: torch.device | str = "cpu", impl: str | None = None) -> Pretraining:
    """The learner that `export` wrote, bit by bit, in eval mode.  path, impl: as in `open_run`.

    `learner.model` is the encoder, `learner.objectives` the heads, `learner.config` the configuration.  Raises
    CheckpointError for a file that is missing, damaged or of another model, and for a fine-tuned one, which
    `finetuning.run.load` reads.
    """
    limits.check_device(str(device), "from_pretrained")
    run = open_run(path, impl=impl)
    refuse_finetuned(run)
    learner = Pretraining(run.config, run.tokenizer)
    load_weights(run, learner)
    return learner.to(device).eval()


def open_run(path: Path | str, *, impl: str | None = None) -> Run:
    """path: a run's folder, or its safetensors file.  impl: of every operator, in place of the run's own; None: that.

    Only safetensors is read, which holds data alone.  A run that is not finished has the weights of its last
    checkpoint there; a warning says so.  Raises CheckpointError for a path that is not there, for a
    pickle, for what is no safetensors file or a damaged one, and for one without configuration.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if file.suffix in PICKLED:
        raise CheckpointError(f"{file}: a pickle can run any code when it is read, so none is; expected safetensors")
    metadata, tensors = _read(file)
    config, tokenizer = _config(file, metadata), _tokenizer(file, metadata)
    if "crc32" in metadata and metadata["crc32"] != str(checksum(tensors)):
        raise CheckpointError(f"{file}: damaged, its tensors do not match their checksum")
    if SCALE in tensors:
        tensors[SCALE] = tensors[SCALE].reshape(1)  # earlier versions wrote a number, without a shape
    if impl:
        config = replace(config, model=replace(config.model, impl=impl))
    run = Run(file, config, tokenizer, tensors, metadata.get("finetune"), _step(file, metadata))
    if not run.finished:
        logger.warning("%s: of step %d of %d, its run is not finished", file, run.step, config.steps)
    return run


def read_config(path: Path) -> PretrainConfig:
    """The configuration inside a file.  Raises CheckpointError as `open_run` does."""
    return _config(path, _read(path, tensors=False)[0])


def written_step(path: Path) -> int | None:
    """Of `Run.step`.  Raises CheckpointError as `open_run` does."""
    return _step(path, _read(path, tensors=False)[0])


def load_weights(run: Run, learner: Pretraining) -> None:
    """Into a learner of the same configuration.  Raises CheckpointError naming what is missing, extra or misshapen."""
    if wrong := misfits(run.tensors, learner.state_dict()):
        raise CheckpointError(f"{run.path}: does not fit the model: {'; '.join(wrong)}")
    learner.load_state_dict(run.tensors, strict=True)


def refuse_finetuned(run: Run) -> None:
    """Raises CheckpointError for a run whose heads of pretraining are gone, saying what reads it."""
    if run.finetuning is not None:
        what_reads_it = "predict, embed, explain and export read it"
        raise CheckpointError(f"{run.path}: is fine-tuned, the heads of its pretraining are gone; {what_reads_it}")


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is missing, extra, or of another shape or dtype, in words; empty when all fits."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    words = [f"{kind} {listed(names)}" for kind, names in (("missing", missing), ("extra", extra)) if names]
    for name in [name for name in expected if name in found]:
        have, want = found[name], expected[name]
        if have.shape != want.shape:
            words.append(f"{name} is {tuple(have.shape)}, expected {tuple(want.shape)}")
        elif have.dtype != want.dtype:
            words.append(f"{name} is {have.dtype}, expected {want.dtype}")
    return words


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """crc32 over the bytes of all tensors in order of their names: safetensors itself has none."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a safetensors file says of itself, and what it holds; opened once, as a run under way replaces it."""
    if not path.is_file():
        when = "with its first checkpoint, `finetune` at its end"
        raise CheckpointError(f"{path}: no such file; `mmmodel pretrain` writes {FILE} {when}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys() if tensors}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one: {error}") from error


def _step(path: Path, metadata: Mapping[str, str]) -> int | None:
    try:
        return int(metadata["step"]) if "step" in metadata else None
    except ValueError as error:
        raise CheckpointError(f"{path}: its step does not read: {metadata['step']!r}") from error


def _config(path: Path, metadata: Mapping[str, str]) -> PretrainConfig:
    if "config" not in metadata:
        raise CheckpointError(f"{path}: holds tensors but no configuration, expected a file that mmmodel exported")
    try:
        return configs.from_dict(json.loads(metadata["config"]))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: its configuration does not read: {error}") from error


def _tokenizer(path: Path, metadata: Mapping[str, str]) -> Tokenizer:
    """The one inside the file; a run of an earlier version has it only beside it."""
    if "tokenizer" not in metadata:
        if (beside := path.with_name("tokenizer.json")).exists():
            return load_tokenizer(beside)
        raise CheckpointError(f"{path}: holds no tokenizer, expected a file that mmmodel exported")
    try:
        return Tokenizer.from_str(metadata["tokenizer"])
    except Exception as error:  # what the Rust library raises has no type of its own
        raise CheckpointError(f"{path}: its tokenizer does not read: {error}") from error
