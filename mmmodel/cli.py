"""The command line of mmmodel: a multimodal model from raw data to vectors, labels and explanations.

A command is a frozen dataclass whose fields are its flags and whose `run` does the work. Modules that import torch or
decoders are imported in `run`, so that --help answers at once.
"""

import logging
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmmodel import settings
from mmmodel.configs import ConfigError
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.limits import RunError

INTERRUPTED = 130  # exit status after Ctrl-C, as a shell gives it

# One tuple for each time that the flag is given: tyro alone would keep the last.
Assignments = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE ...")
]


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

    preset: Literal["demo", "stamps", "native", "quick", "base", "tiny"] | None = None
    """Configuration to start from; mmmodel/configs.py lists them. By default demo, or with --from that run's own."""
    out: Path = Path("runs/demo")
    """Folder of the run: config, metrics, curves, checkpoints, weights."""
    set: Assignments = ()
    """Fields that differ from it: --set steps=100 model.width=64 languages=fr,es"""
    language_model: Path | None = None
    """Folder of a BERT-like model in Hugging Face format to start the encoder from; its shape replaces the preset's."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """An earlier run, or its safetensors file, whose weights and tokenizer this one starts from, at step 0."""

    def run(self) -> None:
        from mmmodel import configs

        if self.run_folder is not None:
            from mmmodel import start

            config = start.configured(self.run_folder, self.preset and configs.preset(self.preset))
        else:
            config = configs.preset(self.preset or "demo")
        if self.language_model is not None:
            from mmmodel import language_model

            config = language_model.shaped(config, self.language_model)
        config = configs.override(config, tuple(chain(*self.set)))
        from torch import distributed

        from mmmodel import complexity, train

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if not (self.out / "config.json").exists() and not distributed.is_torchelastic_launched():
            complexity.show(complexity.complexity(config))
        if not train.pretrain(config, self.out):
            print(f"stopped; the same command continues from {self.out}/checkpoints")
            sys.exit(train.STOPPED)


@dataclass(frozen=True)
class Evaluate:
    """Score a pretrained run by retrieval on concepts it never saw, or by a whole benchmark; writes report.json."""

    run_folder: Annotated[tuple[Path, ...], tyro.conf.arg(name="run", aliases=("--from",))] = (Path("runs/demo"),)
    """Folder of a finished run; a benchmark takes several that differ in their seed."""
    split: Literal["test", "validation", "train"] = "test"
    """Which concepts to score on."""
    data: str = ""
    """stamps, synthetic, or a folder of shards; empty: what the run was trained on. Scores on other data are printed,
    and the run's report.json stays. Not for a benchmark."""
    require: Literal["none", "demo", "quick"] = "none"
    """Exit non-zero unless the results clear these bars; none: never."""
    benchmark: Literal["none", "stamps"] = "none"
    """stamps: retrieval, known things said anew, and classification with few labels, against the untrained model."""
    out: Path | None = None
    """Folder of the benchmark; the same command goes on where it was stopped. A run's own report is in its folder."""
    budget_minutes: float = 0.0
    """Begin no further part of the benchmark after so many minutes; 0: no limit."""

    def run(self) -> None:
        for folder in self.run_folder:
            if not (folder / "model.safetensors").exists():
                sys.exit(f"evaluate: {folder} holds no model.safetensors, which a finished `mmmodel pretrain` writes")
        if self.benchmark != "none":
            self._benchmark()
            return
        if len(self.run_folder) != 1:
            sys.exit("evaluate: several runs belong to a --benchmark; one is scored by itself")
        from mmmodel import evaluate

        report = evaluate.evaluate(self.run_folder[0], split=self.split, data=self.data)
        evaluate.show(report)
        if not report["tasks"]:
            sys.exit("evaluate: no task can be scored")
        if self.require != "none" and (missed := evaluate.failures(report, self.require)):
            sys.exit("below the bar: " + "; ".join(missed))

    def _benchmark(self) -> None:
        if self.out is None:
            sys.exit("evaluate: a benchmark needs a folder for its parts and its report, --out DIR")
        from mmmodel.benchmark import stamps

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        report = stamps.run(self.run_folder, self.out, budget_minutes=self.budget_minutes or None)
        print((self.out / "report.md").read_text(encoding="utf-8"))
        if report["left"]:
            sys.exit(f"{len(report['left'])} parts are left; the same command goes on with them")


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a pretrained run on labelled shards: a new output layer, validation, early stop."""

    run_folder: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of a pretrained run, or its safetensors file."""
    out: Path
    """Folder for the model, its metrics and report.json."""
    config: tyro.conf.OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)

    def run(self) -> None:
        from mmmodel.finetuning.run import finetune

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        report = finetune(self.run_folder, self.config, self.out)
        for split in ("validation", "test"):
            if report[split]:
                print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in report[split].items()))


