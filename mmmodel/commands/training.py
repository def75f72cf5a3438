"""Commands that make data and runs, and score them: data, pretrain, evaluate, finetune, ablate, demo."""

import logging
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmmodel.finetuning.config import FinetuneConfig

# One tuple for each time that the flag is given: tyro alone would keep the last.
Assignments = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE ...")
]
Implementation = Literal["auto", "reference", "torch", "cpp", "triton"]


@dataclass(frozen=True)
class Stamps:
    """Prepare the Tux Paint stamps: real images, captions and spoken descriptions in many languages.

    Uses an installed copy, or fetches Debian's package with apt-get (161 MB, no root needed), and writes shards to the
    cache (about 0.5 GB); a second call returns at once, whatever package it names. The data is GPL-2.
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

        folder = stamps.prepare(
            cache=self.cache, deb=self.deb, tree=self.tree, languages=self.languages, workers=self.workers
        )
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
class Convert:
    """Make shards of your own files: a folder or a table.

    In a folder, files that differ in their suffix alone are one sample (a.txt, a.jpg, a.wav, a.json; any subset), and a
    first folder inside that is called train, validation or test says the split. In a table (csv, tsv, jsonl, parquet)
    a row is a sample, and columns beside the four below become its fields: split, concept, labels to fine-tune on, ...
    """

    source: tyro.conf.Positional[Path]
    """A folder, or a table."""
    out: Path
    """New folder for the shards."""
    text: str = "text"
    """Column of captions."""
    image: str = "image"
    """Column of pictures: paths from the table's folder on, or their bytes."""
    audio: str = "audio"
    """Column of recordings, as of pictures."""
    key: str = "key"
    """Column of the samples' names; may be missing."""
    per_shard: int = 1000
    """Samples in a shard."""

    def run(self) -> None:
        from mmmodel.data import convert

        columns = convert.Columns(self.text, self.image, self.audio, self.key)
        found = convert.convert(self.source, self.out, columns=columns, per_shard=self.per_shard)
        print(f"{self.out}: {convert.summary(found)}")


