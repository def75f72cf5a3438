"""Weights of a run: read without unpickling, checked against their sum, and loaded with a report of what matched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmmodel import export
from mmmodel.configs import PretrainConfig
from mmmodel.export import CheckpointError
from mmmodel.frontends.text import load_tokenizer
from mmmodel.pretraining import Pretraining

NAMED = 6  # tensors that a summary lists by name
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Run:
    """What a pretrained or fine-tuned run left: all that is needed to build its model again."""

    path: Path  # of the weights
    config: PretrainConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    finetuning: str | None = None  # of a fine-tuned run: its configuration and labels, as `run.save` writes them


@dataclass(frozen=True)
class Loaded:
    """What became of each tensor, by name."""

    matched: list[str]
    missing: list[str]  # the module has them, the file does not: they keep their initial values
    misshapen: list[str]  # of another shape or dtype in the file; not loaded
    extra: list[str]  # in the file alone

    def summary(self) -> str:
        """One line, with the names of what is not as it should be."""
        words = [f"{len(self.matched)} tensors loaded"]
        for kind in ("missing", "misshapen", "extra"):
            if names := getattr(self, kind):
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                words.append(f"{len(names)} {kind} ({', '.join(names[:NAMED])}{more})")
        return "; ".join(words)

    def to_dict(self) -> dict[str, list[str]]:
        return asdict(self)


def open_run(path: Path | str) -> Run:
    """path: a run's folder, or its safetensors file.

    Only safetensors is read, which holds data alone.  Raises CheckpointError for a path that is not there, for a
    pickle, for what is no safetensors file or a damaged one, and for one without configuration.
    """
    path = Path(path)
    file = path / export.FILE if path.is_dir() else path
    if file.suffix in PICKLED:
        raise CheckpointError(f"{file}: a pickle can run any code when it is read, so none is; expected safetensors")
    config = export.read_config(file)
    return Run(file, config, _tokenizer(file), read_tensors(file), export.read_metadata(file).get("finetune"))


def learner_of(run: Run) -> Pretraining:
    """Its encoder, with those of the objectives whose weights it holds, in eval mode.

    A fine-tuned run has none, or for retrieval `contrastive`.  Raises CheckpointError for weights that do not fit.
    """
    learner = Pretraining(run.config, run.tokenizer)
    load_into(learner.model, run.tensors, where=str(run.path), prefix="model.")
    for name, objective in list(learner.objectives.items()):
        prefix = f"objectives.{name}."
        if any(tensor.startswith(prefix) for tensor in run.tensors):
            load_into(objective, run.tensors, where=str(run.path), prefix=prefix)
        else:
            del learner.objectives[name]
    return learner.eval()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, checked against the sum that `export` stored.  Raises CheckpointError if it is damaged."""
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            expected = (opened.metadata() or {}).get("crc32")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file, or a damaged one: {error}") from error
    if expected is not None and expected != str(export.checksum(tensors)):
        raise CheckpointError(f"{file}: damaged, its tensors do not match their checksum")
    return tensors


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], *, where: str, prefix: str = "", partial: bool = False
) -> Loaded:
    """Load the tensors whose names begin with `prefix` into module, in place; names in the report keep the prefix.

    where names the source in errors.  Unless `partial`, a tensor that is missing, of another shape or dtype, or (under
    the prefix) extra is a CheckpointError that names it, and nothing is loaded.  What is partial and matches in nothing
    is an error too: it is another model.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    fits = {
        name: tensor
        for name, tensor in found.items()
        if name in expected and (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
    }
    loaded = Loaded(
        matched=[prefix + name for name in expected if name in fits],
        missing=[prefix + name for name in expected if name not in found],
        misshapen=[prefix + name for name in expected if name in found and name not in fits],
        extra=[prefix + name for name in found if name not in expected],
    )
    if not partial and (wrong := export.misfits(found, expected)):
        raise CheckpointError(f"{where}: does not fit the model: {'; '.join(wrong)}")
    if not fits:
        raise CheckpointError(f"{where}: none of its {len(found)} tensors fits the model")
    module.load_state_dict(fits, strict=False)
    return loaded


def _tokenizer(file: Path) -> Tokenizer:
    """The one inside the file; a run of an earlier version has it only beside it."""
    beside = file.with_name("tokenizer.json")
    try:
        return export.read_tokenizer(file)
    except CheckpointError:
        if not beside.exists():
            raise
        return load_tokenizer(beside)