@dataclass(frozen=True)
class Predict:
    """Write what a fine-tuned model says of samples, labelled or not: a table of key, predicted, and scores."""

    run_folder: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of a fine-tuned run, or its safetensors file."""
    out: Path
    """The file to write; its suffix is the format: .parquet, .csv or .jsonl."""
    data: str = ""
    """stamps, synthetic, or a folder of shards; empty: what the run was fine-tuned on."""
    split: str = ""
    """Samples of one split alone; empty: all."""
    languages: tuple[str, ...] = ()
    """Language tags of the samples; empty: all, or with no --data those of the run."""
    device: str = "cpu"
    """Where the model runs."""

    def run(self) -> None:
        from mmmodel.finetuning import predict

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        rows, left = predict.write(
            self.out,
            self.run_folder,
            self.data,
            split=self.split or None,
            languages=self.languages,
            device=self.device,
        )
        print(f"{self.out}: {rows} rows" + (f"; {left} samples have nothing that the model reads" if left else ""))


@dataclass(frozen=True)
class Embed:
    """Write a vector for each modality of each sample, and one of the sample: a table of key, modality, vector."""

    run_folder: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of a pretrained or fine-tuned run, or its safetensors file."""
    out: Path
    """The file to write; its suffix is the format: .parquet, .csv or .jsonl."""
    data: str = ""
    """stamps, synthetic, or a folder of shards; empty: what the run was trained on."""
    split: str = ""
    """Samples of one split alone; empty: all."""
    languages: tuple[str, ...] = ()
    """Language tags of the samples; empty: all, or with no --data those of the run."""
    joint: bool = True
    """Also a vector of each whole sample."""
    device: str = "cpu"
    """Where the model runs."""

    def run(self) -> None:
        from mmmodel import embed

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        rows = embed.write(
            self.out,
            self.run_folder,
            self.data,
            split=self.split or None,
            languages=self.languages,
            joint=self.joint,
            device=self.device,
        )
        print(f"{self.out}: {rows} vectors")


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
class Explain:
    """Show what a model looks at in one sample, and what it loses without a modality: an HTML page and PNGs."""

    out: Path
    """Folder for index.html, the pictures and explanation.json."""
    run_folder: Annotated[Path, tyro.conf.arg(name="from")] = Path("runs/demo")
    """Folder of a pretrained or fine-tuned run, or its safetensors file."""
    data: str = ""
    """stamps, synthetic or a folder of shards; empty: what the run was trained on."""
    key: str = ""
    """Which sample; empty: the first of the split that has every modality."""
    split: Literal["test", "validation", "train"] = "test"
    """Where to look for it if no key is given."""

    def run(self) -> None:
        from mmmodel import explain

        found = explain.explain(self.run_folder, self.out, data=self.data, key=self.key, split=self.split)
        print(f"{found.sample.item.key}: {self.out / 'index.html'}")


@dataclass(frozen=True)
class Complexity:
    """Print parameters, FLOPs and memory of each part, before anything is trained or loaded."""

    preset: Literal["demo", "stamps", "native", "quick", "base", "tiny"] = "demo"
    """Configuration to start from."""
    text: int | None = None
    """Word pieces of a sample, [CLS] included; by default the most that the configuration allows, as for the others."""
    image: tuple[int, int] | None = None
    """Rows and columns of cells of a sample's image, 16 pixels each; 0 0: none."""
    seconds: float | None = None
    """Seconds of sound of a sample; 0: none."""
    set: Assignments = ()
    """Fields that differ from the preset: --set batch_size=16 model.width=64"""

    def run(self) -> None:
        from mmmodel import complexity, configs

        config = configs.override(configs.preset(self.preset), tuple(chain(*self.set)))
        shape = complexity.SampleShape.longest(config.model)
        shape = complexity.SampleShape(
            text=shape.text if self.text is None else self.text,
            image=shape.image if self.image is None else self.image,
            audio=shape.audio if self.seconds is None else round(100 * self.seconds),  # a frame is 10 ms
        )
        complexity.show(complexity.complexity(config, shape))


@dataclass(frozen=True)
class Export:
    """Write the encoder of a run as ONNX, for runtimes without PyTorch: one sample of any length.

    The tokenizer comes beside it. The run's own model.safetensors is complete already: mmmodel.export.from_pretrained
    reads it.
    """

    out: Path
    """The .onnx file."""
    run_folder: Annotated[Path, tyro.conf.arg(name="from")] = Path("runs/demo")
    """Folder of a pretrained or fine-tuned run, or its model.safetensors; a fine-tuned one also gives its scores."""
    modalities: tuple[str, ...] = ()
    """Those that a sample has; empty: all that the run reads.  One alone also gives its point in the common space."""

    def run(self) -> None:
        from mmmodel import export
        from mmmodel.finetuning import run, weights

        source = export.open_run(self.run_folder)
        learner, tuned, modalities = weights.learner_of(source), None, source.config.model.modalities
        if source.finetuning is not None:
            made, labels, config = run.restore(source)
            tuned = None if labels.task == "retrieval" else (made, labels)  # its points are the learner's
            modalities = config.modalities or modalities
        try:
            from mmmodel.export_onnx import export_onnx

            encoder = export_onnx(self.out, learner, self.modalities or modalities, tuned)
        except ImportError as error:
            sys.exit(f"export: needs the packages of the onnx extra, pip install 'mmkernels[onnx]': {error}")
        print(f"{self.out}: {', '.join(encoder.modalities)} -> {', '.join(encoder.outputs)}")


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
        Evaluate(run_folder=(self.out,), require=preset).run()


Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Explain, tyro.conf.subcommand("explain")]
    | Annotated[Complexity, tyro.conf.subcommand("complexity")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Ablate, tyro.conf.subcommand("ablate")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script and of `python -m mmmodel`.

    What a user or the machine did wrong is one line; anything else is a fault of ours and shows its traceback.
    """
    settings.calm_threads()
    command = tyro.cli(Command, args=args, prog="mmmodel", description=__doc__.split("\n")[0])
    try:
        command.run()
    except (ConfigError, RunError) as error:
        sys.exit(str(error))
    except OSError as error:  # a file in a folder's place, no right to write, a full disk
        sys.exit(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