@dataclass(frozen=True)
class Data:
    """Prepare a data set as tar shards."""

    command: tyro.conf.OmitSubcommandPrefixes[Stamps | Synthetic | Convert]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Pretrain:
    """Pretrain on a data set, or continue where the same command was stopped (SIGTERM, Ctrl-C or kill -9)."""

    preset: Literal["demo", "stamps", "native", "quick", "base", "tiny"] | None = None
    """Configuration to start from; mmmodel/configs.py lists them. By default demo, or with --from that run's own."""
    out: Path | None = None
    """Folder of the run: config, metrics, curves, checkpoints, weights. By default runs/PRESET; with --from it is
    needed."""
    data: str = ""
    """stamps, synthetic, or a folder of shards: --set data=... in short, and stronger. Empty: what the configuration
    says."""
    set: Assignments = ()
    """Fields that differ from it: --set steps=100 model.width=64 languages=fr,es"""
    language_model: Path | None = None
    """Folder of a BERT-like model in Hugging Face format to start the encoder from; its shape replaces the preset's."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """An earlier run, or its safetensors file, whose weights and tokenizer this one starts from, at step 0."""

    def run(self) -> None:
        from mmmodel import configs

        out = self.out or Path("runs") / (self.preset or "demo")
        if self.run_folder is not None:
            from mmmodel import start

            if self.out is None:
                raise configs.ConfigError("pretrain: --from needs --out, the folder of the new run")
            config = start.configured(self.run_folder, self.preset and configs.preset(self.preset))
        else:
            config = configs.preset(self.preset or "demo")
        if self.language_model is not None:
            from mmmodel import language_model

            config = language_model.shaped(config, self.language_model)
        given = (f"data={self.data}",) if self.data else ()
        config = configs.override(config, (*chain(*self.set), *given))
        from torch import distributed

        from mmmodel import complexity, pretraining, stopping, train

        train.check(config)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if not (out / "config.json").exists() and not distributed.is_torchelastic_launched():
            pretraining.check_teacher(config)  # a mistake is told before the table
            complexity.show(complexity.complexity(config))
        if not train.pretrain(config, out):
            sys.exit(stopping.STOPPED)


@dataclass(frozen=True)
class Evaluate:
    """Score a pretrained run by retrieval and its objectives' losses on concepts it never saw, or by a whole benchmark;
    writes report.json."""

    run_folder: Annotated[tuple[Path, ...], tyro.conf.arg(name="run", aliases=("--from",))] = (Path("runs/demo"),)
    """Folder of a run; a benchmark takes several finished ones that differ in their seed."""
    split: Literal["test", "validation", "train"] = "test"
    """Which concepts to score on; the scores of another split than test go to report-SPLIT.json. Not for a
    benchmark."""
    data: str = ""
    """stamps, synthetic, or a folder of shards; empty: what the run was trained on. Scores on other data are printed,
    and the run's report.json stays. Not for a benchmark."""
    require: Literal["none", "demo", "quick"] = "none"
    """Exit non-zero unless the results clear these bars; none: never. Not for a benchmark."""
    benchmark: Literal["none", "stamps"] = "none"
    """stamps: retrieval, new recordings of known things, classifying with few labels; against the untrained model."""
    out: Path | None = None
    """Folder of the benchmark; the same command goes on where it was stopped. A run's own report is in its folder."""
    budget_minutes: float = 0.0
    """Begin no further part of the benchmark after so many minutes; 0: no limit."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda or cuda:NUMBER. Not for a benchmark."""
    impl: Implementation | None = None
    """Implementation of every operator, by default the run's own. auto: the fastest that runs here. Not for a
    benchmark."""

    def run(self) -> None:
        if self.benchmark != "none":
            self._benchmark()
            return
        if len(self.run_folder) != 1:
            sys.exit("evaluate: several runs belong to a --benchmark; one is scored by itself")
        from mmmodel import evaluate

        report = evaluate.evaluate(
            self.run_folder[0], split=self.split, data=self.data, device=self.device, impl=self.impl
        )
        evaluate.show(report)
        if not report["tasks"] and not report["objectives"]:
            sys.exit("evaluate: no task can be scored")
        if self.require != "none" and (missed := evaluate.failures(report, self.require)):
            sys.exit("below the bar: " + "; ".join(missed))

    def _benchmark(self) -> None:
        alone = ("split", "data", "require", "device", "impl")
        if given := [f"--{name}" for name in alone if getattr(self, name) != getattr(Evaluate, name)]:
            sys.exit(f"evaluate: {', '.join(given)} cannot be given with --benchmark, which takes its runs as they are")
        if self.out is None:
            sys.exit("evaluate: a benchmark needs a folder for its parts and its report, --out DIR")
        if not self.budget_minutes >= 0:
            sys.exit(f"evaluate: budget_minutes is {self.budget_minutes}, expected at least 0, which is no limit")
        from mmmodel.benchmark import stamps

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        report = stamps.run(self.run_folder, self.out, budget_minutes=self.budget_minutes or None)
        print((self.out / "report.md").read_text(encoding="utf-8"))
        if report["left"]:
            sys.exit(f"{len(report['left'])} parts are left; the same command goes on with them")


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a pretrained run on labelled shards, or continue where the same command was stopped (SIGTERM, Ctrl-C or
    kill -9): a new output layer, validation, early stop."""

    run_folder: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of a pretrained run, or its safetensors file."""
    out: Path
    """Folder for the model, its metrics and report.json."""
    impl: Implementation | None = None
    """Implementation of every operator, by default the run's own. auto: the fastest that runs here."""
    config: tyro.conf.OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)

    def run(self) -> None:
        from mmmodel.finetuning.run import finetune

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        report = finetune(self.run_folder, self.config, self.out, impl=self.impl)
        for split in ("validation", "test"):
            if report[split]:
                print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in report[split].items()))


@dataclass(frozen=True)
class Ablate:
    """Pretrain and score variants of the demo that differ in one thing each: what is retrieval owed to?"""

    study: Annotated[Literal["objectives", "language-model"], tyro.conf.Positional]
    """Which variants; mmmodel/ablation.py lists them."""
    out: Path = Path("runs/ablation")
    """Folder of the runs and of STUDY.json; finished variants are not run again."""
    only: tuple[str, ...] = ()
    """Variants to run now; by default all."""
    set: Assignments = ()
    """Fields that every variant shares: --set steps=160"""
    language_model: Path | None = None
    """Folder of the language model, for the study of that name."""

    def run(self) -> None:
        from mmmodel import ablation

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        ablation.run(self.study, self.out, only=self.only, shared=tuple(chain(*self.set)), folder=self.language_model)


@dataclass(frozen=True)
class Demo:
    """Prepare the stamps, pretrain, and score on unseen concepts; exits non-zero if the scores miss the demo's bars."""

    out: Path = Path("runs/demo")
    """Folder of the run."""
    quick: bool = False
    """The synthetic set instead of the stamps: about a minute, no download."""

    def run(self) -> None:
        preset = "quick" if self.quick else "demo"
        if not self.quick:
            Stamps().run()
        Pretrain(preset=preset, out=self.out).run()
        Evaluate(run_folder=(self.out,), require=preset).run()
