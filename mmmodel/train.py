"""The training loop: a fixed number of steps, resumable to the bit.

A step's batch and draws depend on (seed, step) alone, so the state is weights, optimizer and the step number.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmmodel import (
    atomic,
    checkpoint,
    distributed,
    export,
    held_out,
    language_model,
    limits,
    objectives,
    pretraining,
    run_folder,
    sharding,
    start,
    stopping,
    update,
)
from mmmodel.batches import Batch, Sampler
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.data import recordings
from mmmodel.data.loader import ShardDataset
from mmmodel.flops import gemm_rate
from mmmodel.frontends.text import load_tokenizer
from mmmodel.limits import RunError
from mmmodel.metrics import MetricsFile, batch_figures, merged, timings
from mmmodel.model import autocast, check_impl, parameter_counts
from mmmodel.plot import plot_run
from mmmodel.pretraining import Corpus, Prepared, Pretraining
from mmmodel.progress import Progress

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20
VALIDATION_BATCHES = 8


def pretrain(config: PretrainConfig, out: Path | str) -> bool:
    """Train in `out`, or continue what a stopped run left there.  True when all steps are done, False after SIGTERM.

    After Ctrl-C it raises KeyboardInterrupt, with rank 0's words; both finish the step in progress and save first.
    Under torchrun every process calls it; rank 0 writes.  Raises ConfigError if `out` holds a run of another
    configuration or another process is at work there, and if there is nothing to learn from the data.
    """
    check(config)
    torch.set_num_threads(config.threads)
    out = Path(out)
    config = dataclasses.replace(config, data=pretraining.located(config.data))
    with (
        distributed.processes(torch.device(config.device)) as device,
        nullcontext() if distributed.rank() else run_folder.alone_in(out, "pretrain"),
    ):
        return _pretrain(config, out, device)


def check(config: PretrainConfig) -> None:
    """Raises ConfigError for what cannot run here, whatever the data."""
    limits.check(config, "config")
    pretraining.check_vocabulary(config)
    limits.check_device(config.device, "config")
    if config.hold_out_speech:
        recordings.parsed(config.hold_out_speech)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("config: tensorboard is True, expected the package to be there: pip install tensorboard")


def _pretrain(config: PretrainConfig, out: Path, device: torch.device) -> bool:
    started = time.perf_counter()
    if config.batch_size < distributed.size():
        raise ConfigError(
            f"pretrain: batch_size is {config.batch_size}, expected at least a sample for each of the "
            f"{distributed.size()} processes"
        )
    begun = run_folder.begun(out, config)
    if begun and run_folder.finished(out, config):
        _log("%s is finished: all of its %d steps are done", out, config.steps)
        return True
    pretraining.check_teacher(config)  # not in `check`: a finished run asks it nothing
    check_impl(config.model.impl, device, config.precision)  # not in `check`: a rank's GPU is known here
    training = Training.open(config, out, device, begun=bool(begun))
    _tell_of_hardware(config, device)
    _tell_what_learns_nothing(training.learner, training.corpus, training.sampler)
    training.note(begun)
    _log("ready after %.1f s", time.perf_counter() - started)
    stop: list[int] = []
    if not training.done:
        with stopping.signals() as stop:
            training.run(stop)
    training.save()
    if not distributed.rank():
        plot_run(out)
    distributed.wait()
    if training.done:
        return True
    message = stopping.message(training.step, config.steps)
    if signal.SIGINT in stop:
        raise KeyboardInterrupt("" if distributed.rank() else message)  # the same Ctrl-C came to every rank
    _log("%s", message)
    return False


@dataclass
class Training:
    """A run under way: what it consists of, and how far it came.  Every rank has one, and rank 0 writes."""

    config: PretrainConfig
    out: Path
    dataset: ShardDataset  # of which the corpus was made
    learner: Pretraining
    corpus: Corpus
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    step: int = 0  # how many are done
    skipped: int = 0  # of these, how many changed no weight
    skipped_in_a_row: int = 0

    @classmethod
    def open(cls, config: PretrainConfig, out: Path, device: torch.device, *, begun: bool) -> Training:
        """As the last checkpoint in `out` has it, or before its first step.  Nothing of it is written but a tokenizer.

        begun: whether `out` holds steps of this run.
        """
        saved = checkpoint.saved(out / "checkpoints")
        # first, so that nothing is written of a run that cannot start
        earlier, loaded = start.read(config) if config.start and not saved else (None, "")
        with distributed.first_alone():
            if not distributed.rank():  # alone in the folder: a checkpoint that was cut may be as large as a whole one
                atomic.remove_left(out / "checkpoints", older=0)
            dataset = pretraining.open_data(config)
            learner = _learner(config, out, dataset, earlier, begun=begun)
            corpus = pretraining.load_corpus(config, dataset, learner.model)
        if not (items := corpus.split("train")):
            raise ConfigError(f"pretrain: {config.data} has no samples of the split train")
        sampler = Sampler(items, batch_size=config.batch_size, seed=config.seed)
        pretraining.teach(learner, config)
        learner.to(device)
        if not saved:
            if config.language_model and config.load_language_model:  # then there is no earlier run
                loaded = str(language_model.load(learner.model, config.language_model))
            _tell_of_weights(learner, loaded)
        update.prepare_modules(learner, config)
        if config.sharded:
            sharding.shard(learner, device)
        optimizer = update.make_optimizer(learner, config)
        progress = {"step": 0, "skipped": 0}
        if saved:
            progress = checkpoint.load(saved[-1], learner, optimizer, progress)
            _log("continuing at step %d of %d", progress["step"], config.steps)
        return cls(config, out, dataset, learner, corpus, sampler, optimizer, **progress)

    @property
    def done(self) -> bool:
        return self.step >= self.config.steps

    def note(self, begun: PretrainConfig | None) -> None:
        """Make `out` this run's.  begun: the configuration of the steps that it holds."""
        if distributed.rank():
            return
        if not self.done:
            run_folder.note_data(self.out, self.dataset, begun=bool(begun))
            if begun and (changed := run_folder.differences(asdict(begun), asdict(self.config))):
                _log("going on with other %s", changed)
        atomic.write_json(self.out / "config.json", asdict(self.config))

    def run(self, stop: Sequence[int]) -> None:
        """Steps to the last, or until a signal is in some rank's `stop`."""
        first, config = not distributed.rank(), self.config
        board = self.out / "tensorboard" if config.tensorboard else None
        metrics = MetricsFile(self.out / "metrics.jsonl", from_step=self.step, tensorboard=board) if first else None
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        peak = distributed.size() * gemm_rate(self.device, dtype)
        with (
            closing(metrics) if first else nullcontext(),  # after an error too: figures wait for TensorBoard's thread
            distributed.wrapped(self.learner) as module,
            update.dropout_apart(self.device),
            Progress(config.steps, self.step, shown=first) as bar,
            _ahead(self.batch, self.step) as batches,
        ):
            while not self.done:
                before = time.perf_counter()
                batch, prepared = next(batches)
                waited = time.perf_counter() - before
                line = self.advance(module, batch, prepared, stop)
                told_to_stop = line.pop("stop")  # all ranks stop after the same step
                line |= timings(line, time.perf_counter() - before, waited, peak)
                line |= validate(self.learner, self.corpus, self.step)
                if first:
                    metrics.write(line)
                    bar.advance(line)
                if told_to_stop:
                    break
                if config.checkpoint_every and self.step % config.checkpoint_every == 0 and not self.done:
                    self.save()

    def batch(self, step: int) -> tuple[Batch, Prepared]:
        """What this rank computes in a step; on the host."""
        items = [self.sampler.items[i] for i in self.sampler.batch(step)]
        return pretraining.make_step(self.learner, self.corpus, distributed.own(items), step)

    def advance(self, module: nn.Module, batch: Batch, prepared: Prepared, stop: Sequence[int]) -> dict[str, float]:
        """One step by all ranks; its figures, and as "stop" how many signals they have in all.

        module: the learner as `distributed.wrapped` gives it.  Raises RunError where no step makes an update any more.
        """
        # For encoders of others, which have dropout; all else draws from generators of its own.
        update.seed_dropout(int(distributed.generator(self.config.seed, self.step, 7).integers(2**63)), self.device)
        rate = update.set_learning_rate(self.optimizer, self.config, self.step)
        prepared = update.reweighted(prepared, self.device)
        figures, made = update.train_step(module, self.optimizer, batch, prepared, self.config)
        self.step += 1
        self.skipped += not made
        self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise RunError(f"train: more than {MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite")
        figures |= batch_figures(batch, self.config.model.modalities, self.learner.model.computed_rows(batch))
        every = distributed.everyone(figures | {"stop": len(stop)})
        return {"step": self.step, **merged(every), "lr": rate, "skipped": self.skipped}

    def save(self) -> None:
        """A checkpoint, and the model as it is: it may be used before the end."""
        state = checkpoint.state(self.learner, self.optimizer)  # of every rank: all have the same weights, or a part
        if not distributed.rank():
            checkpoints, progress = self.out / "checkpoints", {"step": self.step, "skipped": self.skipped}
            with run_folder.writing(checkpoints):
                checkpoint.write(checkpoints, self.step, state, progress, keep=self.config.keep_checkpoints)
            with run_folder.writing(self.out):
                tokenizer = self.learner.model.tokenizer
                export.write(self.out / export.FILE, state[0], self.config, tokenizer, step=str(self.step))
        distributed.wait()

    @property
    def device(self) -> torch.device:
        return next(self.learner.parameters()).device


