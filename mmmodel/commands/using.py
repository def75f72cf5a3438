"""Commands that use runs, or tell of one before it is made: predict, embed, plot, explain, export, complexity."""

import logging
import math
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmmodel.commands.training import Assignments, Implementation


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
    impl: Implementation | None = None
    """Implementation of every operator, by default the run's own. auto: the fastest that runs here."""

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
            impl=self.impl,
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
    impl: Implementation | None = None
    """Implementation of every operator, by default the run's own. auto: the fastest that runs here."""

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
            impl=self.impl,
        )
        print(f"{self.out}: {rows} vectors")


@dataclass(frozen=True)
class Plot:
    """Draw the curves of a run, finished or not, as curves.png."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder of the run."""

    def run(self) -> None:
        from mmmodel.plot import plot_run

        if not self.run_folder.is_dir():
            sys.exit(f"plot: there is no folder {self.run_folder}")
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
    """Which sample; empty: the first of the split that has the most modalities."""
    split: Literal["test", "validation", "train"] = "test"
    """Where to look for it if no key is given."""
    device: str = "cpu"
    """Where the model runs."""
    impl: Implementation | None = None
    """Implementation of every operator, by default the run's own. auto: the fastest that runs here."""

    def run(self) -> None:
        from mmmodel import explain

        found = explain.explain(
            self.run_folder,
            self.out,
            data=self.data,
            key=self.key,
            split=self.split,
            device=self.device,
            impl=self.impl,
        )
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

        if self.seconds is not None and not math.isfinite(self.seconds):
            raise configs.ConfigError(f"complexity: seconds is {self.seconds}, expected a finite number")
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
            sys.exit(f"export: needs onnx, onnxscript and onnxruntime, which are the extra 'onnx': {error}")
        print(f"{self.out}: {', '.join(encoder.modalities)} -> {', '.join(encoder.outputs)}")
