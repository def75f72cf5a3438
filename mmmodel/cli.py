"""The command line: `mmmodel data | pretrain | evaluate | plot | demo`.

A command is a frozen dataclass whose fields are its flags and whose `run` does the work. Modules that import torch or
decoders are imported in `run`, so that --help answers at once.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmmodel import settings
from mmmodel.configs import ConfigError


@dataclass(frozen=True)
class Stamps:
    """Prepare the Tux Paint stamps: real images, captions and spoken descriptions in many languages.

    Uses an installed copy, or fetches Debian's package with apt-get (161 MB, no root needed), and writes shards to the
    cache (about 0.5 GB); a second call returns at once. The data is GPL-2.
    """

    cache: Path | None = None
    """Where to keep downloads and shards; by default $MMMODEL_CACHE, or mmmodel in the user's cache folder."""
    deb: Path | None = None
    """A package file fetched before, instead of the download."""
    tree: Path | None = None
    """An unpacked package, or its stamps folder, instead of the download."""
    languages: tuple[str, ...] = ("en", "fr", "es", "ru", "ro", "ca", "bg", "be", "el", "da")
    """Language tags to make samples of; `all` for every one of 78 (about 2 GB)."""
    workers: int = 2
    """Processes that convert; 0 converts in this one."""

    def run(self) -> None:
        from mmmodel.data import stamps

        try:
            folder = stamps.prepare(
                cache=self.cache, deb=self.deb, tree=self.tree, languages=self.languages, workers=self.workers
            )
        except (RuntimeError, FileNotFoundError) as error:  # no way to the files: it says what to do
            sys.exit(str(error))
        manifest = stamps.read_manifest(folder)
        counts = manifest["counts"]
        print(
            f"{folder}: {counts['samples']} samples of {counts['images']} images, {counts['with_speech']} with speech; "
            f"made in {manifest['seconds']['fetch']} s (fetch, unpack) + {manifest['seconds']['prepare']} s (convert)"
        )
        if manifest["broken"]:
            print(
                f"{len(manifest['broken'])} files do not decode and were left out: {', '.join(manifest['broken'][:5])}"
            )
        checks = stamps.verify(folder)
        print("; ".join(f"{name} {found}" for name, (found, _) in checks.items()))
        if wrong := [
            f"{name} {found}, expected {expected}" for name, (found, expected) in checks.items() if found != expected
        ]:
            sys.exit(f"not the data behind the published numbers (package 2022.06.04-1): {'; '.join(wrong)}")


@dataclass(frozen=True)
class Synthetic:
    """Make the procedural set of shapes, captions and melodies: seconds, no download. Label its numbers synthetic."""

    out: Path
    """Folder for the shards; replaced if it holds an earlier set."""
    samples: int = 2000
    """Number of samples, over all splits."""
    seed: int = 0
    """The same seed gives the same samples."""

    def run(self) -> None:
        from mmmodel.data import synthetic

        print(synthetic.prepare(self.out, samples=self.samples, seed=self.seed))


@dataclass(frozen=True)
class Data:
    """Prepare a data set as tar shards."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Stamps, tyro.conf.subcommand("stamps")] | Annotated[Synthetic, tyro.conf.subcommand("synthetic")]
    ]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Pretrain:
    """Pretrain on a data set, or continue where the same command was stopped (SIGTERM, Ctrl-C or kill -9)."""

    preset: Literal["demo", "native", "quick", "base", "tiny"] = "demo"
    """Configuration to start from; mmmodel/configs.py lists them."""
    out: Path = Path("runs/demo")
    """Folder of the run: config, metrics, curves, checkpoints, weights."""
    set: tuple[str, ...] = ()
    """Fields that differ from the preset: --set steps=100 model.width=64 languages=fr,es"""

    def run(self) -> None:
        from mmmodel import configs

        config = configs.override(configs.preset(self.preset), self.set)
        from mmmodel import train

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if not train.pretrain(config, self.out):
            print(f"stopped; the same command continues from {self.out}/checkpoints")
            sys.exit(train.STOPPED)


@dataclass(frozen=True)
class Evaluate:
    """Score a pretrained run by retrieval on concepts it never saw; writes report.json."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder of a finished run."""
    split: Literal["test", "validation", "train"] = "test"
    """Which concepts to score on."""
    require: Literal["none", "demo", "quick"] = "none"
    """Exit non-zero unless the results clear these bars; none: never."""

    def run(self) -> None:
        if not (self.run_folder / "model.safetensors").exists():
            sys.exit(
                f"evaluate: {self.run_folder} holds no model.safetensors, which a finished `mmmodel pretrain` writes"
            )
        from mmmodel import evaluate

        report = evaluate.evaluate(self.run_folder, split=self.split)
        evaluate.show(report)
        if self.require != "none" and (missed := evaluate.failures(report, self.require)):
            sys.exit("below the bar: " + "; ".join(missed))


@dataclass(frozen=True)
class Plot:
    """Draw the curves of a run, finished or not, as curves.png."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder of the run."""

    def run(self) -> None:
        from mmmodel.plot import plot_run

        curves = plot_run(self.run_folder)
        if curves is None:
            sys.exit(f"plot: {self.run_folder} holds no steps to draw")
        print(curves)


@dataclass(frozen=True)
class Demo:
    """The main job: prepare the stamps, pretrain, and score on unseen concepts; non-zero exit below the bars."""

    out: Path = Path("runs/demo")
    """Folder of the run."""
    quick: bool = False
    """The synthetic set instead of the stamps: about a minute, no download."""

    def run(self) -> None:
        preset = "quick" if self.quick else "demo"
        if not self.quick:
            Stamps().run()
        Pretrain(preset=preset, out=self.out).run()
        Evaluate(run_folder=self.out, require=preset).run()


Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script and of `python -m mmmodel`."""
    settings.calm_threads()
    command = tyro.cli(Command, args=args, prog="mmmodel", description=__doc__.split("\n")[0])
    try:
        command.run()
    except ConfigError as error:
        sys.exit(str(error))
@dataclass(frozen=True)
class Export:
    """Write the encoder of a run as ONNX, for runtimes without PyTorch: one sample of any length.

    The run's own model.safetensors is complete already: mmmodel.export.from_pretrained reads it.
    """

    out: Path
    """The .onnx file."""
    run_folder: Annotated[Path, tyro.conf.arg(name="from")] = Path("runs/demo")
    """Folder of a finished run, or its model.safetensors."""
    modalities: tuple[str, ...] = ()
    """Those that a sample has; empty: all of the model.  One alone also gives its point in the common space."""

    def run(self) -> None:
        from mmmodel import export

        learner = export.from_pretrained(self.run_folder)
        try:
            from mmmodel.export_onnx import export_onnx

            encoder = export_onnx(self.out, learner, self.modalities or learner.config.model.modalities)
        except ImportError as error:
            sys.exit(f"export: needs the packages of the onnx extra, pip install 'mmkernels[onnx]': {error}")
        print(f"{self.out}: {', '.join(encoder.modalities)} -> {', '.join(encoder.outputs)}")


    | Annotated[Export, tyro.conf.subcommand("export")]