def _learner(
    config: PretrainConfig, out: Path, dataset: ShardDataset, earlier: Pretraining | None, *, begun: bool
) -> Pretraining:
    """The earlier run's, or one of initial weights; rank 0 leaves the tokenizer in `out`, which its run keeps."""
    tokenizer = out / "tokenizer.json"
    kept = begun and tokenizer.exists() and not earlier  # a failed run may have left another
    if not kept and not distributed.rank():
        made = earlier.model.tokenizer if earlier else pretraining.make_tokenizer(config, dataset)
        with atomic.replacing(tokenizer) as partial:
            made.save(str(partial))
    return earlier or Pretraining(config, load_tokenizer(tokenizer))


def _tell_of_weights(learner: Pretraining, loaded: str) -> None:
    if loaded:
        _log("%s", loaded)
    counts = parameter_counts(learner.model)
    _log("%d parameters: %s", counts.pop("total"), ", ".join(f"{k} {v}" for k, v in counts.items()))


def _tell_of_hardware(config: PretrainConfig, device: torch.device) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        _log("the CPU computes, though there is a GPU: pretrain --set device=cuda takes it")
    cores = os.cpu_count() or 1
    if device.type == "cpu" and distributed.size() == 1 and cores > config.threads:
        faster = "a large model is faster with pretrain --set threads"
        _log("%d of %d cores compute: %s=%d", config.threads, cores, faster, cores)
    elif device.type == "cpu" and cores < config.threads:
        _log("%d threads wait for each other on %d cores: it is faster with fewer", config.threads, cores)


def _tell_what_learns_nothing(learner: Pretraining, corpus: Corpus, sampler: Sampler) -> None:
    config, items = learner.config, corpus.split("train")
    idle = objectives.idle(learner.objectives, items, config.steps, config.batch_size)
    for name, reason in idle.items():
        _log("%s learns nothing in this run: it %s", name, reason)
    for name in config.model.modalities:
        if not any(name in item.rows for item in items):
            _log("no training sample holds %s: its front end learns nothing in this run", name)
    if "contrastive" in learner.objectives.keys() - idle.keys() and (pairs := sampler.joined()) < 1:
        _log(
            "contrastive learns little in this run: a batch shows %.2g concepts in two modalities; "
            "it needs samples that hold both",
            pairs,
        )
    if config.hold_out_speech and not corpus.split(recordings.RECORDINGS):
        _log("hold_out_speech=%s finds no recording in the split train to hold out", config.hold_out_speech)
    validation = corpus.split("validation")
    if config.evaluate_every and not held_out.batch_size(validation):
        found = held_out.distinct(validation)
        few = f"the split validation has {found} distinct items for {distributed.size()} processes"
        _log("evaluate_every does nothing in this run: %s", few if found else "no sample has the split validation")


def validate(learner: Pretraining, corpus: Corpus, step: int) -> dict[str, float]:
    """The objectives' figures on samples of the split validation, named validation/objective/figure.

    {} but after every config.evaluate_every steps and after the last.  The draws are the same each time, and no state
    of the run changes: with or without it, it ends with the same bits.
    """
    config, items = learner.config, corpus.split("validation")
    due = config.evaluate_every and (step % config.evaluate_every == 0 or step == config.steps)
    if not due or not held_out.batch_size(items):
        return {}
    with autocast(config.device, config.precision), sharding.whole(learner):
        found = held_out.figures(learner, corpus, items, batches=VALIDATION_BATCHES)
    losses = [f"{name.removesuffix('/loss')} {loss:.3f}" for name, loss in found.items() if name.endswith("/loss")]
    _log("step %d, on the split validation: %s", step, ", ".join(losses) or "nothing to learn from")
    return {f"validation/{name}": value for name, value in found.items() if held_out.is_score(name)}


def _log(message: str, *values: Any) -> None:
    if not distributed.rank():
        logger.info(message, *values)


@contextmanager
def _ahead(make: Callable[[int], Any], step: int) -> Iterator[Iterator[Any]]:
    """make(step), make(step + 1), ... with the next one under way in a thread."""
    with ThreadPoolExecutor(1) as pool:

        def results(future: Future, step: int) -> Iterator[Any]:
            while True:
                ready = future.result()
                step += 1
                future = pool.submit(make, step)
                yield ready

        yield results(pool.submit(make, step), step)
